"""What forward does besides its operations: the graph does it too, exactly, or the module's code stays Python."""

import copy
import functools
import pickle
import random
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import prune

from saq_fx.annotation import record_of
from saq_fx.errors import TracingError
from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq
from saq_fx.report import precision_report
from tests.test_prepare import assert_same_function

V = torch.linspace(-1, 1, 80).reshape(2, 5, 8)


class Pair(nn.Module):
    """Two layers, for a forward between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.between(self.a(x)))

    def between(self, h: Tensor) -> Tensor:
        return h


def seeded(seed: int = 0) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def run(module: nn.Module, inputs: tuple[Any, ...], seed: int) -> tuple[Tensor, list[Tensor | None]]:
    module.zero_grad()
    seeded(seed)
    output: Tensor = module(*copy.deepcopy(inputs))
    if output.requires_grad:
        output.float().sin().sum().backward()
    return output.detach(), [each.grad for each in module.parameters()]


def assert_same(model: nn.Module, gm: nn.Module, *inputs: Any, steps: int = 3) -> None:
    """Outputs, gradients and buffers, call after call, in both modes, with and without gradients, under autocast."""
    model, gm = copy.deepcopy(model), copy.deepcopy(gm)
    scopes: list[Callable[[], Any]] = [torch.enable_grad, torch.no_grad]
    scopes.append(lambda: torch.autocast("cpu", torch.bfloat16))
    for step in range(steps):
        for training in (True, False):
            for scope in scopes:
                results = []
                for module in (model.train(training), gm.train(training)):
                    with scope():
                        results.append(run(module, inputs, step))
                (expected, gradients), (actual, others) = results
                assert actual.dtype == expected.dtype
                assert torch.equal(actual, expected)
                for gradient, other in zip(gradients, others, strict=True):
                    assert (gradient is None) == (other is None)
                    assert gradient is None or torch.equal(gradient, other)
                buffers = dict(gm.named_buffers())
                assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
                assert torch.is_grad_enabled()
                assert not torch.is_autocast_enabled("cpu")


def assert_captured(model: nn.Module, way: str, *inputs: Any, names: tuple[str, ...] = ("a", "b")) -> Any:
    """The float graph is the model, also when copied, pickled and compiled; the quantized graph has these layers."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gm: Any = prepare_saq(model, example_inputs=copy.deepcopy(inputs), precision=None)
    assert record_of(gm).tracing == way
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert all(torch.equal(tensor, before[name]) for name, tensor in each.state_dict().items())
        assert_same(model, each, *inputs)
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(gm).eval(), backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seeded()
        actual = compiled(*copy.deepcopy(inputs))
    seeded()
    assert torch.equal(actual, copy.deepcopy(model).eval()(*copy.deepcopy(inputs)))
    quantized = prepare_saq(model, example_inputs=copy.deepcopy(inputs))
    assert {layer.name for _, layer in layers(quantized)} == set(names)
    assert all(torch.equal(quantized.state_dict()[name], tensor) for name, tensor in before.items())
    quantized(*copy.deepcopy(inputs)).sum().backward()
    return gm


class Ruled(Pair):
    """Runs a function, which may keep state in these attributes and buffers."""

    def __init__(self, rule: Callable[[Any, Tensor], Tensor], **state: Any) -> None:
        super().__init__()
        self.rule = rule
        for name, value in state.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def between(self, h: Tensor) -> Tensor:
        return self.rule(self, h)


class Typed(Pair):
    """Asks for types of tensors, numbers and lists."""

    def forward(self, x: Any, scale: Any, more: Any) -> Tensor:
        if isinstance(x, torch.Tensor):
            x = 2 * x
        if not torch.is_tensor(scale):
            scale = torch.tensor([scale], dtype=torch.float32)
        if isinstance(scale, int | float):
            scale = scale * 7
        x = torch.cat(more) + x if isinstance(more, list | tuple) else x
        assert isinstance(x, Tensor)
        assert not isinstance(x, nn.Parameter)
        assert isinstance(self.a.weight, nn.Parameter)
        return self.b(self.a(x) * scale if isinstance(x.shape[0], int) else x)


