"""From model to graph: modes, guards, fixed arguments, and errors that name the place."""

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.utils import ModelOutput

from saq_fx.annotation import record_of
from saq_fx.errors import TracingError
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.tracing import trace


class Mode(nn.Module):
    """Dropout by the flag, and an `if` on the flag."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.inner(x), 0.5, self.training)
        if self.training:
            x = x + torch.randn_like(x)
        return x


@pytest.mark.parametrize("traced_in_training", [False, True])
def test_modes_stay_alive(traced_in_training: bool) -> None:
    model, x = Mode().train(traced_in_training), torch.randn(3, 4)
    gm = trace(model, x)
    assert gm.training == traced_in_training
    for training in (True, False, True):
        model.train(training)
        gm.train(training)
        torch.manual_seed(0)
        expected = model(x)
        torch.manual_seed(0)
        assert torch.equal(gm(x), expected)
    assert type(model.training) is bool


def test_a_frozen_part_keeps_its_mode() -> None:
    model = nn.Sequential(Flagged(), Flagged())
    gm = trace(model, torch.randn(3, 4)).train()
    gm.get_submodule("0").eval()
    x = torch.ones(3, 4)
    torch.manual_seed(0)
    once = F.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(gm(x), once)


class Flagged(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Optional(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 2.0) -> Tensor:
        return x * scale if mask is None else x * mask


def test_unused_arguments_are_fixed_and_guarded() -> None:
    x = torch.randn(3)
    gm = trace(Optional(), x)
    assert torch.equal(gm(x), 2 * x)
    assert torch.equal(gm(x, None, 2.0), 2 * x)
    with pytest.raises(TracingError, match="'mask' was fixed at its default None"):
        gm(x, torch.ones(3))
    masked = trace(Optional(), {"x": x, "mask": torch.zeros(3)})
    assert torch.equal(masked(x=x, mask=torch.ones(3)), x)


ONES = torch.ones(8)


class Biased(nn.Module):
    """Has defaults that no code of a graph can hold; `asks` keeps it Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.layer, self.asks = nn.Linear(8, 8), asks

    def forward(self, x: Tensor, bias: Tensor = ONES, scale: float = 2.0, shift: Tensor = ONES) -> Tensor:
        x = self.layer(x) * scale + bias - shift
        return x if not self.asks or x.sum() > -1e9 else x.relu()


@pytest.mark.parametrize("asks", [False, True])
def test_defaults_that_are_tensors(asks: bool) -> None:
    model, x, others = Biased(asks), torch.randn(2, 8), torch.randn(2, 8)
    for given in ({}, {"bias": others[0]}, {"shift": others[1]}, {"bias": others[0], "scale": 3.0, "shift": others[1]}):
        gm = prepare_saq(model, example_inputs={"x": x, **given}, precision=None)
        assert torch.equal(gm(x=x, **given), model(x, **given))


class Sized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 2:
            x = x[:2]
        total = torch.zeros(x.shape[1])
        for row in x:
            total = total + row
        return total


def test_control_flow_is_decided_by_the_example_and_guarded() -> None:
    gm = trace(Sized(), torch.randn(5, 3))
    for rows, width in ((5, 3), (4, 7)):
        x = torch.randn(rows, width)
        assert torch.equal(gm(x), Sized()(x))
    with pytest.raises(TracingError, match=r"another path .*, at Sized, .*test_tracing\.py:\d+: bool is False"):
        gm(torch.randn(1, 3))
    with pytest.raises(TracingError, match=r"Sized.*test_tracing\.py:\d+.*pass example_inputs"):
        trace(Sized())


class Caching(nn.Module):
    """Keeps what it computed, as position tables do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.last = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        self.table = x.sum(0)
        return x + self.table


def test_symbolic_values_do_not_stay_in_the_model() -> None:
    gm = trace(Caching(), torch.randn(2, 3))
    assert all(type(buffer) is Tensor for buffer in gm.buffers())
    x = torch.randn(2, 3)
    assert torch.equal(gm(x), Caching()(x))


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.sqrt() + torch.arange(3)


def test_constants_move_but_are_not_saved_and_buffers_stay_live() -> None:
    gm = trace(Constants(), torch.randn(3))
    assert list(gm.state_dict()) == ["scale"]
    gm.scale.fill_(9.0)
    assert torch.equal(gm(torch.ones(3)), torch.arange(3) + 3.0)
    gm.double()
    assert gm(torch.ones(3, dtype=torch.double)).dtype == torch.double


class FunctionalNorm(nn.Module):
    """BatchNorm by hand, and control flow behind it, so that tracing has to run it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        update = bool(self.training)
        x = F.batch_norm(x, self.mean, self.variance, training=update)
        return x if x.shape[0] > 1 else -x


