"""Searches bit-widths by adaptive sharpness-aware gradient aligning (ASGA)."""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from saq_fx.choices import ExpectedShares, choices, weight_mixtures
from saq_fx.errors import PassError, PrecisionError, TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import Batch, ExampleInputs, split_batch, split_inputs
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.nested import map_tensors
from saq_fx.pass_base import Pass, PassResult
from saq_fx.precision import Budget
from saq_fx.resume import Generators, load_state, save_state
from saq_fx.sharpness import curvature
from saq_fx.two_passes import TwoPasses

LossFunction = Callable[[Any, Any], Tensor]

MOMENTUM = 0.9  # of the weights' SGD
SMOOTHING = 0.9  # of the gap that sets the radius
STEEPEST_START = 5.0  # largest logit per bit at the start
SCORES = ("gradient", "probability")
_FLOAT_SHARE = 16.0  # of the BitOps at W8A8: those at W32A32, which no network exceeds
_FLOAT = (Budget.ratio(_FLOAT_SHARE),)
STILL_STEPS, STILL_CHANGE = 100, 0.01  # no probability moved by so much in so many steps

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "EdMIPS": {"rho": 0.0, "score": "probability", "final_temperature": 1.0},
    "+ gradient score": {"rho": 0.0},
    "+ perturbation": {"rho_range": (0.1, 0.1), "alignment": None},
    "+ alignment": {"rho_range": (0.1, 0.1)},
    "+ adaptive radius (ASGA)": {},
}
"""Settings of `SearchAsga` that add one ingredient after the other to EdMIPS (CVPR 2020), all under one budget."""

_SETTINGS = (
    "beta", "rho", "rho_range", "alignment", "score", "weight_lr", "logits_lr", "dual_lr",
    "damping", "final_temperature",
)  # fmt: skip
_VALUES = ("done", "round_start", "round_random", "radius", "mean_gap", "price", "gains")


@dataclass(frozen=True)
class SearchStep:
    """What one step of a search saw, before it changed anything.

    Losses are the task's; `gap` is h = max(0, perturbed_loss - loss), `rho` the radius it was found with,
    `sigma` = 2h/rho**2 (None at radius 0), `cosine` that of the two gradients. `cost` is the expected cost as a
    share of the budget (of several, the one nearest to its limit; without any, of W32A32), `beta` its price in loss.
    `logits` and expected `bits` are those of each choice and operand, by name.
    """

    loss: float
    perturbed_loss: float
    gap: float
    rho: float
    sigma: float | None
    cosine: float
    cost: float
    beta: float
    temperature: float
    logits: Mapping[str, tuple[float, ...]]
    bits: Mapping[str, float]

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "SearchStep":
        """The inverse of `dataclasses.asdict`, also of what JSON has made of that."""
        return SearchStep(**{**data, "logits": {name: tuple(each) for name, each in data["logits"].items()}})


@dataclass(frozen=True)
class SearchPassResult(PassResult):
    """A searched graph; for each of its choices the score of every precision, in loss; and the steps."""

    scores: tuple[tuple[float, ...], ...]
    history: tuple[SearchStep, ...]


