"""Searches bit-widths by adaptive sharpness-aware gradient aligning (ASGA)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from saq_fx.cost import budget_constraints, cost_table
from saq_fx.errors import PassError, PrecisionError, TrainingError
from saq_fx.graph import SaqGraphModule
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.pass_base import Pass, PassResult
from saq_fx.passes.relax_precision import Choice, choices
from saq_fx.precision import Budget
from saq_fx.quantizers import Quantizer
from saq_fx.sharpness import (
    RandomState,
    ascent_scale,
    curvature,
    global_norm,
    inner_product,
    perturbed,
    preserve_buffers,
)
from saq_fx.tracing import ExampleInputs, split_inputs

Batch = tuple[ExampleInputs, Any]
LossFunction = Callable[[Any, Any], Tensor]

MOMENTUM = 0.9  # of the weights' SGD
SMOOTHING = 0.9  # of the gap that sets the radius
STEEPEST_START = 5.0  # largest logit per bit at the start


@dataclass(frozen=True)
class SearchStep:
    """What one step of a search saw, before it changed anything.

    Losses are the task's; `gap` is h = max(0, perturbed_loss - loss), `rho` the radius it was found with,
    `sigma` = 2h/rho**2 (None at radius 0), `cosine` that of the two gradients. `cost` is the expected cost as a
    share of the budget (of several, the one nearest to its limit), `beta` its price in loss.
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


@dataclass(frozen=True)
class SearchPassResult(PassResult):
    """A searched graph; for each of its choices the score of every precision, in loss; and the steps."""

    scores: tuple[tuple[float, ...], ...]
    history: tuple[SearchStep, ...]


@dataclass(frozen=True)
class SearchAsga(Pass):
    """Trains weights and logits of a relaxed graph together, and scores its choices (arXiv 2505.04877).

    One step, with theta all weights and logits, L the task's loss, c the expected cost as a share of the budget:

        g = grad L(theta);  g_a = grad L(theta + (rho/||g|| - a) g)        aligned (SAGM, arXiv 2303.10353)
        weights: SGD on (g + g_a)/2
        logits:  Adam on (g + g_a)/2 + (beta + damping (c - 1)) grad c     augmented Lagrangian
        rho  <- clip(ln(h + 1), *rho_range), h the running mean of max(0, L_a - L)
        beta <- beta + dual_lr (c - 1)

    The logits start where c = 1, and beta holds it there while the temperature of the mixtures falls. Clipping
    levels are trained but not perturbed. The second pass sees the first one's random numbers and moves no buffer.

    A candidate's score is `sum_c p_c dL/dp_c - dL/dp_b`, the first-order gain in loss of a mixture that moves to
    it: the mean over the steps and both passes. Complexity is left out of it, for the allocation under the budget
    would charge the price of the bits a second time.

    Args:
        batches: (inputs, targets) pairs; iterated again where `steps` asks for more.
        loss_fn: of outputs and targets; a 0-d tensor.
        budgets: c is the largest share of any of them.
        steps: of training; None for one pass over the batches.
        rho: first radius, in one global norm; 0 leaves out the second pass (EdMIPS).
        rho_range: smallest and largest radius; two equal numbers fix it.
        alignment: a; 0 for the plain sharpness-aware gradient.
        weight_lr, logits_lr, dual_lr: learning rates of weights and clipping levels, of logits, of beta.
        final_temperature: of the last step; the first one has 1.
        after_step: called with what each step saw, for logging.
    """

    batches: Iterable[Batch]
    loss_fn: LossFunction
    budgets: tuple[Budget, ...]
    steps: int | None = None
    rho: float = 0.1
    rho_range: tuple[float, float] = (0.05, 0.5)
    alignment: float = 1e-3
    weight_lr: float = 0.02
    logits_lr: float = 0.02
    dual_lr: float = 0.1
    damping: float = 5.0
    final_temperature: float = 0.3
    after_step: Callable[[SearchStep], None] | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "shapes", "quantizers"})

    def __post_init__(self) -> None:
        if not self.budgets:
            raise PrecisionError("a search needs at least one budget")

    def run(self, gm: SaqGraphModule) -> SearchPassResult:
        """Trains `gm`, whose graph stays as it is.

        Raises:
            InfeasibleBudgetError: before any training.
            PassError: the graph has no mixtures.
            TrainingError: the batches run out, or a loss or gradient is not finite.
        """
        search = _Search(gm, self)
        history = []
        gm.train()
        for inputs, targets in self._repeated_batches(search.steps):
            history.append(search.step(self._closure(gm, inputs, targets)))
            if self.after_step is not None:
                self.after_step(history[-1])
        return SearchPassResult(gm, False, search.scores(), tuple(history))

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

    def _repeated_batches(self, steps: int) -> Iterator[Batch]:
        done = 0
        while done < steps:
            before = done
            for batch in islice(self.batches, steps - done):
                yield batch
                done += 1
            if done == before:
                raise TrainingError(f"the batches ran out after {done} of {steps} steps: pass a list or a loader")