def test_tracing_moves_no_running_statistics() -> None:
    model, x = FunctionalNorm().eval(), torch.randn(4, 3)
    gm = trace(model, x)
    assert torch.equal(gm.mean, torch.zeros(3))
    assert torch.equal(gm(x), model(x))
    gm.train()(x)
    model.train()(x)
    assert torch.equal(gm.mean, model.mean)


class Uncopyable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Remembering(nn.Module):
    """Leaves what it has computed where only it finds it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.held = nn.Linear(2, 2), SimpleNamespace(levels=[])

    def forward(self, x: Tensor) -> Tensor:
        self.held.levels = [self.layer(x)]
        return self.held.levels[0] * 2


def test_a_model_that_keeps_tensors_with_a_history() -> None:
    model, x = Remembering(), torch.randn(3, 2)
    expected = model(x)
    kept = model.held.levels[0]
    assert torch.equal(trace(model, x)(x), expected)
    assert model.held.levels[0] is kept
    assert kept.grad_fn is not None


def test_errors_name_model_and_argument() -> None:
    with pytest.raises(TracingError, match="Uncopyable cannot be copied"):
        trace(Uncopyable())
    with pytest.raises(TracingError, match=r"do not fit Optional\.forward"):
        trace(Optional(), {"y": torch.ones(1)})


def test_the_way_taken_is_recorded() -> None:
    assert record_of(trace(Optional())).tracing == "symbolic"
    assert record_of(trace(torch.fx.symbolic_trace(nn.Linear(2, 2)))).tracing == "given graph"


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.relu(self.norm(self.conv(x)))).mean((2, 3)))


@pytest.mark.parametrize(("exported_in_training", "decomposed"), [(False, False), (True, False), (True, True)])
def test_an_exported_program_follows_the_mode(exported_in_training: bool, decomposed: bool) -> None:
    model, x = Normalized().train(exported_in_training), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decomposed else program
    gm = prepare_saq(program, example_inputs=x, precision=None)
    assert record_of(gm).tracing == "given program"
    assert gm.state_dict().keys() == model.state_dict().keys()
    for training in (False, True):
        results = []
        for module in (model.train(training), gm.train(training)):
            module.zero_grad()
            torch.manual_seed(0)
            output = module(x)
            output.sum().backward()
            results.append([output, *(each.grad for each in module.parameters()), *module.buffers()])
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    quantized = prepare_saq(program, example_inputs=x)
    assert [layer.name for _, layer in layers(quantized)] == ["conv", "head"]
    assert not record_of(quantized).uncounted


class Fixed(Normalized):
    """Two BatchNorms that are frozen, and one with the dropout that follow the mode; one of them runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.other = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.batch = nn.BatchNorm2d(4, track_running_stats=False)

    def train(self, mode: bool = True) -> "Fixed":
        super().train(mode)
        self.frozen.eval()
        self.other.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.other(self.frozen(self.norm(self.conv(x)))))
        return self.head(self.dropout(self.batch(x)).mean((2, 3)))


@pytest.mark.parametrize("decomposed", [False, True])
def test_of_a_program_exported_in_training_only_what_was_in_it_follows_the_mode(decomposed: bool) -> None:
    model, x = Fixed().train(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,))
    program = program.run_decompositions() if decomposed else program
    gm = pickle.loads(pickle.dumps(prepare_saq(program, example_inputs=x, precision=None)))
    for training in (True, False):
        outputs = []
        for module in (model.train(training), gm.train(training)):
            torch.manual_seed(0)
            outputs.append(module(x))
        assert torch.equal(*outputs)
    state = gm.state_dict()
    assert all(torch.equal(state[name], each) for name, each in model.state_dict().items())
    assert state["norm.num_batches_tracked"] == 2
    assert not state["frozen.running_mean"].any()