@dataclass(frozen=True)
class SearchAsga(Pass):
    """Trains weights and logits of a relaxed graph together, and scores its choices (arXiv 2505.04877).

    One step, with theta all that is perturbed, L the task's loss, c the expected cost as a share of the budget:

        g = grad L(theta);  g_a = grad L(theta + (rho/||g|| - a) g)        aligned (SAGM, arXiv 2303.10353)
        weights: SGD on (g + g_a)/2
        logits:  Adam on (g + g_a)/2 + (price + damping (c - 1)) grad c     augmented Lagrangian
        rho   <- clip(ln(h + 1), *rho_range), h the running mean of max(0, L_a - L)
        price <- price + dual_lr (c - 1)

    Weights are perturbed behind their mixtures, as in case 3 of SAQ; what is in front of them, and clipping levels,
    are not (see `TwoPasses`). The logits start where c = 1, and the price holds it there while the temperature of the
    mixtures falls.

    A candidate's score is `sum_c p_c dL/dp_c - dL/dp_b`, the first-order gain in loss of a mixture that moves to
    it: the mean over the steps and both passes. Complexity is left out of it, for the allocation under the budget
    would charge the price of the bits a second time.

    Args:
        batches: (inputs, targets) pairs; iterated again where `steps` asks for more, and moved to the graph's device.
        loss_fn: of outputs and targets; a 0-d tensor.
        budgets: c is the largest share of any of them.
        beta: a fixed price, in loss, of the expected BitOps as a share of those at W8A8; taken off the scores as well.
        steps: of training; None for one pass over the batches.
        rho: first radius, in one global norm; 0 leaves out the second pass (EdMIPS).
        rho_range: smallest and largest radius; two equal numbers fix it.
        alignment: a; None steps with g_a alone, at a = 0 (SAM).
        score: "gradient" as above, or "probability" for the log-probabilities at the end (EdMIPS).
        weight_lr, logits_lr, dual_lr: learning rates of weights and clipping levels, of logits, of the price.
        final_temperature: of the last step; the first one has 1.
        after_step: called with what each step saw, for logging.
        checkpoint: a file that holds the state of the search; where it exists, the search goes on from it.
        checkpoint_steps: steps from one writing of the file to the next.
    """

    batches: Iterable[Batch]
    loss_fn: LossFunction
    budgets: tuple[Budget, ...] = ()
    beta: float = 0.0
    steps: int | None = None
    rho: float = 0.1
    rho_range: tuple[float, float] = (0.05, 0.5)
    alignment: float | None = 1e-3
    score: str = "gradient"
    weight_lr: float = 0.02
    logits_lr: float = 0.02
    dual_lr: float = 0.1
    damping: float = 5.0
    final_temperature: float = 0.3
    after_step: Callable[[SearchStep], None] | None = None
    checkpoint: str | os.PathLike[str] | None = None
    checkpoint_steps: int = 100
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "shapes", "quantizers"})

    def __post_init__(self) -> None:
        if not self.budgets and not self.beta > 0:
            raise PrecisionError("a search needs at least one budget, or a price beta > 0 of the cost")
        if self.score not in SCORES:
            raise PrecisionError(f"there is no score {self.score!r}: use {' or '.join(map(repr, SCORES))}")
        smallest, largest = self.rho_range
        for name, valid, form in (
            ("beta", 0 <= self.beta < math.inf, "0 or a positive number"),
            ("steps", self.steps is None or isinstance(self.steps, int), "a whole number, or None"),
            ("rho", 0 <= self.rho < math.inf, "0 or a positive radius"),
            ("rho_range", 0 <= smallest <= largest < math.inf, "the smallest and the largest radius"),
            ("alignment", self.alignment is None or math.isfinite(self.alignment), "a number, or None"),
            ("weight_lr", 0 <= self.weight_lr < math.inf, "0 or a positive number"),
            ("logits_lr", 0 <= self.logits_lr < math.inf, "0 or a positive number"),
            ("dual_lr", 0 <= self.dual_lr < math.inf, "0 or a positive number"),
            ("damping", 0 <= self.damping < math.inf, "0 or a positive number"),
            ("final_temperature", 0 < self.final_temperature < math.inf, "a positive number"),
            ("checkpoint_steps", self.checkpoint_steps >= 1, "at least one"),
        ):
            if not valid:
                raise TrainingError(f"{name} of a search is {getattr(self, name)!r}: give {form}")

    def run(self, gm: SaqGraphModule) -> SearchPassResult:
        """Trains `gm`, whose graph stays as it is.

        Raises:
            InfeasibleBudgetError: before any training.
            PassError: the graph has no mixtures.
            TrainingError: the batches run out, or a loss or gradient is not finite.
            CheckpointError: the checkpoint is not one of this search.
        """
        search = _Search(gm, self)
        if self.checkpoint is not None and Path(self.checkpoint).exists():
            search.resume()
        gm.train()
        with search.passes:
            for inputs, targets in self._repeated_batches(search):
                step = search.step(self._closure(gm, inputs, targets))
                if self.after_step is not None:
                    self.after_step(step)
                if self.checkpoint is not None and search.done % self.checkpoint_steps == 0:
                    search.save()
        return SearchPassResult(gm, False, search.scores(), tuple(search.history))

    def _closure(self, gm: SaqGraphModule, inputs: ExampleInputs, targets: Any) -> Callable[[], Tensor]:
        args, kwargs = split_inputs(inputs)
        return lambda: self.loss_fn(gm(*args, **kwargs), targets)

    def step_count(self) -> int:
        """How many steps there will be; raises TrainingError where nothing tells."""
        if self.steps is None and not isinstance(self.batches, Sized):
            raise TrainingError("the batches have no length: say with `steps` how many steps to search")
        steps = len(self.batches) if self.steps is None else self.steps  # type: ignore[arg-type]
        if steps < 1:
            raise TrainingError(f"a search of {steps} steps finds nothing: pass batches, and at least one step")
        return steps

    def _repeated_batches(self, search: "_Search") -> Iterator[Batch]:
        """The batches of all steps that are left; after resuming, from the middle of a round through them."""
        while search.done < search.steps:
            before = search.round_start
            for batch in search.round_of(self.batches):
                yield split_batch(map_tensors(search.place, batch))
                if search.done == search.steps:
                    return
            if search.done == before:
                raise TrainingError(
                    f"the batches ran out after {search.done} of {search.steps} steps: pass a list or a loader"
                )