@pytest.mark.parametrize("scale", [3, torch.tensor([3.0])])
@pytest.mark.parametrize("more", [[V[:1], V[1:]], V])
def test_types_are_those_of_the_example(scale: Any, more: Any) -> None:
    gm = assert_captured(Typed(), "symbolic", V, scale, more)
    with pytest.raises(TracingError, match=r"another path .* did, at Typed, .*test_state\.py:\d+: type is"):
        gm(V, 0.5, more)
    with pytest.raises(TracingError, match="control flow depends on the type of x: pass example_inputs"):
        prepare_saq(Typed())


class Scoped(Pair):
    def __init__(self, scope: Callable[[], Any]) -> None:
        super().__init__()
        self.scope = scope

    def forward(self, x: Tensor) -> Tensor:
        with self.scope():
            h = self.a(x)
        return self.b(h)


class Decorated(Pair):
    @torch.no_grad()
    def teach(self, x: Tensor) -> Tensor:
        return self.a(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) * self.teach(x)


class Asking(Pair):
    def between(self, h: Tensor) -> Tensor:
        return h * 2 if torch.is_grad_enabled() else h


class Filling(Pair):
    """A queue of what was seen."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(2, 5, 8))

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.queue.copy_(h)
        return h + self.queue.mean()


class Averaged(Pair):
    """A momentum encoder, moved by a loop over parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.a).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for mine, own in zip(self.teacher.parameters(), self.a.parameters(), strict=True):
                    mine.data.mul_(0.9).add_(own.data * 0.1)
        with torch.no_grad():
            target = self.teacher(x)
        return self.b(self.a(x)) - target


