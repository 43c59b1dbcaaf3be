"""Hooks: those that compute are in the graph; those that keep what they see, or do something else, still run."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saq_fx import prepare_saq
from saq_fx.annotation import record_of
from saq_fx.graph import layers

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))


def keeps(seen: list[Any]) -> Callable[..., Any]:
    return lambda module, args, output: seen.append(output)


def keeps_and_returns(seen: list[Any]) -> Callable[..., Any]:
    return lambda module, args, output: (seen.append(output), output)[1]


def keeps_a_mean(seen: list[Any]) -> Callable[..., Any]:
    return lambda module, args, output: seen.append(output.mean() * 2)


@pytest.mark.parametrize("hook", [keeps, keeps_and_returns, keeps_a_mean])
@pytest.mark.parametrize("path", ["", "0", "0.0", "0.1", "1"])
def test_hooks_that_keep_what_they_see_run_at_every_call(path: str, hook: Callable[..., Any]) -> None:
    model, seen = network(), ["before"]
    model.get_submodule(path).register_forward_hook(hook(seen))
    graph, quantized = (prepare_saq(model, example_inputs=X, precision=precision) for precision in (None, "W4A4"))
    assert seen == ["before"]
    assert torch.equal(graph(X), model(X))
    assert torch.equal(seen[1], seen[2])
    assert len(seen) == 3
    assert torch.equal(graph(X[:1]), model(X[:1]))
    seen.clear()
    quantized(X).sum().backward()
    assert len(seen) == 1
    assert isinstance(seen[0], Tensor)
    assert len(list(layers(quantized))) == 3
    assert record_of(quantized).untraced == ()


def test_pre_hooks_that_keep_what_they_see_run_at_every_call() -> None:
    model, seen = network(), []
    model[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model[2].register_forward_pre_hook(lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    gm = prepare_saq(model, example_inputs=X, precision=None)
    assert seen == []
    assert torch.equal(gm(X), model(X))
    assert len(seen) == 4
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize(
    "hook",
    [
        lambda module, args, output: output * 2,
        lambda module, args, output: (output.mul_(2), None)[1],
        lambda module, args, output: output * module.scale.add_(1),
    ],
)
def test_hooks_that_compute_are_part_of_the_graph(hook: Callable[..., Any]) -> None:
    model = network()
    model[1].register_buffer("scale", torch.ones(1))
    model[1].register_forward_hook(hook)
    gm = prepare_saq(model, example_inputs=X, precision=None)
    assert record_of(gm).tracing == "symbolic"
    for _ in range(2):
        assert torch.equal(gm(X), model(X))


class ReadsWhatHooksKeep(nn.Module):
    """Features that hooks put into a dictionary, as of DPT: forward reads one of the two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1)
        features: dict[str, Tensor] = {}
        for name in ("stem", "body"):
            self.get_submodule(name).register_forward_hook(self.keeping(features, name))
        self.features = features

    @staticmethod
    def keeping(features: dict[str, Tensor], name: str) -> Callable[..., None]:
        return lambda module, args, output: features.update({name: output})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x))) + self.features["stem"].mean()


def test_what_forward_reads_of_hooks_is_part_of_the_graph() -> None:
    model = ReadsWhatHooksKeep()
    gm = prepare_saq(model, example_inputs=X, precision=None)
    assert torch.equal(gm(X), model(X))
    assert torch.equal(gm(2 * X), model(2 * X))


class Counter:
    """A hook with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls += 1
        self.last = output


def test_preparing_leaves_what_a_hook_keeps_as_it_was() -> None:
    model, counter = network(), Counter()
    model[0].register_forward_hook(counter)
    model(X)
    last = counter.last
    prepare_saq(model, example_inputs=X)
    assert counter.calls == 1
    assert counter.last is last


class Chosen(nn.Module):
    """Looks a setting up in a set, and a size in a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.offsets: dict[int, Tensor] = {}

    def forward(self, x: Tensor, mode: int = 0) -> Tensor:
        length = x.shape[1]
        if length not in self.offsets:
            self.offsets[length] = torch.arange(length, dtype=x.dtype)[:, None]
        x = x + self.offsets[length]
        return self.head(-x if mode in {2, 3} else x)


@pytest.mark.parametrize("mode", [1, 2])
def test_settings_are_found_in_sets(mode: int) -> None:
    model, x = Chosen(), torch.randn(2, 5, 4)
    gm = prepare_saq(model, example_inputs=(x, mode), precision=None)
    assert torch.equal(gm(x, mode), model(x, mode))
    assert torch.equal(gm(x[:, :3], mode), model(x[:, :3], mode))
