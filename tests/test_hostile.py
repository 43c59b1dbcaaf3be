"""Models that are hard to capture: each is prepared right, or refused with a message that says what to do."""

import copy
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from saq_fx.annotation import record_of
from saq_fx.checkpoint import load, save
from saq_fx.errors import SaqError, TracingError
from saq_fx.graph import graphs, layers
from saq_fx.prepare import apply_policy, calibrate, prepare_saq
from saq_fx.report import precision_report
from saq_fx.search import search_precision
from saq_fx.training import SAQ


class Gate(nn.Module):
    """Values choose between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.wide = nn.Conv2d(4, 4, 3)
        self.narrow = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.wide(x) if x.mean() > 0.7 else self.narrow(x)
        return self.head(x.mean((2, 3)))


class Iterated(nn.Module):
    """Values say how often a convolution runs; a traced block comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU())
        self.loop = nn.ModuleDict({"conv": nn.Conv2d(3, 3, 3, padding=1)})
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        while x.norm() > 4:
            x = self.loop["conv"](x) * 0.7
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Writes into slices of activations, and of tensors that it makes itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y[:, 0] = 0.5
        y[:, 1:3].mul_(2)
        z = self.second(F.relu(y, inplace=True))
        z += y
        total = torch.zeros(x.shape[0], 4)
        total.add_(z.mean((2, 3)))
        rows = torch.zeros(2, 4)
        rows[0] = total[0]
        return self.head(total + rows.sum(0))


class Hooked(nn.Module):
    """Hooks that change inputs and outputs, of a layer and of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3)
        self.head = nn.Linear(4, 2)
        self.first.register_forward_hook(lambda module, args, output: output * 2)
        self.second.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        self.register_forward_hook(lambda module, args, output: output - 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(torch.relu(self.first(x))).mean((2, 3)))


class Parametrized(nn.Module):
    """Weights behind spectral and weight normalization, and an orthogonal one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
        self.second = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.third = parametrizations.orthogonal(nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.second(torch.relu(self.first(x))).mean((2, 3))))


class Checkpointed(nn.Module):
    """A block is run again in backward, BatchNorm and dropout with it."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.stem = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=self.use_reentrant)
        return self.head(x.mean((2, 3)))


class Generated(nn.Module):
    """Weights made in forward: from activations, constant, and random."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.generator = nn.Linear(4, 4 * 4 * 9)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        weight = self.generator(x.mean((0, 2, 3))).view(4, 4, 3, 3)
        x = F.conv2d(x, weight) + F.conv2d(x, torch.ones(4, 4, 3, 3) / 9) + F.conv2d(x, torch.randn(4, 4, 3, 3))
        return self.head(x.mean((2, 3)))


class PassedOn(nn.Module):
    """A wrapper that passes on whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Iterated()

    def forward(self, *args: Tensor, **options: Tensor) -> Tensor:
        return self.inner(*args, **options)


class Pyramid(nn.Module):
    """A head that asks for the parity of sizes is shared by levels of both; a method is called, not a module."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(x, (0, 1)) if x.shape[-1] % 2 else x
            return self.conv(x)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 2.0
            self.convs = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 2)])

        def levels(self, x: Tensor) -> list[Tensor]:
            first = torch.relu(self.convs[0](x)) * self.scale
            return [first, self.convs[1](first)]

    def __init__(self) -> None:
        super().__init__()
        self.body = Pyramid.Body()
        self.head = Pyramid.Head()

    def forward(self, x: Tensor) -> Tensor:
        results = [self.head(level) for level in self.body.levels(x)]
        kept = torch.cat([each[each > 0] for each in results])
        return kept if len(kept) > 10 else kept * 2


CAPTURED: dict[str, tuple[Callable[[], nn.Module], str, set[str]]] = {
    "gate": (Gate, "by parts", {"stem", "wide", "narrow", "head"}),
    "iterated": (Iterated, "by parts", {"stem.0", "loop.conv", "head"}),
    "in_place": (InPlace, "symbolic", {"first", "second", "head"}),
    "hooked": (Hooked, "symbolic", {"first", "second", "head"}),
    "parametrized": (Parametrized, "symbolic", {"first", "second", "third", "head"}),
    "checkpointed": (lambda: Checkpointed(False), "by parts", {"stem", "block.0", "head"}),
    "reentrant": (lambda: Checkpointed(True), "by parts", {"stem", "block.0", "head"}),
    "generated": (Generated, "symbolic", {"stem", "generator", "conv2d", "conv2d_1", "conv2d_2", "head"}),
    "passed_on": (PassedOn, "by parts", {"inner.stem.0", "inner.loop.conv", "inner.head"}),
    "pyramid": (Pyramid, "by parts", {"body.convs.0", "body.convs.1", "head.conv"}),
}


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    module.zero_grad()
    torch.manual_seed(1)
    output = module(x)
    output.square().sum().backward()
    return output, {name: each.grad for name, each in module.named_parameters() if each.grad is not None}