class Frozen(Pair):
    """A scope around what needs no gradients anyway."""

    def between(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            positions = torch.arange(h.shape[-1], dtype=torch.float32) @ torch.ones(8, 8)
        return h + positions.to(h.device) + h.argmax(-1, keepdim=True)


class Backbone(nn.Module):
    """A backbone, a pair of views and a list under no_grad, and a layer that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5), nn.ReLU(inplace=True))
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
            left, right = features.chunk(2, -1)
            weight = self.a.weight
        return F.linear(torch.cat([right, left], -1), weight, self.a.bias) + self.a(features)


def enabled_without() -> Any:
    return torch.set_grad_enabled(False)


@pytest.mark.parametrize(
    ("model", "way", "names"),
    [
        (Scoped(torch.no_grad), "symbolic", ("a", "b")),
        (Scoped(torch.enable_grad), "by parts", ("a", "b")),
        (Scoped(enabled_without), "by parts", ("a", "b")),
        (Decorated(), "symbolic", ("a", "b")),
        (nn.Sequential(Decorated(), nn.Linear(8, 8)), "symbolic", ("0.a", "0.b", "1")),
        (Asking(), "by parts", ("a", "b")),
        (Filling(), "by parts", ("a", "b")),
        (Averaged(), "by parts", ("a", "b", "teacher")),
        (Frozen(), "symbolic", ("a", "b")),
        (Backbone(), "symbolic", ("a", "a@1", "backbone.0")),
        (nn.utils.spectral_norm(nn.Linear(8, 8)), "symbolic", ("linear",)),
    ],
)
def test_scopes_without_gradients(model: nn.Module, way: str, names: tuple[str, ...]) -> None:
    assert_captured(model, way, V, names=names)


class Gradients(nn.Module):
    """An energy and its force."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (force,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=self.training)
        return force


def test_gradients_in_forward() -> None:
    model = Gradients()
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert record_of(gm).tracing == "by parts"
    for training in (True, False):
        expected, actual = model.train(training)(V), gm.train(training)(V)
        assert torch.equal(actual, expected)


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Split(torch.autograd.Function):
    """Two outputs, a number, and products that no graph sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        return x @ weight, x * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight.t() + gradients[1], None, None


class Functional(Pair):
    def between(self, h: Tensor) -> Tensor:
        left, right = Split.apply(Reverse.apply(h), self.b.weight, 0.5)
        return left + right


def test_backward_of_autograd_functions() -> None:
    gm = assert_captured(Functional(), "symbolic", V)
    reason = "an autograd function of the model's own, whose operations are not seen"
    assert precision_report(gm).uncounted == (("Reverse", reason), ("Split", reason))

    class Local(Reverse):
        pass

    local: Any = prepare_saq(Ruled(lambda self, h: Local.apply(h)), example_inputs=V, precision=None)
    assert record_of(local).tracing == "by parts"
    model = Pair()
    model.load_state_dict(local.state_dict())
    model.between = lambda h: Local.apply(h)  # type: ignore[method-assign]
    assert_same(model, local, V)


REVERSE = Reverse.apply


class Stored(Pair):
    """Functions whose `apply` was taken before: by an attribute, by a module."""

    def __init__(self) -> None:
        super().__init__()
        self.split = Split.apply

    def between(self, h: Tensor) -> Tensor:
        left, right = self.split(REVERSE(h), self.b.weight, 0.5)
        return left + right


def test_autograd_functions_whose_apply_is_stored() -> None:
    gm = assert_captured(Stored(), "symbolic", V)
    assert [name for name, _ in precision_report(gm).uncounted] == ["Reverse", "Split"]
    assert Reverse.forward.__qualname__ == "Reverse.forward"


class Island(Pair):
    """Single precision under whatever the caller runs, as rotary embeddings do, and products inside."""

    def between(self, h: Tensor) -> Tensor:
        with torch.autocast(device_type=h.device.type, enabled=False):
            h = h.float() @ h.float().transpose(1, 2) @ torch.ones(5, 8)
            with torch.amp.autocast("cpu", enabled=False):
                h = h @ self.a.weight
        return h @ self.b.weight


class OneMode(Pair):
    def between(self, h: Tensor) -> Tensor:
        if self.training:
            with torch.autocast("cpu", enabled=False):
                h = h.float() @ torch.ones(8, 8)
        return h


class Narrow(Pair):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.a(x)
        return self.b(h.float())


def test_scopes_without_autocast() -> None:
    model = Island()
    gm = assert_captured(model, "symbolic", V, names=("a", "b", "a@1", "b@1", "matmul", "matmul_1"))
    assert_same(model, torch.fx.GraphModule(gm, copy.deepcopy(gm.graph)), V)
    pruned = copy.deepcopy(gm)
    pruned.graph.eliminate_dead_code()
    pruned.recompile()
    assert_same(model, pruned, V)
    assert_captured(Narrow(), "by parts", V)
    assert_captured(nn.Sequential(OneMode(), nn.Linear(8, 8)), "symbolic", V, names=("0.a", "0.b", "1"))
    assert_captured(Ruled(asking), "by parts", V)


def asking(self: Any, h: Tensor) -> Tensor:
    return h.bfloat16().float() if torch.is_autocast_enabled("cpu") else h


def alias(self: Pair, h: Tensor) -> Tensor:
    other = h
    h += 1
    return h * other


def view(self: Pair, h: Tensor) -> Tensor:
    first = h[:, 0]
    first -= 1
    first *= 2
    h[:, 1] /= 3
    size = h.shape[0]
    size += 1
    return h * size


def decaying(self: Any, h: Tensor) -> Tensor:
    self.factor.mul_(0.5)
    return h * self.factor


def collecting(self: Any, h: Tensor) -> Tensor:
    self.total.add_(h.detach().sum(0))
    return h * self.total


def penalized(self: Any, h: Tensor) -> Tensor:
    return h + sum(each.square().sum() for each in self.parameters())


def seeding(self: Any, h: Tensor) -> Tensor:
    torch.manual_seed(3)
    return h + torch.rand(8)


def setting_back(self: Any, h: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        h = h + torch.rand(8)
    return h + torch.rand(8)


def with_own_generator(self: Any, h: Tensor) -> Tensor:
    return h + torch.rand(8, generator=torch.Generator().manual_seed(1))


def choosing_kernels(self: Any, h: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(h, h, h)


def counting(self: Any, h: Tensor) -> Tensor:
    self.count += 1
    return h / self.count


def averaging(self: Any, h: Tensor) -> Tensor:
    self.mean = 0.9 * self.mean + 0.1 * h.detach().mean((0, 1))
    return h - self.mean


def remembering(self: Any, h: Tensor) -> Tensor:
    both = h if self.memory is None else h + self.memory
    self.memory = h.detach()
    return both


def alternating(self: Any, h: Tensor) -> Tensor:
    self.calls += 1
    return h if self.calls % 2 else -h


def listing(self: Any, h: Tensor) -> Tensor:
    self.history.append(h.detach())
    return h + sum(self.history)


def writing(self: Any, h: Tensor) -> Tensor:
    self.last = h.sum(0)
    self.size = tuple(h.shape)
    self.factor = 3
    return h + self.last * self.factor


def caching(self: Any, h: Tensor) -> Tensor:
    if self.table is None or self.table.shape[0] != h.shape[-1]:
        self.table = torch.arange(h.shape[-1]).float()
    return h + self.table


@pytest.mark.parametrize(
    ("model", "way"),
    [
        (Ruled(alias), "symbolic"),
        (Ruled(decaying, factor=torch.ones(8)), "symbolic"),
        (Ruled(penalized), "by parts"),
        (Ruled(seeding), "by parts"),
        (Ruled(setting_back), "by parts"),
        (Ruled(with_own_generator), "by parts"),
        (Ruled(view), "symbolic"),
        (Ruled(counting, count=torch.zeros(())), "symbolic"),
        (Ruled(averaging, mean=torch.zeros(8)), "by parts"),
        (Ruled(remembering, memory=None), "by parts"),
        (Ruled(alternating, calls=0), "by parts"),
        (Ruled(listing, history=[]), "by parts"),
        (Ruled(writing, last=None), "symbolic"),
        (Ruled(caching, table=None), "symbolic"),
    ],
)
def test_state(model: nn.Module, way: str) -> None:
    assert_captured(model, way, V)


def test_tensors_in_plain_attributes() -> None:
    for rule in (decaying, collecting):
        model = Ruled(rule)
        model.factor, model.total = torch.ones(8), torch.zeros(5, 8)  # type: ignore[assignment]
        gm = prepare_saq(model, example_inputs=V, precision=None)
        assert torch.equal(model.total, torch.zeros(5, 8))
        for _ in range(3):
            assert torch.equal(gm(V), model(V))


def drawing(self: Any, h: Tensor) -> Tensor:
    return h if random.random() < 0.5 else -h


def drawing_numpy(self: Any, h: Tensor) -> Tensor:
    return h * float(np.random.rand())


def drawing_torch(self: Any, h: Tensor) -> Tensor:
    return h if torch.rand(()) < 0.5 else -h


@pytest.mark.parametrize("draw", [drawing, drawing_numpy, drawing_torch])
def test_chance_steers_python(draw: Callable[..., Any]) -> None:
    before = random.getstate()
    prepare_saq(Ruled(draw), example_inputs=V)
    assert random.getstate() == before
    assert_captured(Ruled(draw), "by parts", V)


def test_kernels_of_attention_that_forward_chooses() -> None:
    model = Ruled(choosing_kernels)
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert record_of(gm).tracing == "by parts"
    assert_same_function(model, gm, V)


def drawing_from(self: Any, h: Tensor) -> Tensor:
    return h + torch.rand(8, generator=self.source)


def choosing_by(self: Any, h: Tensor) -> Tensor:
    return h if self.source.random() < 0.5 else -h


@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (drawing_from, lambda: torch.Generator().manual_seed(1)),
        (choosing_by, lambda: random.Random(1)),
        (choosing_by, lambda: np.random.RandomState(1)),
        (choosing_by, lambda: np.random.default_rng(1)),
    ],
)
def test_generators_of_the_model_s_own(rule: Any, make: Callable[[], Any]) -> None:
    model, untouched = Ruled(rule, source=make()), Ruled(rule, source=make())
    untouched.load_state_dict(model.state_dict())
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert record_of(gm).tracing == "by parts"
    for _ in range(4):
        outputs = [each(V) for each in (untouched, model, gm)]
        assert torch.equal(outputs[1], outputs[0])
        assert torch.equal(outputs[2], outputs[0])


class Unmoving(nn.Module):
    """A BatchNorm that stays as it is, and a part that is not told of modes at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.part = nn.Linear(8, 8), nn.BatchNorm1d(5), Dropping().eval()
        self.part.train = lambda mode=True: self.part  # type: ignore[method-assign]
        self.b = nn.Linear(8, 8)

    def train(self, mode: bool = True) -> "Unmoving":
        super().train(mode)
        self.norm.eval()
        self.a.requires_grad_(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.part(self.norm(self.a(x))))


class Dropping(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.5, self.training)
        return -x if self.training else x


@pytest.mark.parametrize("steered", [False, True])
def test_an_overridden_train_is_followed(steered: bool) -> None:
    model = Unmoving()
    if steered:
        model.a = nn.Sequential(nn.Linear(8, 8), Dropping())  # type: ignore[assignment]
    gm: Any = prepare_saq(model, example_inputs=V, precision=None)
    assert all(each.requires_grad for each in gm.parameters())
    for each in (gm, copy.deepcopy(gm), prepare_saq(model, example_inputs=V)):
        assert not each.train().norm.training
        assert each.training
        assert not each.eval().norm.training
    for parameter in gm.a.parameters():
        parameter.requires_grad_(False)
    model.train()
    for training in (True, False):
        (expected, gradients), (actual, others) = (run(each.train(training), (V,), 0) for each in (model, gm))
        assert torch.equal(expected, actual)
        assert all(one is other or torch.equal(one, other) for one, other in zip(gradients, others, strict=True))
        assert torch.equal(model.norm.running_mean, gm.norm.running_mean)


def with_defaults(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("flag", True)
        return forward(self, *args, **kwargs)

    return call


class Defaulting(Pair):
    @with_defaults
    def forward(self, x: Tensor, scale: float = 1.5, flag: bool | None = None) -> Tensor:
        return self.b(self.a(x) * scale) if flag else self.a(x)


class DefaultingPython(Defaulting):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    @with_defaults
    def forward(self, x: Tensor, scale: float = 1.5, flag: bool | None = None) -> Tensor:
        self.calls += 1
        return self.b(self.a(x) * scale) if flag else self.a(x)


@pytest.mark.parametrize("kind", [Defaulting, DefaultingPython])
@pytest.mark.parametrize("example", [(V,), {"x": V}, (V, 2.0), {"scale": 2.0, "x": V}])
def test_decorators_set_what_is_not_passed(kind: type[Pair], example: Any) -> None:
    model = kind()
    gm: Any = prepare_saq(model, example_inputs=example, precision=None)
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))
    assert torch.equal(gm(V, *args[1:]) if args else gm(**kwargs), model(*args, **kwargs))


