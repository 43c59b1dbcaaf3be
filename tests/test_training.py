"""SAQ's steps against a float64 reference written from the equations, and its manners as an optimizer."""

import copy
import io
import math
import warnings
from collections.abc import Callable, Collection
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import functional as F

from saq_fx.errors import CheckpointError, TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.parameters import parameter_groups, parameter_kinds
from saq_fx.pass_base import Pipeline
from saq_fx.passes.insert_perturbations import RemovePerturbations
from saq_fx.prepare import prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.sharpness import Perturbation
from saq_fx.training import SAQ

Values = dict[str, Tensor]
BITS = 3
RHO, BETA = 0.2, 0.7
GRADIENT_DESCENT = partial(torch.optim.SGD, lr=1.0)


class Network(nn.Module):
    """Convolutions, depthwise too, BatchNorm, LayerNorm, attention whose query and key share a weight, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, bias=False)
        self.norm_tokens = nn.LayerNorm(6)
        self.query, self.key, self.value = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.key.weight = self.query.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.norm(self.stem(x)).relu()).relu()
        x = self.norm_tokens(self.conv(x).flatten(2).transpose(1, 2))
        scores: Tensor = self.query(x) @ self.key(x).transpose(1, 2)
        x = x + scores.softmax(-1) @ self.value(x)
        return self.head(x.mean(1))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 1, 7, 7, dtype=torch.float64), torch.randint(3, (6,))


def loss_of(logits: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
    """So small that steps of learning rate 1 keep clipping levels positive."""
    return 0.05 * F.cross_entropy(logits, y, reduction=reduction)


def prepared(precision: str | None = f"W{BITS}A{BITS}") -> SaqGraphModule:
    recipe = Recipe(scheme="clip", normalize_weights=False, first_last=None)
    return prepare_saq(Network().double(), example_inputs=batch()[0], precision=precision, recipe=recipe)


def run(gm: nn.Module, opt: SAQ, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    return [float(opt.step(lambda x=x, y=y: loss_of(gm(x), y))) for x, y in data]  # type: ignore[misc]


def sgd(gm: nn.Module, lr: float = 1.0, **options: Any) -> SAQ:
    return SAQ(gm, torch.optim.SGD(gm.parameters(), lr), RHO, beta=BETA, **options)


# The reference: the step of SAQ (Eq. 10-15, Algorithm 1) in float64, with quantizers and gradients of its own.


def round_ste(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def quantize_weight(weight: Tensor, level: Tensor) -> Tensor:
    n = 2**BITS - 1
    return level * (2 * round_ste((torch.clamp(weight / level, -1, 1) + 1) / 2 * n) / n - 1)


def quantize_unsigned(x: Tensor, level: Tensor) -> Tensor:
    n = 2**BITS - 1
    return level * round_ste(torch.clamp(x / level, 0, 1) * n) / n


def quantize_signed(x: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    low, high = -(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1
    factor = 1 / math.sqrt(x.numel() * high)
    step, offset = (p * factor + (p * (1 - factor)).detach() for p in (step, offset))
    return round_ste(torch.clamp((x - offset) / step, low, high)) * step + offset


class Reference:
    """`Network` in functional form, and the steps of SAQ on it with SGD of learning rate 1, or another optimizer."""

    def __init__(
        self,
        gm: SaqGraphModule,
        case: int = 3,
        losses: str = "both",
        period: int = 1,
        perturb: Collection[str] = ("bias", "norm"),
        frozen: Collection[str] = (),
        optimizer: Callable[..., torch.optim.Optimizer] = GRADIENT_DESCENT,
        adaptive: bool = False,
    ) -> None:
        self.values: Values = {name: p.detach().clone().requires_grad_() for name, p in gm.named_parameters()}
        self.case, self.losses, self.period, self.adaptive = case, losses, period, adaptive
        self.trained = [name for name in self.values if name not in frozen]
        kinds = {name: self.kind(name) for name in self.trained}
        self.weights = [name for name, kind in kinds.items() if kind == "weight"]
        self.others = [name for name, kind in kinds.items() if kind in perturb]
        self.quantized: Values = {}
        self.optimizer = optimizer([self.values[name] for name in self.trained])
        self.steps = 0
        self.g_v: list[Tensor] | None = None

    @staticmethod
    def kind(name: str) -> str:
        if "quantizer" in name:
            return "clipping"
        if name.startswith("norm"):
            return "norm"
        return "bias" if name.endswith("bias") else "weight"

    def loss(self, data: tuple[Tensor, Tensor], delta: Values | None = None, reduction: str = "mean") -> Tensor:
        delta = delta or {}
        v = {name: p + delta[name] if name in self.others and delta else p for name, p in self.values.items()}
        self.quantized = {}

        def weight(layer: str) -> Tensor:
            layer = "query" if layer == "key" else layer  # tied
            name = f"{layer}.weight"
            level = v[f"{layer}.weight_quantizer.clipping_level"]
            shift = delta.get(name, torch.zeros_like(v[name]))
            if self.case == 2:
                return quantize_weight(v[name] + shift, level)
            if name not in self.quantized:
                self.quantized[name] = quantize_weight(v[name], level)
            return self.quantized[name] + shift

        def signed(x: Tensor, quantizer: str) -> Tensor:
            return quantize_signed(x, v[f"{quantizer}.step"], v[f"{quantizer}.offset"])

        def linear(x: Tensor, layer: str) -> Tensor:
            quantizer = "query.input_quantizer_1" if layer == "key" else f"{layer}.input_quantizer"
            return F.linear(signed(x, quantizer), weight(layer), v[f"{layer}.bias"])

        x, y = data
        x = F.conv2d(x, weight("stem"), v["stem.bias"], padding=1)
        x = F.batch_norm(x, None, None, v["norm.weight"], v["norm.bias"], training=True).relu()
        x = quantize_unsigned(x, v["depthwise.input_quantizer.clipping_level"])
        x = F.conv2d(x, weight("depthwise"), v["depthwise.bias"], padding=1, groups=4).relu()
        x = quantize_unsigned(x, v["conv.input_quantizer.clipping_level"])
        x = F.conv2d(x, weight("conv"), stride=2).flatten(2).transpose(1, 2)
        x = F.layer_norm(x, (6,), v["norm_tokens.weight"], v["norm_tokens.bias"])
        q, k, value = (linear(x, layer) for layer in ("query", "key", "value"))
        scores = signed(q, "matmul.input_quantizer") @ signed(k.transpose(1, 2), "matmul.other_quantizer")
        probabilities = quantize_unsigned(scores.softmax(-1), v["matmul_1.input_quantizer.clipping_level"])
        x = x + probabilities @ signed(value, "matmul_1.other_quantizer")
        return loss_of(linear(x.mean(1), "head"), y, reduction)

    def gradients(self, data: tuple[Tensor, Tensor], delta: Values | None = None) -> list[Tensor]:
        values = [self.values[name] for name in self.trained]
        return list(torch.autograd.grad(self.loss(data, delta), values))

    def perturbation(self, data: tuple[Tensor, Tensor]) -> Values:
        loss = self.loss(data)
        weights = self.quantized if self.case == 3 else self.values
        sources = [weights[name] for name in self.weights] + [self.values[name] for name in self.others]
        gradients = torch.autograd.grad(loss, sources)
        size = [value.detach().abs() if self.adaptive else torch.ones_like(value) for value in sources]
        norm = flat([t * g for t, g in zip(size, gradients, strict=True)]).norm()
        names = self.weights + self.others
        return {name: RHO * t**2 * g / norm for name, t, g in zip(names, size, gradients, strict=True)}

    def perturbed_gradients(
        self, parts: Collection[tuple[Tensor, Tensor]], fraction: float = 1.0, hardest: bool = False
    ) -> list[Tensor]:
        """The mean over parts of equal size, each perturbed by its own gradient, of g_s on some of its samples."""
        each = []
        for x, y in parts:
            order = (-self.loss((x, y), reduction="none")).argsort() if hardest else torch.arange(len(x))
            some = order[: math.ceil(fraction * len(x))]
            each.append(self.gradients((x[some], y[some]), self.perturbation((x, y))))
        return mean_gradients(each)

    def step(
        self, data: tuple[Tensor, Tensor], chunk: int | None = None, fraction: float = 1.0, hardest: bool = False
    ) -> None:
        self.steps += 1
        x, y = data
        parts = list(zip(x.split(chunk or len(x)), y.split(chunk or len(x)), strict=True))
        g = mean_gradients([self.gradients(part) for part in parts])
        if self.steps % self.period == 0:
            g_s = self.perturbed_gradients(parts, fraction, hardest)
            share = (flat(g_s) @ flat(g)) / (flat(g) @ flat(g))
            self.g_v = [s - share * v for s, v in zip(g_s, g, strict=True)]
        elif self.g_v is None:
            g_s = g
        else:
            scale = BETA * flat(g).norm() / flat(self.g_v).norm()
            g_s = [v + scale * d for v, d in zip(g, self.g_v, strict=True)]
        for name, v, s in zip(self.trained, g, g_s, strict=True):
            self.values[name].grad = {"both": s + v, "vanilla": v, "perturbed": s}[self.losses]
        self.optimizer.step()


def mean_gradients(lists: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(each).mean(0) for each in zip(*lists, strict=True)]


def flat(tensors: Collection[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def assert_same(gm: nn.Module, values: Values) -> None:
    parameters = dict(gm.named_parameters())
    assert parameters.keys() == values.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, values[name], rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("losses", ["both", "vanilla", "perturbed"])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_one_step_equals_the_reference(case: int, losses: str) -> None:
    gm, data = prepared(), batch()
    reference = Reference(gm, case, losses)
    run(gm, sgd(gm, case=case, losses=losses, period=1), [data])
    reference.step(data)
    assert_same(gm, reference.values)


@pytest.mark.parametrize("losses", ["both", "perturbed"])
@pytest.mark.parametrize("period", [4, 3])
def test_successive_steps_equal_the_reference(period: int, losses: str) -> None:
    """With period 3 the fourth step reuses the direction of the third."""
    gm, data = prepared(), [batch() for _ in range(4)]
    reference = Reference(gm, losses=losses, period=period)
    run(gm, sgd(gm, losses=losses, period=period), data)
    for each in data:
        reference.step(each)
    assert reference.g_v is not None
    assert_same(gm, reference.values)


@pytest.mark.parametrize("period", [1, 3])
@pytest.mark.parametrize("case", [1, 2, 3])
def test_steps_of_adamw_equal_the_reference(case: int, period: int) -> None:
    make, data = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), [batch() for _ in range(4)]
    gm = prepared()
    reference = Reference(gm, case, period=period, optimizer=make)
    run(gm, SAQ(gm, make(gm.parameters()), RHO, case=case, period=period, beta=BETA), data)
    for each in data:
        reference.step(each)
    assert_same(gm, reference.values)


@pytest.mark.parametrize("case", [1, 2, 3])
def test_adaptive_perturbations_equal_the_reference(case: int) -> None:
    gm, data = prepared(), batch()
    reference = Reference(gm, case, adaptive=True)
    run(gm, sgd(gm, case=case, period=1, adaptive=True), [data])
    reference.step(data)
    assert_same(gm, reference.values)


@pytest.mark.parametrize(("chunk", "fraction"), [(2, 1.0), (3, 0.5), (None, 0.5), (1, 1.0)])
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("hardest", [False, True])
def test_cut_batches_equal_the_reference(hardest: bool, period: int, chunk: int | None, fraction: float) -> None:
    """Chunks perturb by their own gradients (m-sharpness); the second pass sees the first or the hardest samples."""
    gm, data = prepared(), [batch() for _ in range(3)]
    reference = Reference(gm, period=period)
    opt = sgd(gm, period=period, chunk_size=chunk, second_pass_fraction=fraction)
    for x, y in data:
        opt.step(lambda x, y: loss_of(gm(x), y, "none" if hardest else "mean"), x, y)
        reference.step((x, y), chunk, fraction, hardest)
    assert_same(gm, reference.values)


def test_unequal_chunks_weigh_by_their_samples() -> None:
    """Without a perturbation, and with a loss that is a mean of samples, chunks are gradient accumulation."""
    whole, cut = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()
    cut.load_state_dict(whole.state_dict())
    data = {"x": torch.randn(7, 4, dtype=torch.float64), "target": torch.randint(3, (7,))}
    for net, size in ((whole, None), (cut, 3)):
        opt = SAQ(net, torch.optim.SGD(net.parameters(), 1.0), rho=0.0, period=2, chunk_size=size)
        losses = [
            opt.step(lambda d, net=net: F.cross_entropy(net(d["x"]), d["target"]), data)  # type: ignore[misc]
            for _ in range(3)
        ]
    torch.testing.assert_close(cut.weight, whole.weight, rtol=1e-12, atol=1e-12)
    assert float(losses[0]) > float(losses[-1])


@pytest.mark.parametrize("normalize", [False, True])
def test_case_2_reports_the_share_of_weights_that_moved(normalize: bool) -> None:
    recipe = Recipe(scheme="clip", normalize_weights=normalize, first_last=None)
    data = batch()
    gm = prepare_saq(Network().double(), example_inputs=data[0], precision="W2A2", recipe=recipe)
    opt = sgd(gm, lr=0.0, case=2, period=1)
    shares = []
    for rho in (0.0, 1e-3, 0.1, 3.0):
        opt.rho = rho
        run(gm, opt, [data])
        assert opt.last_step is not None
        shares.append(opt.last_step.moved_share)
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[1] < 0.01 < 0.2 < shares[-1]
    other = sgd(gm, lr=0.0, case=3, period=1)
    run(gm, other, [data])
    assert other.last_step is not None
    assert other.last_step.moved_share is None


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_what_the_base_optimizer_receives_is_clipped(max_norm: float) -> None:
    gm, data = prepared(), batch()
    unclipped = copy.deepcopy(gm)
    run(unclipped, sgd(unclipped, period=1), [data])
    before = flat(list(gm.parameters())).detach().clone()
    update = flat(list(unclipped.parameters())).detach() - before
    run(gm, sgd(gm, period=1, max_gradient_norm=max_norm), [data])
    factor = min(1.0, max_norm / (float(update.norm()) + 1e-6))
    torch.testing.assert_close(flat(list(gm.parameters())).detach() - before, factor * update, rtol=1e-9, atol=1e-12)


def scaler(scale: float = 2.0**10) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=100)


@pytest.mark.parametrize("period", [1, 3])
def test_a_scaler_of_gradients_changes_no_step(period: int) -> None:
    gm, data = prepared(), [batch() for _ in range(4)]
    reference = Reference(gm, period=period)
    opt = sgd(gm, period=period, grad_scaler=scaler())
    run(gm, opt, data)
    for each in data:
        reference.step(each)
    assert_same(gm, reference.values)
    g = reference.gradients(data[0])
    opt.param_groups[0]["lr"] = 0.0
    run(gm, opt, [data[0]])
    assert opt.last_step is not None
    assert opt.last_step.gradient_norm == pytest.approx(float(flat(g).norm()), rel=1e-9)


@pytest.mark.filterwarnings("ignore:SAQ skipped")
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_scaler_lowers_its_scale_where_a_step_is_skipped(bad_pass: int) -> None:
    gm, (x, y) = prepared(), batch()
    grad_scaler = scaler()
    opt = SAQ(gm, torch.optim.SGD(gm.parameters(), 0.1, momentum=0.9), RHO, period=1, grad_scaler=grad_scaler)
    run(gm, opt, [(x, y)])
    before, factors = snapshot(gm, opt), iter([math.inf if index + 1 == bad_pass else 1.0 for index in range(2)])
    opt.step(lambda: next(factors) * loss_of(gm(x), y))
    assert opt.skipped_steps == 1
    assert grad_scaler.get_scale() == 2.0**9
    assert all(torch.equal(a, b) for a, b in zip(snapshot(gm, opt), before, strict=True))
    run(gm, opt, [(x, y)])
    assert opt.skipped_steps == 1


@pytest.mark.filterwarnings("ignore:SAQ skipped")
def test_a_disabled_scaler_is_none() -> None:
    gm, (x, y) = prepared(), batch()
    opt = sgd(gm, period=1, grad_scaler=GradScaler("cpu", enabled=False))
    before = snapshot(gm, opt)
    opt.step(lambda: math.inf * loss_of(gm(x), y))
    assert opt.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(snapshot(gm, opt), before, strict=True))


def test_autocast_around_the_step_sees_the_perturbation() -> None:
    """Its cache of lowered parameters must not outlive what they were."""
    net, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8)
    losses = []
    for outside in (True, False):
        opt = SAQ(net, torch.optim.SGD(net.parameters(), 0.0), rho=10.0, period=1)

        def loss(inside: bool = not outside) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=True) if inside else nullcontext():
                return net(x).square().mean()

        with torch.autocast("cpu", torch.bfloat16) if outside else nullcontext():
            opt.step(loss)
            after = net(x).square().mean().detach()
        assert opt.last_step is not None
        losses.append((opt.last_step.loss, opt.last_step.perturbed_loss))
        assert float(after) == pytest.approx(float(opt.last_step.loss), rel=0.01)
    assert losses[0] == losses[1]
    assert float(losses[0][1] or 0) > 10 * float(losses[0][0])


def test_leaves_that_are_gone_are_noticed() -> None:
    gm, data = prepared(), [batch()]
    opt, other = sgd(gm, period=1, case=2), copy.deepcopy(gm)
    Pipeline((RemovePerturbations(),)).run(gm)
    with pytest.raises(TrainingError, match=r"no longer has the leaves .* build SAQ anew"):
        run(gm, opt, data)
    opt = sgd(other, period=1, case=2)
    sgd(other, period=1, case=3)
    with pytest.raises(TrainingError, match="build SAQ anew"):
        run(other, opt, data)


def test_a_closure_that_fails_takes_no_step() -> None:
    gm, data = prepared(), batch()
    reference = Reference(gm, period=2)
    opt = sgd(gm, period=2)
    run(gm, opt, [data])
    with pytest.raises(MemoryError):
        opt.step(lambda: (_ for _ in ()).throw(MemoryError))
    run(gm, opt, [data])
    for _ in range(2):
        reference.step(data)
    assert_same(gm, reference.values)


def test_a_plain_state_loaded_into_the_base_optimizer_is_shared() -> None:
    net = nn.Linear(2, 2)
    plain = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
    opt = SAQ(net, torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), period=1)
    opt.base_optimizer.load_state_dict(plain.state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, 0.1)
    run(net, opt, [(torch.randn(3, 2), torch.randint(2, (3,)))])
    scheduler.step()
    assert opt.base_optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert opt.state is opt.base_optimizer.state
    with pytest.raises(TrainingError, match="cannot be copied"):
        copy.deepcopy(opt)


def test_expanded_buffers_are_left_alone() -> None:
    net = nn.Linear(2, 2)
    net.register_buffer("shared", torch.zeros(1).expand(4))
    opt = SAQ(net, torch.optim.SGD(net.parameters(), 0.1), period=1)
    run(net, opt, [(torch.randn(3, 2), torch.randint(2, (3,)))])
    assert opt.skipped_steps == 0


def test_steps_under_bfloat16_autocast_are_near_those_in_float32() -> None:
    gm, (x, y) = prepared().float(), batch()
    x, lowered = x.float(), copy.deepcopy(gm)
    statistics = []
    for net, enabled in ((gm, False), (lowered, True)):
        opt = sgd(net, period=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            opt.step(lambda net=net: loss_of(net(x), y))  # type: ignore[misc]
        statistics.append(opt.last_step)
    plain, low = statistics
    assert plain is not None
    assert low is not None
    assert all(p.dtype == torch.float32 for p in lowered.parameters())
    assert float(low.loss) == pytest.approx(float(plain.loss), rel=0.05)
    assert low.gradient_norm == pytest.approx(plain.gradient_norm, rel=0.2)


@pytest.mark.parametrize("perturb", [(), ("bias",), ("norm", "clipping"), ("bias", "norm", "clipping")])
def test_what_is_perturbed_besides_weights(perturb: tuple[str, ...]) -> None:
    gm, data = prepared(), batch()
    reference = Reference(gm, perturb=perturb)
    run(gm, sgd(gm, period=1, perturb=perturb), [data])
    reference.step(data)
    assert_same(gm, reference.values)


def test_frozen_parameters_are_neither_moved_nor_perturbed() -> None:
    gm, data = prepared(), batch()
    frozen = ("conv.weight", "norm.bias")
    reference = Reference(gm, frozen=frozen)
    for name in frozen:
        gm.get_parameter(name).requires_grad_(False)
    run(gm, sgd(gm, period=1), [data])
    reference.step(data)
    assert_same(gm, reference.values)


@pytest.mark.parametrize("make", [lambda: prepared(precision=None), lambda: Network().double()])
def test_unquantized_with_the_perturbed_loss_alone_is_sam(make: Callable[[], nn.Module]) -> None:
    module, data = make(), [batch() for _ in range(2)]
    reference = copy.deepcopy(module)
    parameters = list(reference.parameters())
    for x, y in data:  # SAM (ICLR 2021), Algorithm 1
        g = torch.autograd.grad(loss_of(reference(x), y), parameters)
        before, norm = [p.detach().clone() for p in parameters], flat(g).norm()
        with torch.no_grad():
            for p, v in zip(parameters, g, strict=True):
                p += RHO * v / norm
        g_s = torch.autograd.grad(loss_of(reference(x), y), parameters)
        with torch.no_grad():
            for p, old, v in zip(parameters, before, g_s, strict=True):
                p.copy_(old - v)
    run(module, sgd(module, period=1, losses="perturbed"), data)
    assert_same(module, dict(reference.named_parameters()))


def test_statistics_of_a_step_are_those_of_the_reference() -> None:
    gm, data = prepared(), batch()
    reference = Reference(gm)
    opt = sgd(gm, period=2)
    opt.param_groups[0]["lr"] = 0.0
    g, g_s = flat(reference.gradients(data)), flat(reference.gradients(data, reference.perturbation(data)))
    run(gm, opt, [data])
    assert opt.last_step is not None
    assert not opt.last_step.second_pass
    assert opt.last_step.cosine is None
    run(gm, opt, [data])
    step = opt.last_step
    assert step.second_pass
    torch.testing.assert_close(step.loss, reference.loss(data).detach())
    perturbed_loss = reference.loss(data, reference.perturbation(data))
    torch.testing.assert_close(step.perturbed_loss, perturbed_loss.detach())
    assert step.gradient_norm == pytest.approx(float(g.norm()))
    assert step.cosine == pytest.approx(float(g @ g_s / (g.norm() * g_s.norm())))


def test_running_statistics_move_once_a_step() -> None:
    gm, (x, y) = prepared(), batch()
    once = copy.deepcopy(gm)
    once(x)
    run(gm, sgd(gm, period=1), [(x, y)])
    moved, expected = dict(gm.named_buffers()), dict(once.named_buffers())
    assert int(moved["norm.num_batches_tracked"]) == 1
    for name, buffer in expected.items():
        assert torch.equal(moved[name], buffer), name


def test_both_passes_see_the_same_random_numbers() -> None:
    net = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    data = [(torch.randn(4, 8), torch.randint(3, (4,)))]
    once = copy.deepcopy(net)
    state = torch.get_rng_state()
    opt = SAQ(net, torch.optim.SGD(net.parameters(), 0.1), rho=0.0, period=1)
    run(net, opt, data)
    after = torch.rand(3)
    assert opt.last_step is not None
    assert opt.last_step.perturbed_loss == opt.last_step.loss
    assert opt.last_step.cosine == pytest.approx(1.0)
    torch.set_rng_state(state)
    once(data[0][0])
    assert torch.equal(after, torch.rand(3))


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.AdamW])
@pytest.mark.parametrize("done", [1, 4])
def test_resuming_is_bit_identical(make: Callable[..., torch.optim.Optimizer], done: int) -> None:
    gm, data = prepared(), [batch() for _ in range(6)]
    opt = SAQ(gm, make(gm.parameters()), RHO, period=3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    run(gm, opt, data[:done])
    scheduler.step()
    file = io.BytesIO()
    torch.save({"opt": opt.state_dict(), "scheduler": scheduler.state_dict()}, file)
    resumed_gm = copy.deepcopy(gm)
    expected = run(gm, opt, data[done:])

    resumed = SAQ(resumed_gm, make(resumed_gm.parameters()), RHO, period=3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 10)
    file.seek(0)
    state = torch.load(file)
    resumed.load_state_dict(state["opt"])
    scheduler.load_state_dict(state["scheduler"])
    assert run(resumed_gm, resumed, data[done:]) == expected
    for a, b in zip(gm.parameters(), resumed_gm.parameters(), strict=True):
        assert torch.equal(a, b)
    scheduler.step()
    assert resumed.param_groups[0]["lr"] == resumed.base_optimizer.param_groups[0]["lr"]


def test_a_loaded_state_is_a_copy() -> None:
    gm, data = prepared(), [batch() for _ in range(4)]
    opt = sgd(gm, lr=0.1, period=2)
    run(gm, opt, data[:2])
    other_gm = copy.deepcopy(gm)
    other = sgd(other_gm, lr=0.1, period=2)
    other.load_state_dict(opt.state_dict())
    before = {key: value.clone() for key, value in other.state_dict()["saq"]["direction"].items()}
    run(gm, opt, data[2:])
    for key, value in other.state_dict()["saq"]["direction"].items():
        assert torch.equal(value, before[key])


def snapshot(gm: nn.Module, opt: SAQ) -> list[Tensor]:
    momentum = [state["momentum_buffer"] for state in opt.state.values() if "momentum_buffer" in state]
    return [tensor.detach().clone() for tensor in (*gm.parameters(), *gm.buffers(), *momentum)]


@pytest.mark.filterwarnings("ignore:SAQ skipped")
@pytest.mark.parametrize("period", [1, 4])
def test_a_batch_that_is_not_finite_leaves_no_trace(period: int) -> None:
    gm, (x, y) = prepared(), batch()
    opt = sgd(gm, lr=0.1, period=period)
    before = snapshot(gm, opt)
    run(gm, opt, [(x * math.nan, y)])
    assert opt.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(snapshot(gm, opt), before, strict=True))


@pytest.mark.parametrize(("period", "bad_pass"), [(1, 1), (1, 2), (4, 1)])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(period: int, bad_pass: int) -> None:
    gm, (x, y) = prepared(), batch()
    opt = SAQ(gm, torch.optim.SGD(gm.parameters(), 0.1, momentum=0.9), RHO, period=period)
    run(gm, opt, [(x, y)])
    before, passes = snapshot(gm, opt), 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        return (math.inf if passes == bad_pass else 1.0) * loss_of(gm(x), y)

    with pytest.warns(RuntimeWarning, match="SAQ skipped step 2: loss .* Look at the batch") as caught:
        opt.step(closure)
    assert caught[0].filename == __file__
    assert passes == bad_pass
    passes = 0
    opt.step(closure)  # warns no more: a warning is an error
    assert opt.skipped_steps == 2
    assert opt.last_step is not None
    assert opt.last_step.skipped
    assert all(torch.equal(a, b) for a, b in zip(snapshot(gm, opt), before, strict=True))
    run(gm, opt, [(x, y)])
    assert not all(torch.equal(a, b) for a, b in zip(snapshot(gm, opt), before, strict=True))


@pytest.mark.filterwarnings("ignore:SAQ skipped")
def test_a_second_pass_that_is_not_finite_leaves_no_direction() -> None:
    gm, data = prepared(), batch()
    opt = sgd(gm, lr=0.0, period=2)
    run(gm, opt, [data] * 3)
    g = flat(Reference(gm).gradients(data))
    assert not torch.allclose(flat([p.grad for p in gm.parameters() if p.grad is not None]), 2 * g)
    factors = iter([1.0, math.inf])
    opt.step(lambda: next(factors) * loss_of(gm(data[0]), data[1]))
    run(gm, opt, [data])
    torch.testing.assert_close(flat([p.grad for p in gm.parameters() if p.grad is not None]), 2 * g)


def test_leaves_have_no_delta_between_steps() -> None:
    gm = prepared()
    run(gm, sgd(gm, period=1), [batch()])
    leaves = [module for module in gm.modules() if isinstance(module, Perturbation)]
    assert len(leaves) == 6
    assert all(leaf.delta is None for leaf in leaves)


def test_a_flat_loss_takes_no_step() -> None:
    net = nn.Linear(3, 2)
    before = net.weight.detach().clone()
    opt = SAQ(net, torch.optim.SGD(net.parameters(), 1.0), period=1)
    opt.step(lambda: 0 * net(torch.randn(4, 3)).sum())
    assert torch.equal(net.weight, before)
    assert opt.skipped_steps == 0


def test_it_is_a_torch_optimizer() -> None:
    gm, data = prepared(), [batch() for _ in range(3)]
    base = torch.optim.SGD(gm.parameters(), 0.1, momentum=0.9)
    opt = SAQ(gm, base, RHO, period=2)
    assert isinstance(opt, torch.optim.Optimizer)
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state
    assert opt.defaults == base.defaults
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 4)
    rates = []
    for each in data:
        run(gm, opt, [each])
        scheduler.step()
        rates.append(base.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * t / 4)) / 2 for t in (1, 2, 3)])
    opt.zero_grad()
    assert all(p.grad is None for p in gm.parameters())


def test_groups_are_added_to_both_optimizers() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    opt = SAQ(net, torch.optim.SGD(net[0].parameters(), 0.1), period=1)
    opt.add_param_group({"params": net[1].parameters(), "lr": 0.2})
    assert [group["lr"] for group in opt.base_optimizer.param_groups] == [0.1, 0.2]
    before = net[1].weight.detach().clone()
    run(net, opt, [(torch.randn(4, 3), torch.randint(2, (4,)))])
    assert not torch.equal(net[1].weight, before)
    with pytest.raises(TrainingError, match=r"parameter 0 of the group, of shape \(5, 5\)"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(5, 5))]})
    assert len(opt.param_groups) == 2


def test_a_wrapped_module_is_perturbed_through_its_leaves() -> None:
    gm, data = prepared(), batch()
    reference = Reference(gm)
    wrapped = nn.Sequential(gm)
    run(wrapped, sgd(wrapped, period=1), [data])
    reference.step(data)
    assert_same(gm, reference.values)


def test_under_compile_both_passes_are_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    gm, data = prepared(), [batch() for _ in range(3)]
    reference, opt, counter = Reference(gm), sgd(gm, period=1), CompileCounter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.compile's own deprecations
        run(torch.compile(gm, backend=counter), opt, data)  # type: ignore[arg-type]
    for each in data:
        reference.step(each)
    assert counter.frame_count == 1
    assert_same(gm, reference.values)


def test_kinds_of_parameters_and_their_weight_decay() -> None:
    gm = prepared()
    kinds = {name: parameter_kinds(gm)[p] for name, p in gm.named_parameters()}
    assert kinds == {name: Reference.kind(name) for name in kinds}
    decayed, others = parameter_groups(gm, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert {id(p) for p in decayed["params"]} == {id(p) for n, p in gm.named_parameters() if kinds[n] == "weight"}
    assert len(decayed["params"]) + len(others["params"]) == len(kinds)


def test_kinds_of_recurrent_layers_and_of_normalization_over_several_axes() -> None:
    net = nn.ModuleDict({"rnn": nn.GRU(3, 3), "norm": nn.LayerNorm((4, 5)), "act": nn.PReLU(3)})
    kinds = {name: parameter_kinds(net)[p] for name, p in net.named_parameters()}
    expected = {f"rnn.{kind}_{part}_l0": kind for kind in ("weight", "bias") for part in ("ih", "hh")}
    assert kinds == expected | {"norm.weight": "norm", "norm.bias": "norm", "act.weight": "norm"}
    prepared: Any = prepare_saq(nn.Sequential(nn.LayerNorm((4, 5))), precision=None)
    assert set(parameter_kinds(prepared).values()) == {"norm"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho must be .* not -0.1"),
        ({"rho": math.nan}, "rho must be"),
        ({"case": 4}, "case must be 1, 2 or 3, not 4"),
        ({"period": 0}, "period must be .* not 0"),
        ({"beta": math.inf}, "beta must be finite"),
        ({"losses": "sharp"}, "losses must be one of both, vanilla, perturbed, not 'sharp'"),
        ({"perturb": ("bias", "bn")}, "perturb takes bias, norm, clipping, not bn"),
        ({"chunk_size": 0}, "chunk_size must be a number of samples, at least 1, not 0"),
        ({"second_pass_fraction": 0.0}, "second_pass_fraction must be above 0 and at most 1, not 0.0"),
        ({"max_gradient_norm": -1.0}, "max_gradient_norm must be above 0, not -1.0"),
    ],
)
def test_options_that_make_no_sense_are_named(options: dict[str, Any], message: str) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=message):
        SAQ(net, torch.optim.SGD(net.parameters(), 0.1), **options)


def test_misuse_is_named() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(TrainingError, match=r"parameter 0 .* of shape \(2, 2\), is not in the module"):
        SAQ(copy.deepcopy(net), torch.optim.SGD(net.parameters(), 0.1))
    opt = SAQ(net, torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(TrainingError, match="closure must return the mean loss"):
        opt.step(lambda: torch.zeros(()))
    with pytest.raises(TrainingError, match="no parameter of the optimizer got a gradient"):
        opt.step(lambda: torch.zeros((), requires_grad=True))
    cutting = SAQ(net, torch.optim.SGD(net.parameters(), 0.1), chunk_size=2)
    with pytest.raises(TrainingError, match=r"cut the batch, which step\(\) therefore needs"):
        cutting.step(lambda: net(torch.ones(2, 2)).sum())
    with pytest.raises(TrainingError, match=r"samples along their first axis; it has \[\(4, 2\), \(3,\)\]"):
        cutting.step(lambda x, y: net(x).sum(), torch.ones(4, 2), torch.ones(3))
    with pytest.raises(CheckpointError, match="state of a plain optimizer"):
        opt.load_state_dict(opt.base_optimizer.state_dict())