def assert_same(model: nn.Module, gm: nn.Module, x: Tensor) -> None:
    (expected, gradients), (actual, others) = run(model, x), run(gm, x)
    assert torch.equal(actual, expected)
    assert others.keys() == gradients.keys()
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())
    buffers = dict(gm.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())


# A reentrant checkpoint warns wherever no gradients are wanted.
no_gradients = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")


@no_gradients
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CAPTURED),
        # The others make float32 tensors themselves.
        *((name, torch.float16) for name in ("gate", "iterated", "hooked", "checkpointed", "pyramid")),
    ],
)
def test_float_graph_is_the_model_on_other_paths_too(name: str, dtype: torch.dtype) -> None:
    make, way, names = CAPTURED[name]
    model, x = make().to(dtype), torch.randn(2, 3, 8, 8).to(dtype)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert record_of(gm).tracing == way
    assert {layer.name for _, layer in layers(gm)} == names
    assert gm.state_dict().keys() == model.state_dict().keys()
    for inputs in (x, -3 * x, torch.randn(3, 3, 10, 9).to(dtype)):
        for training in (False, True):
            assert_same(model.train(training), gm.train(training), inputs)


@no_gradients
@pytest.mark.parametrize("name", CAPTURED)
def test_all_of_it_is_quantized_trained_and_copied(name: str) -> None:
    make, _, names = CAPTURED[name]
    model, x = make(), torch.randn(2, 3, 8, 8)
    gm = prepare_saq(model, example_inputs=x)
    report = precision_report(gm)
    # What parametrizations multiply to make a weight stays in float.
    assert report.quantized_share == report.total_macs / (report.total_macs + report.uncounted_macs)
    assert all(".parametrizations." in each for each, _ in report.uncounted)
    assert bool(report.uncounted) == (name == "parametrized")
    assert {row.name for row in report.rows} == names
    assert set(model.state_dict()) < set(gm.state_dict())
    gm.load_state_dict(model.state_dict())
    optimizer = SAQ(gm.train(), torch.optim.SGD(gm.parameters(), 0.01), period=2)
    for _ in range(4):
        assert torch.isfinite(optimizer.step(lambda: gm(x).square().sum()))
    copied = copy.deepcopy(gm).eval()
    copied.load_state_dict(gm.state_dict())
    torch.manual_seed(0)
    expected = gm.eval()(x)
    torch.manual_seed(0)
    assert torch.equal(copied(x), expected)
    apply_policy(copied, "W2A2")
    assert all(layer.pinned or str(layer.precision) == "W2A2" for _, layer in layers(copied))
    assert all(layer.pinned or str(layer.precision) == "W4A4" for _, layer in layers(gm))


@no_gradients
@pytest.mark.parametrize("name", ["gate", "pyramid", "checkpointed"])
def test_parts_are_searched_saved_and_pickled(name: str, tmp_path: Path) -> None:
    model, x = CAPTURED[name][0](), torch.randn(2, 3, 8, 8)
    gm = prepare_saq(model, example_inputs=x)
    batches = [(torch.randn(2, 3, 8, 8), torch.zeros(2)) for _ in range(2)]
    found = search_precision(gm, batches, lambda output, _: output.square().mean(), budget="0.95xW8A8")
    assert list(found.policy) == [layer.name for _, layer in layers(gm)]
    apply_policy(gm, found.policy)
    calibrate(gm, [x])
    save(gm, tmp_path / "model.safetensors")
    loaded = load(model, tmp_path / "model.safetensors", example_inputs=x)
    expected = gm.eval()(x)
    assert torch.equal(loaded.eval()(x), expected)
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    pickled = torch.load(buffer, weights_only=False)
    assert torch.equal(pickled(x), expected)
    assert [layer for _, layer in layers(pickled)] == [layer for _, layer in layers(gm)]


def test_parts_know_their_place() -> None:
    gm = prepare_saq(Gate(), example_inputs=torch.randn(2, 3, 8, 8))
    found = {layer.name: (layer.position, layer.macs, str(layer.precision)) for _, layer in layers(gm)}
    assert found == {
        "stem": ("first", 4 * 36 * 27, "W8A8"),
        "wide": (None, 0, "W4A4"),  # the example does not reach it
        "narrow": (None, 4 * 36 * 4, "W4A4"),
        "head": ("last", 8, "W8A8"),
    }
    first = next(layer for _, layer in layers(gm))
    assert first.reads_network_input
    assert [path for path, _ in graphs(gm)] == ["", "stem", "wide", "narrow", "head"]


def test_macs_of_a_shared_part_are_those_of_all_its_calls() -> None:
    gm = prepare_saq(Pyramid(), example_inputs=torch.randn(1, 3, 8, 8))
    macs = {layer.name: layer.macs for _, layer in layers(gm)}
    assert macs["head.conv"] == 4 * 4 * 9 * (6 * 6 + 5 * 6)