@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.(weight|spectral)_norm.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*is deprecated in favor of.*:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_old_normalizations_after_training(norm: Callable[[nn.Module], nn.Module]) -> None:
    model, fresh, reference = Pair(), Pair(), Pair()
    for each in (model, fresh, reference):
        norm(each.a)
        each.load_state_dict(model.state_dict())
    gm = prepare_saq(fresh, example_inputs=V, precision=None)
    model(V).sum().backward()
    trained = prepare_saq(model, example_inputs=V, precision=None)
    trained.load_state_dict(gm.state_dict())
    for each in (gm, trained):
        reference.load_state_dict(fresh.state_dict())
        for training in (True, False, True):
            (expected, gradients), (actual, others) = (run(m.train(training), (V,), 0) for m in (reference, each))
            assert torch.equal(expected, actual)
            assert all(torch.equal(*pair) for pair in zip(gradients, others, strict=True))  # type: ignore[arg-type]


def test_models_in_other_states() -> None:
    lazy = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(TracingError, match=r"^module '1' of Sequential is lazy and has no weights yet: run the model"):
        prepare_saq(lazy, example_inputs=V)
    model = Pair()
    gm = prepare_saq(torch.compile(model, backend="eager"), example_inputs=V, precision=None)  # type: ignore[arg-type]
    assert list(gm.state_dict()) == list(model.state_dict())
    assert torch.equal(gm(V), model(V))
    with torch.inference_mode():
        gm = prepare_saq(model, example_inputs=V.clone())
    gm(V).sum().backward()
    assert all(each.grad is not None for each in gm.parameters())


