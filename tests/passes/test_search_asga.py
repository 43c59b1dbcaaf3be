"""The search: one step against float64 formulas, the budget held, prices kept out of the scores."""

import copy
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from saq_fx.choices import ExpectedShares, choices, weight_mixtures
from saq_fx.cost import cost_table
from saq_fx.errors import CheckpointError, InfeasibleBudgetError, PassError, PrecisionError, TrainingError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.networks import SmallResNet
from saq_fx.passes.relax_precision import RelaxPrecision
from saq_fx.passes.search_asga import ABLATIONS, STILL_STEPS, SearchAsga, SearchStep
from saq_fx.precision import Budget, Precision
from saq_fx.prepare import apply_policy, prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.two_passes import TwoPasses
from tests.zoo import ZOO

BITS = (2, 3, 5)
STEPS = 4


class Small(nn.Module):
    """A convolution between two pinned layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.norm(self.conv(x)))
        return self.head(x.mean((2, 3)))


SPATIAL = 5 * 5
CONV_MACS = 4 * 4 * 9 * SPATIAL
FIXED_BITOPS = 64 * (2 * 4 * 9 * SPATIAL + 4 * 3)
BUDGET = 13.0 * CONV_MACS + FIXED_BITOPS  # 13 = E[b_w] E[b_a]


def batches(count: int, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(8, 2, 5, 5, dtype=torch.float64, generator=generator),
            torch.randint(3, (8,), generator=generator),
        )
        for _ in range(count)
    ]


def relaxed() -> SaqGraphModule:
    torch.manual_seed(0)
    recipe = Recipe(normalize_weights=False)
    gm = prepare_saq(Small().double(), example_inputs=batches(1)[0][0], recipe=recipe)
    RelaxPrecision(BITS, BITS).run(gm)
    with torch.no_grad():
        gm.train()(batches(1)[0][0])  # fits every candidate's level
        for name, parameter in gm.named_parameters():
            if "level" in name:
                parameter *= 1.13  # no weight lies exactly on its level
        gm.get_parameter("head.input_quantizer.clipping_level").fill_(2.0)  # not below all means
    return gm


def round_ste(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def clip_weight(w: Tensor, level: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1
    return level * (2 * round_ste(((w / level).clamp(-1, 1) + 1) / 2 * n) / n - 1)


def clip_activation(x: Tensor, level: Tensor, bits: int) -> Tensor:
    n = 2**bits - 1
    return level * round_ste((x / level).clamp(0, 1) * n) / n


class Reference:
    """The network of `Small` and the search step of `SearchAsga`, written out."""

    names = ("conv.weight_quantizer", "conv.input_quantizer")

    def __init__(self, gm: SaqGraphModule, options: SearchAsga) -> None:
        self.options = options
        self.parameters = {name: each.detach().clone() for name, each in gm.named_parameters()}
        for name in self.names:
            self.parameters[f"{name}.logits"] = self.start()
        self.parameters["moved"] = torch.zeros_like(self.parameters["conv.weight"])  # of the mixed weight
        before = ("conv.weight", "conv.weight_quantizer.logits")
        self.perturbed = {name for name in self.parameters if "level" not in name and name not in before}
        self.momentum = {name: torch.zeros_like(each) for name, each in self.parameters.items()}
        self.square = {name: torch.zeros_like(each) for name, each in self.parameters.items()}
        self.rho, self.gap, self.beta, self.done = options.rho, 0.0, 0.0, 0
        self.gains = {name: torch.zeros(len(BITS), dtype=torch.float64) for name in self.names}

    def start(self) -> Tensor:
        def excess(price: float) -> float:
            weights = [math.exp(-price * bits) for bits in BITS]
            mean = sum(w * b for w, b in zip(weights, BITS, strict=True)) / sum(weights)
            return mean**2 - 13.0

        return torch.tensor(BITS, dtype=torch.float64) * -brentq(excess, -5, 5, xtol=1e-14)

    def probabilities(self, parameters: dict[str, Tensor], name: str, temperature: float) -> Tensor:
        return (parameters[f"{name}.logits"] / temperature).softmax(0)

    def loss(self, parameters: dict[str, Tensor], batch: Any, temperature: float) -> Tensor:
        def mixture(quantize: Any, value: Tensor, name: str) -> Tensor:
            p = self.probabilities(parameters, name, temperature)
            levels = [parameters[f"{name}.quantizers.{i}.clipping_level"] for i in range(len(BITS))]
            return sum(p[i] * quantize(value, levels[i], bits) for i, bits in enumerate(BITS))

        def plain(quantize: Any, value: Tensor, name: str) -> Tensor:
            return quantize(value, parameters[f"{name}.clipping_level"], 8)

        x, targets = batch
        weight = plain(clip_weight, parameters["stem.weight"], "stem.weight_quantizer")
        x = F.conv2d(x, weight, parameters["stem.bias"], padding=1).relu()
        weight = mixture(clip_weight, parameters["conv.weight"], "conv.weight_quantizer") + parameters["moved"]
        x = F.conv2d(mixture(clip_activation, x, "conv.input_quantizer"), weight, padding=1)
        x = F.batch_norm(x, None, None, parameters["norm.weight"], parameters["norm.bias"], training=True)
        x = plain(clip_activation, x.relu().mean((2, 3)), "head.input_quantizer")
        weight = plain(clip_weight, parameters["head.weight"], "head.weight_quantizer")
        return F.cross_entropy(F.linear(x, weight, parameters["head.bias"]), targets)

    def gradient(self, parameters: dict[str, Tensor], of: Callable[[dict[str, Tensor]], Tensor]) -> Any:
        leaves = {name: each.clone().requires_grad_() for name, each in parameters.items()}
        value = of(leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return float(value.detach()), dict(zip(leaves, gradients, strict=True))

    def share(self, parameters: dict[str, Tensor], temperature: float) -> Tensor:
        bits = torch.tensor(BITS, dtype=torch.float64)
        weight, activation = (self.probabilities(parameters, name, temperature) @ bits for name in self.names)
        return (CONV_MACS * weight * activation + FIXED_BITOPS) / BUDGET

    def step(self, batch: Any) -> SearchStep:
        options = self.options
        temperature = options.final_temperature ** (self.done / (STEPS - 1))
        loss, g = self.gradient(self.parameters, lambda p: self.loss(p, batch, temperature))
        norm = math.sqrt(sum(float((g[name] ** 2).sum()) for name in self.perturbed))
        scale = self.rho / norm - options.alignment
        moved = {n: p + scale * g[n] if n in self.perturbed else p for n, p in self.parameters.items()}
        perturbed_loss, g_a = self.gradient(moved, lambda p: self.loss(p, batch, temperature))
        trajectory = self.trajectory(temperature)
        cost, of_cost = self.gradient(self.parameters, lambda p: self.share(p, temperature))
        for name in self.names:
            p = self.probabilities(self.parameters, name, temperature)
            self.gains[name] -= (g[f"{name}.logits"] + g_a[f"{name}.logits"]) / 2 * temperature / p
        self.done += 1
        price = self.beta + options.damping * (cost - 1)
        for name, parameter in self.parameters.items():
            descent = (g[name] + g_a[name]) / 2
            if name.endswith("logits"):
                parameter -= options.logits_lr * self.adam(name, descent + price * of_cost[name])
            else:
                self.momentum[name] = 0.9 * self.momentum[name] + descent
                parameter -= options.weight_lr * self.momentum[name] * (name != "moved")
        flat, flat_a = (torch.cat([found[name].flatten() for name in sorted(self.perturbed)]) for found in (g, g_a))
        gap, rho, beta = max(0.0, perturbed_loss - loss), self.rho, self.beta
        cosine = float(F.cosine_similarity(flat, flat_a, dim=0))
        self.gap = gap if self.done == 1 else 0.9 * self.gap + 0.1 * gap
        self.rho = min(max(math.log(self.gap + 1), options.rho_range[0]), options.rho_range[1])
        self.beta += options.dual_lr * (cost - 1)
        numbers = loss, perturbed_loss, gap, rho, 2 * gap / rho**2, cosine, cost, beta, temperature
        return SearchStep(*numbers, **trajectory)

    def trajectory(self, temperature: float) -> dict[str, Any]:
        labels = dict(zip(self.names, ("conv weight", "conv activation"), strict=True))
        bits = torch.tensor(BITS, dtype=torch.float64)
        return {
            "logits": {label: tuple(self.parameters[f"{name}.logits"].tolist()) for name, label in labels.items()},
            "bits": {
                label: float(self.probabilities(self.parameters, name, temperature) @ bits)
                for name, label in labels.items()
            },
        }

    def adam(self, name: str, gradient: Tensor) -> Tensor:
        self.momentum[name] = 0.9 * self.momentum[name] + 0.1 * gradient
        self.square[name] = 0.999 * self.square[name] + 0.001 * gradient**2
        mean, square = self.momentum[name] / (1 - 0.9**self.done), self.square[name] / (1 - 0.999**self.done)
        return mean / (square.sqrt() + 1e-8)


def numbers(step: SearchStep) -> dict[str, Any]:
    """All that a step saw, flat."""
    logits = {f"{name} {index}": each for name, vector in step.logits.items() for index, each in enumerate(vector)}
    return {**vars(step), **step.bits, **logits, "logits": 0, "bits": 0}


def test_steps_are_those_of_the_formulas() -> None:
    gm, data = relaxed(), batches(STEPS)
    options = SearchAsga(data, F.cross_entropy, (Budget.bitops(BUDGET),), rho_range=(0.001, 0.5))
    reference = Reference(gm, options)
    expected = [reference.step(batch) for batch in data]
    result = options.run(gm)
    for step, other in zip(result.history, expected, strict=True):
        assert numbers(step) == pytest.approx(numbers(other), rel=1e-7, abs=1e-10)
    for name, parameter in gm.named_parameters():
        torch.testing.assert_close(parameter.detach(), reference.parameters[name], rtol=1e-8, atol=1e-10, msg=name)
    weight, activation = (reference.gains[name] / STEPS for name in reference.names)
    pairs = [float(w + a) for w in weight for a in activation]
    assert result.scores == (pytest.approx(pairs, rel=1e-7, abs=1e-10),)
    assert int(gm.norm.num_batches_tracked) == STEPS + 1


@pytest.mark.parametrize("name", ["residual", "attention", "products"])
def test_expected_cost_is_the_closed_form(name: str) -> None:
    gm = prepare_saq(ZOO[name].make().double(), example_inputs=doubles(name), recipe=Recipe(first_last=None))
    RelaxPrecision((2, 3, 4, 6), (2, 5)).run(gm)
    found, expected = choices(gm), 0.0
    for choice in found:
        for mixture in choice.mixtures:
            nn.init.normal_(mixture.logits)
        weight = 8.0 if choice.weight is None else float(choice.weight.expected_bits().detach())
        activation = 8.0 if choice.activation is None else float(choice.activation.expected_bits().detach())
        for _, layer in layers(gm):
            if layer.name not in choice.layers or layer.macs is None:
                continue
            if layer.is_product:
                p = choice.mixtures[0].probabilities().tolist()
                expected += layer.macs * (p[0] * 2**2 + p[1] * 5**2)
            else:
                expected += layer.macs * weight * activation
    shares = ExpectedShares(gm, found, (Budget.bitops(1e9), Budget.ratio(0.5)))()
    assert shares.shape == (2,)
    assert float(shares[0].detach()) * 1e9 == pytest.approx(expected, rel=1e-12)


def doubles(name: str) -> Tensor:
    inputs: Tensor = ZOO[name].inputs()
    return inputs.double()


def digits_like(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(count)]


def small_resnet() -> SaqGraphModule:
    gm = prepare_saq(SmallResNet(4), example_inputs=torch.randn(16, 1, 8, 8))
    RelaxPrecision().run(gm)
    return gm


@pytest.mark.parametrize("share", [0.13, 0.2, 0.4])
def test_the_expected_cost_stays_at_the_budget(share: float) -> None:
    result = SearchAsga(digits_like(5), F.cross_entropy, (Budget.ratio(share),), steps=40).run(small_resnet())
    assert result.history[0].cost == pytest.approx(1, abs=1e-5)
    assert all(abs(step.cost - 1) < 0.1 for step in result.history)
    assert (result.history[0].temperature, result.history[-1].temperature) == (1, pytest.approx(0.3))


def test_of_several_budgets_the_tightest_is_held() -> None:
    budgets = (Budget.ratio(0.2), Budget.average_bits(3.1))
    result = SearchAsga(digits_like(5), F.cross_entropy, budgets, steps=20).run(small_resnet())
    assert all(abs(step.cost - 1) < 0.1 for step in result.history)


def test_the_price_of_bits_is_no_part_of_the_scores() -> None:
    budgets = (Budget.ratio(0.2),)
    result = SearchAsga(digits_like(9), lambda outputs, _: 0 * outputs.sum(), budgets).run(small_resnet())
    assert result.history[-1].beta != 0
    assert {score for scores in result.scores for score in scores} == {0.0}


def test_a_second_pass_sees_the_same_random_numbers() -> None:
    inputs = ZOO["branching"].inputs()
    gm = prepare_saq(ZOO["branching"].make(), example_inputs=inputs, recipe=Recipe(first_last=None))
    RelaxPrecision().run(gm)
    still = SearchAsga(
        [(inputs, None)], lambda outputs, _: outputs["logits"].square().sum(), (Budget.average_bits(6),), alignment=0,
        rho=1e-12, rho_range=(1e-12, 1e-12), steps=3,
    )  # fmt: skip
    for step in still.run(gm).history:
        assert step.perturbed_loss == pytest.approx(step.loss, rel=1e-5)


@pytest.mark.parametrize(("rho", "passes"), [(0.1, 2), (0.0, 1)])
def test_batches_are_repeated_and_radius_zero_needs_one_pass(rho: float, passes: int) -> None:
    calls, seen = [], []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        calls.append(targets)
        return F.cross_entropy(outputs, targets)

    data = digits_like(2)
    result = SearchAsga(data, loss, (Budget.ratio(0.2),), steps=5, rho=rho, after_step=seen.append).run(small_resnet())
    assert [id(targets) for targets in calls[::passes]] == [id(data[index][1]) for index in (0, 1, 0, 1, 0)]
    assert tuple(seen) == result.history
    assert not result.modified
    assert all((step.sigma is None) == (rho == 0) for step in seen)


def test_a_fixed_radius_stays() -> None:
    budgets = (Budget.ratio(0.2),)
    result = SearchAsga(digits_like(4), F.cross_entropy, budgets, rho_range=(0.1, 0.1)).run(small_resnet())
    assert [step.rho for step in result.history] == [0.1] * 4


def test_what_is_wrong_is_named() -> None:
    budgets = (Budget.ratio(0.2),)
    with pytest.raises(PrecisionError, match="at least one budget"):
        SearchAsga([], F.cross_entropy, ())
    with pytest.raises(TrainingError, match="a search of 0 steps"):
        SearchAsga([], F.cross_entropy, budgets).run(small_resnet())
    with pytest.raises(TrainingError, match="no length"):
        SearchAsga(iter(digits_like(1)), F.cross_entropy, budgets).run(small_resnet())
    with pytest.raises(TrainingError, match="step 1 of the search: the loss is nan"):
        SearchAsga(digits_like(1), lambda outputs, _: outputs.sum() * torch.nan, budgets).run(small_resnet())
    with pytest.raises(TrainingError, match="step 1 of the search: the loss must be a 0-d tensor"):
        SearchAsga(digits_like(1), lambda outputs, _: outputs, budgets).run(small_resnet())
    with pytest.raises(PrecisionError, match="there is no score 'logits'"):
        SearchAsga([], F.cross_entropy, budgets, score="logits")
    with pytest.raises(InfeasibleBudgetError):
        SearchAsga(digits_like(1), F.cross_entropy, (Budget.bitops(1),)).run(small_resnet())
    gm = prepare_saq(SmallResNet(4), example_inputs=torch.randn(1, 1, 8, 8))
    with pytest.raises(PassError, match="run RelaxPrecision"):
        SearchAsga(digits_like(1), F.cross_entropy, budgets).run(gm)


class Interrupted(Exception):
    """Stands for a killed process."""


class Augmented(TensorDataset):
    """Images that Python's generator flips and numpy's makes brighter."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, label = super().__getitem__(index)
        return (image.flip(-1) if random.random() < 0.5 else image) + np.random.rand(), label


