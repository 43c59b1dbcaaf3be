"""Hooks: those that compute are in the graph; those that keep what they see, or do something else, still run."""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from saq_fx import prepare_saq
from saq_fx.annotation import record_of
from saq_fx.errors import TracingError
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


def in_list() -> tuple[Any, Callable[..., Any]]:
    seen: list[Any] = []
    return seen, lambda module, args, output: (seen.append(output), output * 2)[1]


def in_deque() -> tuple[Any, Callable[..., Any]]:
    seen: Any = deque(maxlen=2)
    return seen, lambda module, args, output: seen.append(output.mean())


def in_set() -> tuple[Any, Callable[..., Any]]:
    seen: set[Any] = set()
    return seen, lambda module, args, output: seen.add(tuple(output.shape))


def nested() -> tuple[Any, Callable[..., Any]]:
    seen: Any = defaultdict(list)
    return seen, lambda module, args, output: seen["outputs"].append(output)


def given() -> tuple[Any, Callable[..., Any]]:
    seen: list[Any] = []
    return seen, partial(lambda kept, module, args, output: kept.append(output), seen)


def method() -> tuple[Any, Callable[..., Any]]:
    counter = Counter()
    return counter, counter.scale


def counts() -> tuple[Any, Callable[..., Any]]:
    calls = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output * calls

    return SimpleNamespace(calls=calls), hook


def contents(seen: Any) -> list[Any]:
    seen = vars(seen) if hasattr(seen, "__dict__") else seen
    items = seen.values() if isinstance(seen, dict) else seen
    return [item for each in items for item in (each if isinstance(each, list) else [each])]


@pytest.mark.parametrize("make", [in_list, in_deque, in_set, nested, given, method, counts])
@pytest.mark.parametrize("path", ["", "0.0", "1"])
def test_whatever_hooks_keep_is_kept_at_every_call(path: str, make: Callable[..., Any]) -> None:
    models = [network(), network()]
    (expected, hook), (actual, other) = make(), make()
    for model, each in zip(models, (hook, other), strict=True):
        model.get_submodule(path).register_forward_hook(each)
    gm = prepare_saq(models[1], example_inputs=X, precision=None)
    assert contents(actual) == contents(make()[0])
    for x in (X, X[:1], 2 * X):
        assert torch.equal(gm(x), models[0](x))
        kept, others = contents(actual), contents(expected)
        assert len(kept) == len(others)
        for each, reference in zip(kept, others, strict=True):
            assert torch.equal(each, reference) if isinstance(each, Tensor) else each == reference


class ByName(nn.Module):
    """Calls by keywords; what a layer gives is in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Conv2d(3, 4, 3), Last()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(features={"x": self.inner(input=x)})["y"]


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 2, 1)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"y": self.conv(features["x"])}


def test_hooks_that_change_keywords_and_dictionaries_are_part_of_the_graph() -> None:
    model = ByName()
    model.inner.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"input": 2 * kwargs["input"]}), with_kwargs=True
    )
    model.head.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["features"].update(x=kwargs["features"]["x"] + 1), with_kwargs=True
    )
    model.head.register_forward_hook(lambda module, args, output: output.update(y=output["y"] * 3), prepend=True)
    gm = prepare_saq(model, example_inputs=X, precision=None)
    assert record_of(gm).tracing == "symbolic"
    for x in (X, X[:1]):
        assert torch.equal(gm(x), model(x))


class Auxiliary(nn.Module):
    """A head in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head, self.auxiliary = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


def test_hooks_of_what_only_training_runs_run_in_training_only() -> None:
    model, seen = Auxiliary(), []
    model.auxiliary.register_forward_hook(lambda module, args, output: seen.append(output))
    gm = prepare_saq(model, example_inputs=X, precision=None)
    gm.eval()(X)
    assert seen == []
    assert torch.equal(gm.train()(X)[1], seen[0])


def test_without_examples_a_hook_that_keeps_values_is_refused() -> None:
    model = network()
    model[0].register_forward_hook(keeps([]))
    with pytest.raises(TracingError, match=r"module '0': its hook keeps.*pass example_inputs"):
        prepare_saq(model)


def test_a_hook_that_removes_itself_stays_on_the_model() -> None:
    model = network()

    def once(module: nn.Module, args: Any, output: Tensor) -> None:
        handle.remove()

    handle = model[1].register_forward_hook(once)
    prepare_saq(model, example_inputs=X)
    assert len(model[1]._forward_hooks) == 1


def test_hooks_of_all_modules_are_refused() -> None:
    with (
        register_module_forward_hook(lambda module, args, output: None),
        pytest.raises(TracingError, match="register them on the modules"),
    ):
        prepare_saq(network(), example_inputs=X)


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

    def scale(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self(module, args, output)
        return output * self.calls


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


class Masking(nn.Module):
    """Trains some rows of a weight only, by a hook of its gradient; `asks` keeps it Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.asks = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), asks
        self.head.weight = self.embedding.weight
        self.embedding.weight.register_hook(lambda gradient: gradient * (torch.arange(7) > 2)[:, None])

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.head(self.embedding(tokens))
        return x * 2 if self.asks and x.sum() > 1e9 else x


@pytest.mark.parametrize("asks", [False, True])
def test_hooks_of_gradients_of_parameters_come_along(asks: bool) -> None:
    model, tokens = Masking(asks), torch.arange(7)[None]
    for precision in (None, "W4A4"):
        gm = prepare_saq(model, example_inputs=tokens, precision=precision)
        for each in (model, gm):
            each(tokens).square().sum().backward()
        gradient = gm.get_parameter("embedding.weight").grad
        assert gradient is not None
        assert gradient[:3].eq(0).all()
        assert gradient[3:].ne(0).any()
        assert precision is not None or torch.equal(gradient, model.embedding.weight.grad)  # type: ignore[arg-type]