class Compiled(Pair):
    """Has a compiled part, known by two names; `asks` keeps it Python."""

    def __init__(self, asks: bool) -> None:
        super().__init__()
        self.a = torch.compile(nn.Linear(8, 8), backend="eager")  # type: ignore[assignment]
        self.known, self.asks = [self.a], asks

    def between(self, h: Tensor) -> Tensor:
        h = self.known[0](h) + self.a.weight.sum()
        return h * 2 if self.asks and h.sum() > 1e9 else h


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize("asks", [False, True])
def test_compiled_parts_are_as_if_they_were_not(asks: bool) -> None:
    model = Compiled(asks)
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert gm.state_dict().keys() == model.state_dict().keys()
    for each in (gm, copy.deepcopy(gm), pickle.loads(pickle.dumps(gm))):
        assert_same_function(model, each, V)
    quantized = prepare_saq(model, example_inputs=V)
    assert {layer.weight for _, layer in layers(quantized)} == {"a._orig_mod.weight", "b.weight"}


def test_pruned_models() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert_same_function(model, gm, V)
    assert torch.equal(copy.deepcopy(gm)(V), gm(V))
    assert {layer.name for _, layer in layers(gm)} == {"0", "2"}


class Merging(nn.Linear):
    """A low-rank addition to a weight, put into it by `eval()`, as LoRA's layers do."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.low = nn.Parameter(torch.randn(2, 8))
        self.merged = False

    def train(self, mode: bool = True) -> "Merging":
        super().train(mode)
        if mode == self.merged:
            sign = -1 if mode else 1
            self.weight.data += sign * self.low.T @ self.low
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.low.T @ self.low


def test_a_train_that_changes_weights_leaves_the_prepared_ones_alone() -> None:
    model = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(8, 8))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    gm = prepare_saq(model, example_inputs=V, precision=None)
    for each in (model, gm):
        assert all(torch.equal(value, state[name]) for name, value in each.state_dict().items())
    assert torch.equal(gm(V), model(V))
    assert torch.allclose(gm.eval()(V), model.eval()(V), atol=1e-5)


class InstallsHook(nn.Module):
    """Gives a layer a hook at its first call, and goes on by values that it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.is_installed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_installed:
            self.first.register_forward_hook(lambda module, args, output: output * 2)
            self.is_installed = True
        x = self.first(x)
        return self.second(x) if x.sum() > -1e9 else x