def loader(generator: torch.Generator | None) -> DataLoader[Any]:
    """A loader that shuffles by torch's own generator or by its own."""
    torch.manual_seed(1)
    images = Augmented(torch.randn(40, 1, 8, 8), torch.randint(10, (40,)))
    return DataLoader(images, batch_size=8, shuffle=True, generator=generator)


def seed_all(seed: int, generator: torch.Generator | None) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    if generator is not None:
        generator.manual_seed(seed)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["torch's generator", "a loader's generator"])
@pytest.mark.parametrize("stop", [4, 5, 7])
def test_a_resumed_search_is_the_uninterrupted_one(
    stop: int, generator: torch.Generator | None, tmp_path: Path
) -> None:
    """Bit for bit, from the end of a round through the loader and from the middle of one."""
    budgets, path = (Budget.ratio(0.2),), tmp_path / "state.pt"
    data, gm = loader(generator), small_resnet()
    seed_all(2, generator)
    expected = SearchAsga(data, F.cross_entropy, budgets, steps=12).run(copy.deepcopy(gm))

    def interrupt(_: SearchStep) -> None:
        seen.append(_)
        if len(seen) > stop:
            raise Interrupted

    seen: list[SearchStep] = []
    options = SearchAsga(data, F.cross_entropy, budgets, steps=12, checkpoint=path, checkpoint_steps=stop)
    seed_all(2, generator)
    with pytest.raises(Interrupted):
        replace(options, after_step=interrupt).run(copy.deepcopy(gm))
    seed_all(3, generator)
    resumed = copy.deepcopy(gm)
    result = options.run(resumed)
    assert result.history == expected.history
    assert result.scores == expected.scores
    for found, other in zip(resumed.parameters(), expected.graph_module.parameters(), strict=True):
        assert torch.equal(found, other)