class Inner(nn.Module):
    """Multiplies by itself, and then asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.conv(x).mean((2, 3)), self.weight)
        return y * 2 if y.mean() > 0 else y


def test_what_python_code_multiplies_itself_is_quantized() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 3, 3), Inner()), torch.randn(2, 3, 9, 9)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same(model, gm, x)
    report = precision_report(gm)
    assert [(row.name, row.macs) for row in report.rows] == [
        ("0", 7 * 7 * 81),
        ("1.conv", 5 * 5 * 108),
        ("1", 8),
    ]
    assert report.uncounted == ()


def test_backward_hooks_still_run() -> None:
    model, x = (
        nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2)),
        torch.randn(3, 4),
    )
    for hooked in (model[1], model[2]):
        hooked.register_full_backward_hook(lambda module, inward, outward: (inward[0] * 0.5,))
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert_same(model, gm, x)
    report = precision_report(gm)
    assert [row.name for row in report.rows] == ["0", "1.0", "2"]
    assert report.uncounted == ()


class Bare(nn.Module):
    """Multiplies where no call is routed: in what backward runs again."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(lambda value: F.linear(value, self.weight), x.mean((2, 3)), use_reentrant=False)
        return y


class Building(nn.Module):
    """Makes a layer when it runs first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.net: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).mean((2, 3))
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(x.shape[1], 5), nn.ReLU())
        return self.net(x)


def test_layers_that_are_made_when_a_model_runs_first() -> None:
    model, x = Building(), torch.randn(2, 3, 8, 8)
    with pytest.raises(TracingError, match=r"^Building creates module 'net' when it runs first: run it once before"):
        prepare_saq(model, example_inputs=x)
    assert model.net is None
    model(x)
    assert_same(model, prepare_saq(model, example_inputs=x, precision=None), x)


def test_refusals_say_what_to_do() -> None:
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(TracingError) as error:
        prepare_saq(Bare(), example_inputs=x)
    assert re.fullmatch(
        r"Bare cannot be traced symbolically: module 'the model itself', .*test_hostile\.py:\d+ "
        r"`y: Tensor = checkpoint\(.*`: torch\.utils\.checkpoint runs its function a second time, which "
        r"no graph does\. Nor can it be captured by parts, since this code itself multiplies tensors \(linear\): put "
        r"these operations into modules of their own",
        str(error.value),
    )
    with pytest.raises(TracingError, match=r"control flow depends on the value of gt: pass example_inputs"):
        prepare_saq(Gate())
    wrapped = nn.DataParallel(Gate())
    with pytest.raises(
        TracingError, match=r"^the model is wrapped in DataParallel: prepare its \.module, and wrap the result$"
    ):
        prepare_saq(wrapped, example_inputs=x)
    with pytest.raises(SaqError, match=r"^parameter first\.weight is on the meta device and has no values"):
        prepare_saq(InPlace().to("meta"), example_inputs=x.to("meta"))


def test_a_model_in_ddp_is_refused(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(Gate())
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(TracingError, match=r"^the model is wrapped in DistributedDataParallel: prepare its \.module"):
        prepare_saq(wrapped, example_inputs=torch.randn(2, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:.torch.jit.*:FutureWarning", "ignore:.torch.jit.*:DeprecationWarning")
def test_a_scripted_part_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())))
    with pytest.raises(
        TracingError, match=r"^module '1' of Sequential is scripted, .*: prepare the model with the module that it was"
    ):
        prepare_saq(model, example_inputs=torch.randn(2, 3, 8, 8))
    with pytest.raises(TracingError, match=r"^module 'the model itself' of RecursiveScriptModule is scripted"):
        prepare_saq(model[1], example_inputs=torch.randn(2, 3, 8, 8))


def test_costs_of_a_model_without_values() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 2)).to("meta")
    gm = prepare_saq(model, example_inputs=torch.randn(1, 3, 8, 8, device="meta"), precision=None)
    assert precision_report(gm).total_macs == 4 * 36 * 27 + 288


class Trying(nn.Module):
    """Tries what real tensors refuse."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        try:
            x = x["hidden"]  # type: ignore[call-overload]
        except (TypeError, IndexError):
            x = x.relu()
        return self.second(x)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(model, nn.Linear(2, 2))])
def test_a_graph_that_does_not_run_where_the_model_does_is_captured_by_parts(wrap: Callable[..., nn.Module]) -> None:
    model, x = wrap(Trying()), torch.randn(3, 4)
    for each in (prepare_saq(model, example_inputs=x, precision=None), prepare_saq(model, example_inputs=x)):
        assert record_of(each).tracing == "by parts"
        assert len(list(layers(each))) == sum(isinstance(layer, nn.Linear) for layer in model.modules())
        assert precision_report(each).uncounted == ()
    assert_same(model, prepare_saq(model, example_inputs=x, precision=None), x)


def test_what_is_quantized_already_is_not_quantized_again() -> None:
    block = prepare_saq(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), example_inputs=torch.randn(1, 3, 6, 6))
    with pytest.raises(TracingError, match=r"module '0' of Sequential is quantized already: prepare the model with"):
        prepare_saq(nn.Sequential(block, nn.Flatten(), nn.Linear(64, 2)))
    with pytest.raises(SaqError, match="quantized already: use apply_policy"):
        prepare_saq(block)