class Alike(nn.Module):
    """Two BatchNorms whose paths make the same names of nodes, and a convolution by torch's own general function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
        self.a, self.a_1 = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a_1(self.a(x))
        return torch.ops.aten.convolution(x, self.weight, None, [1], [1], [1], False, [0], 1)


def test_counters_and_convolutions_of_an_exported_program() -> None:
    model, x = Alike().train(), torch.randn(2, 3, 8, 8)
    gm = prepare_saq(torch.export.export(model, (x,)), example_inputs=x)
    assert [layer.op for _, layer in layers(gm)] == ["conv2d", "conv2d"]
    for training, count in ((False, 0), (True, 1), (False, 1)):
        gm.train(training)(x)
        state = gm.state_dict()
        assert state["a.1.num_batches_tracked"] == state["a_1.num_batches_tracked"] == count


class Generating(nn.Module):
    """Has a generator that forward leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(3, 3), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def test_a_generator_that_is_not_drawn_from_is_no_reason_to_stay_python() -> None:
    gm = prepare_saq(Generating(), example_inputs=torch.randn(2, 3))
    assert record_of(gm).tracing == "symbolic"


class Apart(nn.Module):
    """What `run_decompositions` takes apart in several ways: all kinds of convolutions and normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, stride=2, groups=1, dilation=2)
        self.up = nn.ConvTranspose1d(4, 4, 3, stride=2, output_padding=1, groups=2)
        self.norm, self.instance = nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)
        self.group, self.head = nn.GroupNorm(2, 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.up(self.conv(x).mean(2)))
        return self.head(self.group(self.instance(y)))


@pytest.mark.parametrize("training", [False, True])
def test_a_decomposed_program_is_quantized_as_the_model(training: bool) -> None:
    model, x = Apart().train(training), torch.randn(1, 3, 8, 12)
    program = torch.export.export(model, (x,)).run_decompositions()
    gm = prepare_saq(program, example_inputs=x, precision=None).train(training)
    assert_close(gm(x), model(x), rtol=1e-6, atol=1e-6)
    assert_close(gm.norm.running_var, model.norm.running_var)
    quantized = prepare_saq(program, example_inputs=x)
    expected = {layer.name: layer.macs for _, layer in layers(prepare_saq(model, example_inputs=x))}
    assert {layer.name: layer.macs for _, layer in layers(quantized)} == expected
    assert list(expected) == ["conv", "up", "head"]


def halve(sizes: list[int], of: int) -> int:
    """Changes its argument, as torchvision's video transformers do."""
    sizes[0] = of // 2
    return sizes[0] + sizes[1]


torch.fx.wrap("halve")


class Mutating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [4, 1]

    def forward(self, x: Tensor) -> Tensor:
        size = halve(self.sizes.copy(), x.shape[-1])
        return x * 2 if size > 3 else x


def test_functions_may_change_their_lists() -> None:
    gm = trace(Mutating(), torch.randn(2, 6))
    for width in (6, 7):
        x = torch.randn(2, width)
        assert torch.equal(gm(x), Mutating()(x))
    with pytest.raises(TracingError, match="another path"):
        gm(torch.randn(2, 2))


@dataclass
class Named:
    logits: Tensor
    hidden: tuple[Tensor, ...] | None = None


@dataclass
class Both(ModelOutput):
    logits: Tensor | None = None
    hidden: tuple[Tensor, ...] | None = None


class Returning(nn.Module):
    """Outputs of a type of its own."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.inner, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: Tensor) -> Any:
        y = self.inner(x)
        return self.kind(logits=y, hidden=(x, y))


@pytest.mark.parametrize("kind", [Named, Both])
def test_outputs_keep_their_type(kind: Any) -> None:
    model, x = Returning(kind), torch.randn(2, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    for each in (
        gm,
        copy.deepcopy(gm),
        pickle.loads(pickle.dumps(gm)),
        torch.compile(gm, backend="eager", fullgraph=True),
    ):
        output: Any = each(x)
        assert type(output) is kind
        assert torch.equal(output.logits, model(x).logits)
        assert torch.equal(output.hidden[0], x)
    if kind is Both:
        assert list(output) == ["logits", "hidden"]
        assert output["logits"] is output.logits is output[0]


def test_a_model_that_imports_the_compiler_does_not_harm_it() -> None:
    script = """
import sys, torch, saq_fx
from torch import nn
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
    def forward(self, x):
        import torch._dynamo
        return self.conv(x)