def test_a_state_of_another_search_is_refused(tmp_path: Path) -> None:
    budgets, path = (Budget.ratio(0.2),), tmp_path / "state.pt"
    options = SearchAsga(digits_like(2), F.cross_entropy, budgets, checkpoint=path, checkpoint_steps=1)
    options.run(small_resnet())
    with pytest.raises(CheckpointError, match="another run: other steps"):
        replace(options, steps=3).run(small_resnet())
    gm = prepare_saq(SmallResNet(4), example_inputs=torch.randn(16, 1, 8, 8))
    RelaxPrecision((2, 4)).run(gm)
    with pytest.raises(CheckpointError, match="another run: other candidates"):
        options.run(gm)
    for changes in ({"budgets": (Budget.ratio(0.3),)}, {"score": "probability"}, {"alignment": None}, {"beta": 1.0}):
        with pytest.raises(CheckpointError, match=f"another run: other {next(iter(changes))};"):
            replace(options, **changes).run(small_resnet())
    path.write_bytes(b"something else")
    with pytest.raises(CheckpointError, match="remove it to begin anew"):
        options.run(small_resnet())


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_what_their_names_say(name: str) -> None:
    budgets, data = (Budget.ratio(0.2),), digits_like(3)
    result = SearchAsga(data, F.cross_entropy, budgets, **ABLATIONS[name]).run(small_resnet())
    radii = [step.rho for step in result.history]
    if name in ("EdMIPS", "+ gradient score"):
        assert radii == [0, 0, 0]
    elif name == "+ adaptive radius (ASGA)":
        assert radii[0] == 0.1
        assert len(set(radii)) > 1
    else:
        assert radii == [0.1] * 3
    if name == "EdMIPS":
        found = choices(result.graph_module)
        assert result.scores[0] == pytest.approx(found[0].probabilities().log().tolist(), rel=1e-6)
        assert {step.temperature for step in result.history} == {1.0}