def test_hooks_that_untraceable_code_installs_are_installed_once() -> None:
    model, x = InstallsHook(), torch.randn(2, 4)
    gm = prepare_saq(model, example_inputs=x, precision=None)
    assert not model.is_installed
    assert record_of(gm).tracing == "by parts"
    for _ in range(2):
        assert torch.equal(gm(x), model(x))


class Memory:
    """A state that is no module."""

    def __init__(self) -> None:
        self.last: Any = None

    def update(self, h: Tensor) -> Tensor:
        self.last, last = h.detach().mean(), self.last
        return h if last is None else h + last


def in_an_object(model: Any, h: Tensor) -> Tensor:
    return model.memory.update(h)


def in_a_queue(model: Any, h: Tensor) -> Tensor:
    model.queue.append(h.detach().mean())
    return h + sum(model.queue)


def in_a_nested_list(model: Any, h: Tensor) -> Tensor:
    model.table["means"].append(h.detach().mean())
    return h * len(model.table["means"])


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        (in_an_object, lambda: {"memory": Memory()}),
        (in_a_queue, lambda: {"queue": deque(maxlen=2)}),
        (in_a_nested_list, lambda: {"table": {"means": []}}),
    ],
)
def test_state_in_objects_and_containers(rule: Callable[[Any, Tensor], Tensor], state: Callable[[], Any]) -> None:
    assert_captured(Ruled(rule, **state()), "by parts", V)