x = torch.ones(1, 1, 5, 5)
saq_fx.prepare_saq(Model(), example_inputs=x)
compiled = torch.compile(lambda x: x.clamp(min=torch.finfo(x.dtype).min), backend="eager", fullgraph=True)
assert torch.equal(compiled(x), x)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


class Pooling(nn.Module):
    """Sums the nodes of each graph of a batch: tokens say how many graphs there are."""

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        total = x.new_zeros(int(graph.max()) + 1, x.size(1)).index_add_(0, graph, x)
        return total / torch.bincount(graph, minlength=int(graph[-1] + 1)).unsqueeze(1)


def test_numbers_of_tokens_that_are_only_passed_on_are_not_guarded() -> None:
    model = Pooling()
    gm = trace(model, (torch.randn(4, 8), torch.tensor([0, 0, 1, 1])))
    for graph in ([0, 0, 1, 1], [0, 1, 2, 2], [0, 0, 0]):
        inputs = torch.randn(len(graph), 8), torch.tensor(graph)
        assert torch.equal(gm(*inputs), model(*inputs))


SIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "conv1d": lambda x: F.conv1d(x.reshape(1, -1, 8), x.new_ones(x.size(0) * 5, 1, 3), groups=x.size(0) * 5),
    "irfft2": lambda x: torch.fft.irfft2(torch.fft.rfft2(x), s=(x.size(-2), x.size(-1))),
    "reshape": lambda x: torch.reshape(x, (x.shape[0] * x.shape[1], 8)),
    "narrow": lambda x: torch.narrow(x, 1, 0, x.shape[1] - 1),
    "split": lambda x: torch.split(x, x.shape[1] // 2, 1)[0],
    "roll": lambda x: torch.roll(x, (x.shape[1] // 2, 1), (1, 2)),
    "tile": lambda x: torch.tile(x, (x.shape[0], 1, 1)),
    "max": lambda x: F.pad(x, (0, max(x.shape[1:]) - x.size(2), 0, max(x.size(1), 9)))[:, : min([*x.shape, 4])],
    "topk": lambda x: torch.topk(x, x.shape[1] // 2, 1)[0],
}  # fmt: skip


class Calling(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return SIZED[self.name](x)


@pytest.mark.parametrize("name", SIZED)
def test_sizes_that_are_only_passed_on_are_not_guarded(name: str) -> None:
    model = Calling(name)
    gm = trace(model, torch.randn(2, 5, 8))
    for shape in ((2, 5, 8), (3, 5, 8), (1, 5, 8)):
        x = torch.randn(shape)
        assert torch.equal(gm(x), model(x))


class Rolling(nn.Module):
    """Passes a size on, and counts by it."""

    def forward(self, x: Tensor) -> Tensor:
        shift = x.shape[0]
        for _ in range(shift):
            x = torch.roll(x, shift, 0) + 1
        return x


def test_sizes_that_are_counted_by_are_guarded() -> None:
    gm = trace(Rolling(), torch.randn(2, 3))
    x = torch.randn(2, 5)
    assert torch.equal(gm(x), Rolling()(x))
    with pytest.raises(TracingError, match="another path"):
        gm(torch.randn(3, 3))


def test_the_larger_of_two_sizes_is_not_guarded() -> None:
    model = Calling("max")
    gm = trace(model, torch.randn(2, 5, 8))
    for shape in ((2, 5, 8), (5, 11, 8), (1, 3, 8)):
        x = torch.randn(shape)
        assert torch.equal(gm(x), model(x))


class Called(nn.Linear):
    """Does more at a call than its forward; which may not be followed."""

    def __init__(self, in_python: bool) -> None:
        super().__init__(4, 4)
        self.in_python = in_python

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(2 * x) + 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if self.in_python and x.sum() > 1e9 else x)


@pytest.mark.parametrize("in_python", [False, True])
def test_calls_of_a_class_of_its_own(in_python: bool) -> None:
    model, x = nn.Sequential(Called(in_python), nn.Linear(4, 4)), torch.randn(2, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert torch.equal(gm(x), model(x))
    assert {layer.name for _, layer in layers(gm)} == ({"1"} if in_python else {"0", "1"})
    if in_python:
        with pytest.raises(TracingError, match="Called overrides __call__"):
            prepare_saq(model[0], example_inputs=x)
    else:
        assert torch.equal(prepare_saq(model[0], example_inputs=x, precision=None)(x), model[0](x))