def test_without_alignment_the_step_is_that_of_sam() -> None:
    """With the learning rate 1 and no momentum yet, the first step is the gradient at the perturbed point."""
    budgets, data = (Budget.ratio(0.2),), digits_like(1)
    gm = small_resnet()
    gm(data[0][0])  # fits the levels
    start = {name: each.detach().clone() for name, each in gm.named_parameters()}

    def moved(alignment: float | None, rho: float) -> dict[str, Tensor]:
        copied = copy.deepcopy(gm)
        options = SearchAsga(data, F.cross_entropy, budgets, rho=rho, alignment=alignment, weight_lr=1.0)
        options.run(copied)
        names = [name for name in start if not name.endswith("logits")]
        return {name: start[name] - copied.get_parameter(name).detach() for name in names}

    plain, sam, mean = moved(0.0, 0.0), moved(None, 0.1), moved(0.0, 0.1)
    for name in mean:
        torch.testing.assert_close(mean[name], (plain[name] + sam[name]) / 2, rtol=1e-4, atol=1e-6)


def test_a_fixed_price_without_a_budget_charges_logits_and_scores() -> None:
    gm = small_resnet()
    result = SearchAsga(digits_like(1), lambda outputs, _: 0 * outputs.sum(), beta=0.5, logits_lr=1e-3).run(gm)
    (step,) = result.history
    assert step.beta == 0.5
    costs = cost_table(gm)
    whole = costs.total_bitops(costs.uniform(Precision(8, 8)))
    for choice, scores in zip(choices(gm), result.scores, strict=True):
        layer = costs[choice.name]
        assert scores == pytest.approx([-0.5 * layer.bitops(each) / whole for each in choice.precisions()], rel=1e-5)
        assert all(mixture.logits[0] > mixture.logits[-1] for mixture in choice.mixtures)