class _Search:
    """The state of a search: two optimizers, the radius, the price, and what the candidates have gained."""

    def __init__(self, gm: SaqGraphModule, options: SearchAsga) -> None:
        self.gm, self.options = gm, options
        self.steps, self.done = options.step_count(), 0
        self.choices = choices(gm)
        if not self.choices:
            raise PassError("the graph has no mixtures to search: run RelaxPrecision, and leave a layer unpinned")
        self.shares = ExpectedShares(gm, self.choices, options.budgets)
        self.mixtures = [mixture for choice in self.choices for mixture in choice.mixtures]
        self.logits = [mixture.logits for mixture in self.mixtures]
        weights = [each for each in gm.parameters() if each.requires_grad and each not in set(self.logits)]
        self.parameters = [*weights, *self.logits]
        quantizers = (module for module in gm.modules() if isinstance(module, Quantizer))
        self.levels = {level for quantizer in quantizers for level in quantizer.parameters()}
        self.optimizers = (
            torch.optim.SGD(weights, options.weight_lr, momentum=MOMENTUM),
            torch.optim.Adam(self.logits, options.logits_lr),
        )
        self.rho, self.mean_gap, self.beta = options.rho, 0.0, 0.0
        self.gains = [torch.zeros_like(logits) for logits in self.logits]
        self._start_at_budget()

    @torch.no_grad()
    def _start_at_budget(self) -> None:
        """Charges each bit of every layer alike, so much that the expected cost is the budget."""
        low, high = -STEEPEST_START, STEEPEST_START
        for _ in range(50):
            price = (low + high) / 2
            for mixture in self.mixtures:
                mixture.logits.copy_(-price * mixture.logits.new_tensor(mixture.candidates))
            low, high = (price, high) if float(self.shares().max()) > 1 else (low, price)

    def step(self, closure: Callable[[], Tensor]) -> SearchStep:
        """One step, as `SearchAsga` writes it."""
        temperature = self.options.final_temperature ** (self.done / max(1, self.steps - 1))
        for module in self.gm.modules():
            if isinstance(module, MixtureQuantizer):
                module.temperature = temperature
        loss, perturbed_loss, gradient, aligned = self._two_passes(closure)
        norms = float(global_norm(gradient) * global_norm(aligned))
        cosine = float(inner_product(gradient, aligned)) / norms if norms else 0.0
        mean = [(first + second) / 2 for first, second in zip(gradient, aligned, strict=True)]
        self._count_gains(mean[-len(self.logits) :])
        cost = self._descend(mean)
        gap, rho, beta = max(0.0, perturbed_loss - loss), self.rho, self.beta
        self._adapt(gap, cost)
        sigma = curvature(gap, rho) if rho else None
        return SearchStep(loss, perturbed_loss, gap, rho, sigma, cosine, cost, beta, temperature)

    def _two_passes(self, closure: Callable[[], Tensor]) -> tuple[float, float, list[Tensor], list[Tensor]]:
        """L, L_a, g and g_a."""
        random_state = RandomState(self.parameters)
        loss, gradient = self._differentiate(closure)
        if self.rho == 0:
            return loss, loss, gradient, gradient
        of_parameter = zip(self.parameters, gradient, strict=True)
        ascent = {parameter: slope for parameter, slope in of_parameter if parameter not in self.levels}
        directions = list(ascent.values())
        scale = ascent_scale(float(global_norm(directions)), self.rho) - self.options.alignment
        moved = perturbed(list(ascent), directions, scale)
        with moved, preserve_buffers(self.gm), random_state.replay():
            perturbed_loss, aligned = self._differentiate(closure)
        return loss, perturbed_loss, gradient, aligned

    def _differentiate(self, closure: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
        loss = closure()
        gradient = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        value, norm = float(loss.detach()), float(global_norm(gradient))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.done + 1} of the search has loss {value:g} and gradient norm {norm:g}: look at the "
                "batch, or lower the learning rates"
            )
        return value, list(gradient)

    @torch.no_grad()
    def _count_gains(self, gradient: list[Tensor]) -> None:
        """Adds each candidate's gain: by the derivative of the softmax, `dL/dz_b` is `-p_b/T` times that."""
        for gain, mixture, slope in zip(self.gains, self.mixtures, gradient, strict=True):
            probabilities = mixture.probabilities().clamp_min(torch.finfo(slope.dtype).tiny)
            gain -= slope * mixture.temperature / probabilities

    def _descend(self, gradient: list[Tensor]) -> float:
        """Steps both optimizers; returns the expected cost, as a share of the budget, before the step."""
        cost = self.shares().max()
        share = float(cost.detach())
        price = self.beta + self.options.damping * (share - 1)
        charges = torch.autograd.grad(cost * price, self.logits, materialize_grads=True)
        for parameter, slope in zip(self.parameters, gradient, strict=True):
            parameter.grad = slope
        for logits, charge in zip(self.logits, charges, strict=True):
            logits.grad = charge if logits.grad is None else logits.grad + charge
        for optimizer in self.optimizers:
            optimizer.step()
        return share

    def _adapt(self, gap: float, cost: float) -> None:
        """The radius and the price for the next step."""
        self.mean_gap = gap if self.done == 0 else SMOOTHING * self.mean_gap + (1 - SMOOTHING) * gap
        if self.rho > 0:
            smallest, largest = self.options.rho_range
            self.rho = min(max(math.log1p(self.mean_gap), smallest), largest)
        self.beta += self.options.dual_lr * (cost - 1)
        self.done += 1

    def scores(self) -> tuple[tuple[float, ...], ...]:
        """For each choice, the mean gain of every precision."""
        gains = iter(self.gains)
        return tuple(
            tuple((choice.over_pairs(torch.add, [next(gains) for _ in choice.mixtures]) / self.done).tolist())
            for choice in self.choices
        )


class ExpectedShares:
    """The cost that each constraint expects of the mixtures, as a share of its limit; differentiable.

    Closed form: a layer's expected BitOps are `MACs E[b_w] E[b_a]`; in a product, whose operands have the same
    bits, `MACs E[b**2]`.
    """

    def __init__(self, gm: SaqGraphModule, choices: Sequence[Choice], budgets: Sequence[Budget]) -> None:
        costs = cost_table(gm)
        candidates = {choice.name: choice.precisions() for choice in choices}
        constraints = budget_constraints(budgets, costs, candidates)
        like = choices[0].mixtures[0].logits
        tables = {
            group: like.new_tensor([[cost / each.limit for cost in each.costs[row]] for each in constraints])
            for row, group in enumerate(costs.groups)
        }
        self.of_choice = [(choice, tables.pop(choice.name)) for choice in choices]
        self.fixed = sum((table[:, 0] for table in tables.values()), like.new_zeros(len(constraints)))

    def __call__(self) -> Tensor:
        """One share for each constraint, (constraints,)."""
        return sum((table @ choice.probabilities() for choice, table in self.of_choice), self.fixed)