def for_positions(model: Any, h: Tensor) -> Tensor:
    if model.cache.last is None or len(model.cache.last) != h.shape[1]:
        model.cache.last = torch.arange(h.shape[1], dtype=h.dtype)
    return h + model.cache.last[:, None]


def test_a_cache_of_sizes_in_an_object_is_none() -> None:
    model = Ruled(for_positions, cache=Memory())
    assert_same(model, assert_captured(model, "symbolic", V), V[:, :3])


class Told(nn.Module):
    """Python code that reads what others set for it."""

    def __init__(self, memory: Memory | None) -> None:
        super().__init__()
        self.inner, self.memory, self.scale = nn.Linear(8, 8), memory, 1.0

    def forward(self, h: Tensor) -> Tensor:
        h = self.inner(h) if h.mean() > -100 else h
        return h * self.scale if self.memory is None else h * self.memory.last


class Telling(Pair):
    """Sets an attribute of another module, or of an object that it knows."""

    def __init__(self, memory: Memory | None = None) -> None:
        super().__init__()
        self.told = Told(memory)

    def between(self, h: Tensor) -> Tensor:
        if self.told.memory is None:
            self.told.scale = h.mean()
        else:
            self.told.memory.last = h.mean()
        return self.told(h)


@pytest.mark.parametrize("memory", [None, Memory()])
def test_what_is_set_for_python_code_is_set_at_every_call(memory: Memory | None) -> None:
    torch.manual_seed(0)
    gm = prepare_saq(Telling(memory), example_inputs=V, precision=None)
    torch.manual_seed(0)
    model = Telling(memory)
    for x in (V, 2 * V, V[:1]):
        assert torch.equal(gm(x), model(x))


class Initialized(Pair):
    """Its first batch sets its scale, as of ActNorm; in a buffer it remembers that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("done", torch.tensor(0, dtype=torch.uint8))

    def between(self, h: Tensor) -> Tensor:
        if self.done.item() == 0:
            self.scale.data.copy_(1 / h.detach().std((0, 1)))
            self.done.fill_(1)
        return h * self.scale


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.Sequential(model, nn.Linear(8, 8))])
def test_paths_that_a_buffer_decides_which_forward_changes_stay_python(wrap: Callable[..., nn.Module]) -> None:
    model = wrap(Initialized())
    gm = prepare_saq(model, example_inputs=V, precision=None)
    assert all(torch.equal(gm.state_dict()[name], value) for name, value in model.state_dict().items())
    assert_same(model, gm, V)
    assert record_of(gm).tracing == "by parts"
    assert len(list(layers(gm))) == sum(isinstance(each, nn.Linear) for each in model.modules())