def test_a_search_that_stands_still_warns() -> None:
    options = SearchAsga(
        digits_like(1), lambda outputs, _: 0 * outputs.sum(), (Budget.ratio(0.2),), steps=STILL_STEPS, rho=0.0,
        logits_lr=1e-6,
    )  # fmt: skip
    with pytest.warns(RuntimeWarning, match="stands still: no logit moved by 0.01 in the last 100 of 100 steps"):
        options.run(small_resnet())


def test_nothing_of_the_two_passes_stays() -> None:
    gm = small_resnet()
    SearchAsga(digits_like(2), F.cross_entropy, (Budget.ratio(0.2),)).run(gm)
    assert all(parameter.grad is None for parameter in gm.parameters())
    assert all(mixture.held is None for choice in choices(gm) for mixture in choice.mixtures)
    assert not torch.equal(gm(torch.randn(4, 1, 8, 8)), gm(torch.randn(4, 1, 8, 8)))


def test_between_steps_the_module_is_the_unperturbed_one() -> None:
    """What `after_step` sees: the mixture of the weights as they are then."""
    gm, x, seen = small_resnet(), torch.randn(4, 1, 8, 8), []

    def evaluate(_: SearchStep) -> None:
        with torch.no_grad():
            fresh = copy.deepcopy(gm)
            for mixture in weight_mixtures(fresh):
                mixture.held = None
            seen.append((gm(x), fresh(x)))

    SearchAsga(digits_like(3), F.cross_entropy, (Budget.ratio(0.2),), after_step=evaluate).run(gm)
    assert all(torch.equal(*pair) for pair in seen)