class _Search:
    """The state of a search: two optimizers, the radius, the price, and what the candidates have gained."""

    def __init__(self, gm: SaqGraphModule, options: SearchAsga) -> None:
        self.gm, self.options = gm, options
        self.steps, self.done = options.step_count(), 0
        self.choices = choices(gm)
        if not self.choices:
            raise PassError("the graph has no mixtures to search: run RelaxPrecision, and leave a layer unpinned")
        self.shares = ExpectedShares(gm, self.choices, options.budgets or _FLOAT)
        self.complexity = ExpectedShares(gm, self.choices, _FLOAT)
        self.mixtures = {
            label: mixture
            for choice in self.choices
            for label, mixture in zip(choice.labels, choice.mixtures, strict=True)
        }
        self.logits = [mixture.logits for mixture in self.mixtures.values()]
        self.passes = TwoPasses(gm, weight_mixtures(gm))
        weights = [each for each in self.passes.parameters if each not in set(self.logits)]
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.Adam(self.logits, options.logits_lr)]
        if weights:  # else all is frozen, and the bits alone are searched
            self.optimizers.append(torch.optim.SGD(weights, options.weight_lr, momentum=MOMENTUM))
        self.radius, self.mean_gap, self.price = options.rho, 0.0, 0.0
        self.gains = [torch.zeros_like(logits) for logits in self.logits]
        self.history: list[SearchStep] = []
        self.generators = Generators(self.logits[0].device, options.batches)
        self.round_start, self.round_random = 0, self.generators.state()
        if options.budgets:
            self._start_at_budget()

    @torch.no_grad()
    def _start_at_budget(self) -> None:
        """Charges each bit of every layer alike, so much that the expected cost is the budget."""
        low, high = -STEEPEST_START, STEEPEST_START
        for _ in range(50):
            price = (low + high) / 2
            for mixture in self.mixtures.values():
                mixture.logits.copy_(-price * mixture.logits.new_tensor(mixture.candidates))
            low, high = (price, high) if float(self.shares().max()) > 1 else (low, price)

    def round_of(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """One round through the batches; after resuming, what the interrupted round has left."""
        here = self.generators.state()
        skipped = self.done - self.round_start
        if not skipped:
            self.round_random = here
        self.generators.restore(self.round_random)  # it decides how a loader shuffles
        rest = iter(batches)
        if skipped:
            for _ in islice(rest, skipped):
                pass
            self.generators.restore(here)
        yield from rest
        self.round_start = self.done

    def place(self, tensor: Tensor) -> Tensor:
        """A tensor of a batch where the graph is."""
        return tensor.to(self.logits[0].device)

    def step(self, closure: Callable[[], Tensor]) -> SearchStep:
        """One step, as `SearchAsga` writes it."""
        temperature = self.options.final_temperature ** (self.done / max(1, self.steps - 1))
        for module in self.gm.modules():
            if isinstance(module, MixtureQuantizer):
                module.temperature = temperature
        try:
            losses = self.passes.run(closure, self.radius, self.options.alignment)
        except TrainingError as error:
            raise TrainingError(f"step {self.done + 1} of the search: {error}") from error
        self._count_gains()
        trajectory = self._trajectory()
        cost = self._descend()
        gap, rho, price = max(0.0, losses.perturbed_loss - losses.loss), self.radius, self.price
        self._adapt(gap, cost)
        step = SearchStep(
            losses.loss,
            losses.perturbed_loss,
            gap,
            rho,
            curvature(gap, rho) if rho else None,
            losses.cosine,
            cost,
            price if self.options.budgets else self.options.beta,
            temperature,
            **trajectory,
        )
        self.history.append(step)
        self._warn_if_still()
        return step

    @torch.no_grad()
    def _count_gains(self) -> None:
        """Adds each candidate's gain: by the derivative of the softmax, `dL/dz_b` is `-p_b/T` times that."""
        for gain, mixture in zip(self.gains, self.mixtures.values(), strict=True):
            if mixture.logits.grad is not None:
                probabilities = mixture.probabilities().clamp_min(torch.finfo(gain.dtype).tiny)
                gain -= mixture.logits.grad * mixture.temperature / probabilities

    def _descend(self) -> float:
        """Steps both optimizers; returns the expected cost, as a share of the budget, before the step."""
        cost = self.shares().max()
        share = float(cost.detach())
        charge = cost.new_zeros(())
        if self.options.budgets:
            charge = charge + (self.price + self.options.damping * (share - 1)) * cost
        if self.options.beta:
            charge = charge + self.options.beta * _FLOAT_SHARE * self.complexity().sum()
        for logits, slope in zip(self.logits, torch.autograd.grad(charge, self.logits), strict=True):
            logits.grad = slope if logits.grad is None else logits.grad + slope
        for optimizer in self.optimizers:
            optimizer.step()
        return share

    def _adapt(self, gap: float, cost: float) -> None:
        """The radius and the price for the next step."""
        self.mean_gap = gap if self.done == 0 else SMOOTHING * self.mean_gap + (1 - SMOOTHING) * gap
        if self.radius > 0:
            smallest, largest = self.options.rho_range
            self.radius = min(max(math.log1p(self.mean_gap), smallest), largest)
        self.price += self.options.dual_lr * (cost - 1)
        self.done += 1

    def _warn_if_still(self) -> None:
        """Warns if no logit has moved for many steps: nothing then is being searched."""
        if self.done % STILL_STEPS or self.done < STILL_STEPS:
            return
        before, now = (
            {name: each for name, each in self.history[index].logits.items() if len(each) > 1}
            for index in (-STILL_STEPS, -1)
        )
        if now and all(max(map(abs, map(float.__sub__, now[name], before[name]))) < STILL_CHANGE for name in now):
            warnings.warn(
                f"the search stands still: no logit moved by {STILL_CHANGE} in the last {STILL_STEPS} of {self.done} "
                "steps. Raise logits_lr, or see whether the loss depends on the quantized layers.",
                RuntimeWarning,
                stacklevel=4,
            )

    def scores(self) -> tuple[tuple[float, ...], ...]:
        """For each choice, the score of every precision."""
        if self.options.score == "probability":
            return tuple(tuple(choice.log_probabilities().tolist()) for choice in self.choices)
        gains, found = iter(self.gains), []
        for choice, costs in zip(self.choices, self.complexity.tables, strict=True):
            gain = choice.over_pairs(torch.add, [next(gains) for _ in choice.mixtures]) / self.done
            found.append(tuple((gain - self.options.beta * _FLOAT_SHARE * costs[:, 0]).tolist()))
        return tuple(found)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes two searches different ones."""
        return {
            "steps": self.steps,
            "candidates": {name: list(mixture.candidates) for name, mixture in self.mixtures.items()},
            "budgets": list(map(str, self.options.budgets)),
            "generators of the loader": len(self.generators.of_loader),
            **{name: getattr(self.options, name) for name in _SETTINGS},
        }

    def save(self) -> None:
        """Writes all that the steps to come depend on."""
        values = {
            **self.settings,
            **{name: getattr(self, name) for name in _VALUES},
            "history": [asdict(step) for step in self.history],
        }
        save_state(self.options.checkpoint or "", self.gm, self.optimizers, self.generators, values)

    def resume(self) -> None:
        """Goes on from what `save` wrote."""
        values = load_state(self.options.checkpoint or "", self.gm, self.optimizers, self.generators, self.settings)
        self.history = list(map(SearchStep.from_dict, values["history"]))
        for name in _VALUES:
            setattr(self, name, values[name])

    def _trajectory(self) -> dict[str, dict[str, Any]]:
        """Logits and expected bits of every choice and operand, by name."""
        items = self.mixtures.items()
        return {
            "logits": {name: tuple(mixture.logits.tolist()) for name, mixture in items},
            "bits": {name: float(mixture.expected_bits().detach()) for name, mixture in items},
        }