@pytest.mark.parametrize(
    ("name", "value"),
    [("rho", -1.0), ("rho_range", (0.5, 0.1)), ("alignment", math.nan), ("steps", 2.5), ("final_temperature", 0.0)],
)
def test_settings_that_make_no_sense_are_named(name: str, value: Any) -> None:
    with pytest.raises(TrainingError, match=f"{name} of a search is"):
        SearchAsga([], F.cross_entropy, (Budget.ratio(0.2),), **{name: value})


def test_bits_alone_are_searched_where_everything_is_frozen() -> None:
    gm = small_resnet().requires_grad_(False)
    for choice in choices(gm):
        for mixture in choice.mixtures:
            mixture.logits.requires_grad_()
    gm(digits_like(1)[0][0])  # fits the levels
    before = {name: each.clone() for name, each in gm.named_parameters()}
    SearchAsga(digits_like(2), F.cross_entropy, (Budget.ratio(0.2),)).run(gm)
    moved = {name for name, each in gm.named_parameters() if not torch.equal(each, before[name])}
    assert moved == {name for name in before if name.endswith("logits")}


class Masked(nn.Module):
    """A convolution whose weight is computed from a buffer, between two others."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3)
        self.weight = nn.Parameter(torch.randn(4, 4, 3, 3))
        self.register_buffer("mask", (torch.rand(4, 4, 3, 3) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        """(N, 2, 8, 8) -> (N, 3)."""
        hidden = torch.relu(F.conv2d(torch.relu(self.stem(x)), self.weight * self.mask))
        return self.head(hidden).mean((2, 3))


def test_a_weight_computed_from_a_buffer_can_be_searched() -> None:
    x, y = torch.randn(4, 2, 8, 8), torch.randint(3, (4,))
    gm = prepare_saq(Masked(), example_inputs=x)
    RelaxPrecision((2, 4)).run(gm)
    result = SearchAsga([(x, y)], F.cross_entropy, (Budget.ratio(0.65),), steps=3).run(gm)
    assert len(result.history) == 3
    assert all(step.rho > 0 for step in result.history)


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(per_channel=True)], ids=["per tensor", "per channel"])
def test_what_is_kept_between_steps_does_not_grow(recipe: Recipe) -> None:
    x, y = torch.randn(4, 1, 8, 8), torch.randint(10, (4,))
    gm = prepare_saq(SmallResNet(4), example_inputs=x, recipe=recipe)
    RelaxPrecision((2, 4)).run(gm)
    kept = []
    with TwoPasses(gm, weight_mixtures(gm)) as passes:
        for _ in range(3):
            passes.run(lambda: F.cross_entropy(gm(x), y), 0.1, 1e-3)
            kept.append((len(passes.spare), {id(held.leaf) for held in passes.held}))
    assert kept[0] == kept[1] == kept[2]


def test_half_precision_networks_have_logits_in_full_precision() -> None:
    gm = prepare_saq(SmallResNet(4).bfloat16(), example_inputs=torch.randn(4, 1, 8, 8, dtype=torch.bfloat16))
    RelaxPrecision((2, 4)).run(gm)
    data = [(torch.randn(4, 1, 8, 8, dtype=torch.bfloat16), torch.randint(10, (4,)))]
    result = SearchAsga(data, F.cross_entropy, (Budget.ratio(0.2),), steps=2).run(gm)
    assert {mixture.logits.dtype for choice in choices(gm) for mixture in choice.mixtures} == {torch.float32}
    assert all(math.isfinite(score) for scores in result.scores for score in scores)


def test_a_relaxed_graph_loads_its_own_state() -> None:
    gm, other = small_resnet(), small_resnet()
    with torch.no_grad():
        for choice in choices(gm):
            choice.mixtures[0].logits.copy_(torch.arange(len(choice.mixtures[0].logits)))
    other.load_state_dict(gm.state_dict())
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(gm(x), other(x))
    with pytest.raises(PassError, match="bits are being searched"):
        apply_policy(gm, "W3A3")


def test_log_probabilities_stay_finite_where_probabilities_underflow() -> None:
    gm = relaxed()
    (choice,) = choices(gm)
    of_weight = torch.tensor([0.0, -800.0, -1600.0], dtype=torch.float64)
    with torch.no_grad():
        choice.mixtures[0].logits.copy_(of_weight)
    options = SearchAsga(batches(1), F.cross_entropy, beta=1e-9, logits_lr=0.0, score="probability")
    (scores,) = options.run(gm).scores
    expected = of_weight.repeat_interleave(len(BITS)) - math.log(len(BITS))
    torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), expected)
