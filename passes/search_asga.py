"""Searches bit-widths by adaptive sharpness-aware gradient aligning (ASGA)."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saq_fx.cost import budget_constraints, cost_table
from saq_fx.errors import TrainingError
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

    `gap` is h = perturbed_loss - loss, `rho` the radius it was found with, `sigma` = 2h/rho**2, `cosine` that of the
    two gradients. `costs` are the expected ones and `betas` their prices, one for each constraint of the budget; a
    cost of 1 is the whole budget.
    """

    loss: float
    perturbed_loss: float
    gap: float
    rho: float
    sigma: float
    cosine: float
    costs: tuple[float, ...]
    betas: tuple[float, ...]
    temperature: float


@dataclass(frozen=True)
class SearchPassResult(PassResult):
    """A searched graph: for each of its choices the score of every precision, in loss; and the steps."""

    scores: tuple[tuple[float, ...], ...]
    history: tuple[SearchStep, ...]


@dataclass(frozen=True)
class SearchAsga(Pass):
    """Trains weights and logits of a relaxed graph together, and scores what can be chosen (arXiv 2505.04877).

    One step, with theta all weights and logits, L the loss of the task, C_k/B_k the expected cost per budget:

        g = grad L(theta);  g_a = grad L(theta + (rho/||g|| - a) g)              (gradient aligning: SAGM, CVPR 2023)
        weights:  SGD on (g + g_a)/2
        logits:   Adam on (g + g_a)/2 + grad sum_k beta_k C_k/B_k + damping/2 (C_k/B_k - 1)_+^2
        rho    <- clip(ln(1 + h), *rho_range),  h the running mean of max(0, L_a - L)          (adaptive radius)
        beta_k <- max(0, beta_k + dual_lr (C_k/B_k - 1))

    The logits start where the expected cost is the budget, and beta holds it there while the temperature falls.
    The score of a candidate is its task gradient: -(dL/dp_b - sum_c p_c dL/dp_c), the first-order gain of a mixture
    that moves to it, mean over both passes of all steps. The price of its bits is no part of it, since the
    allocation under the budget would then charge it twice.

    Args:
        batches: (inputs, targets), iterated again where `steps` asks for more.
        loss_fn: of outputs and targets, the mean loss.
        budgets: what the expected cost is held at.
        steps: of training; None for one pass over `batches`.
        rho: first radius; 0 leaves out the second pass (EdMIPS).
        rho_range: bounds of the radius; twice the same number makes it fixed.
        alignment: a.
        weight_lr, logits_lr, dual_lr: learning rates.
        after_step: called with each step, for logging.
    """

    batches: Iterable[Batch]
    loss_fn: LossFunction
    budgets: tuple[Budget, ...]
    steps: int | None = None
    rho: float = 0.1
    rho_range: tuple[float, float] = (0.01, 0.5)
    alignment: float = 1e-3
    weight_lr: float = 0.02
    logits_lr: float = 0.02
    dual_lr: float = 0.1
    damping: float = 1.0
    final_temperature: float = 0.3
    after_step: Callable[[SearchStep], None] | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "shapes", "quantizers"})

    def run(self, gm: SaqGraphModule) -> SearchPassResult:
        """Trains `gm`, whose graph stays as it is.

        Raises:
            InfeasibleBudgetError: before any training.
            TrainingError: the batches run out, or a loss or gradient is not finite.
        """
        search = _Search(gm, self)
        history = []
        gm.train()
        for inputs, targets in self._repeated_batches(search.steps):
            args, kwargs = split_inputs(inputs)
            history.append(search.step(lambda: self.loss_fn(gm(*args, **kwargs), targets)))  # noqa: B023
            if self.after_step is not None:
                self.after_step(history[-1])
        return SearchPassResult(gm, False, search.scores(), tuple(history))

    def step_count(self) -> int:
        if self.steps is not None:
            return self.steps
        if not isinstance(self.batches, Sized):
            raise TrainingError("the batches have no length: say with steps=... how many to search for")
        return len(self.batches)

    def _repeated_batches(self, steps: int) -> Iterator[Batch]:
        done = 0
        while done < steps:
            before = done
            for batch in islice(self.batches, steps - done):
                yield batch
                done += 1
            if done == before:
                raise TrainingError(f"the batches ran out after {done} of {steps} steps: pass a list or a DataLoader")


class _Search:
    """The state of a search: two optimizers, radius, prices, temperature and what the candidates gained."""

    def __init__(self, gm: SaqGraphModule, options: SearchAsga) -> None:
        self.gm, self.options = gm, options
        self.steps, self.done = options.step_count(), 0
        self.choices = choices(gm)
        self.expected_costs = _ExpectedCosts(gm, self.choices, options.budgets)
        self.mixtures = [mixture for choice in self.choices for mixture in choice.mixtures]
        self.logits = [mixture.logits for mixture in self.mixtures]
        self.weights = _trainable(gm, without=self.logits)
        levels = {level for each in gm.modules() if isinstance(each, Quantizer) for level in each.parameters()}
        self.perturbed = [index for index, each in enumerate(self._parameters()) if each not in levels]
        self.weight_optimizer = torch.optim.SGD(self.weights, options.weight_lr, momentum=MOMENTUM)
        self.logits_optimizer = torch.optim.Adam(self.logits, options.logits_lr)
        self.rho, self.mean_gap = options.rho, 0.0
        self.betas = torch.zeros(self.expected_costs.count)
        self.gains = [torch.zeros_like(logits) for logits in self.logits]
        self._start_at_budget()

    def _parameters(self) -> list[nn.Parameter]:
        return [*self.weights, *self.logits]

    @torch.no_grad()
    def _start_at_budget(self) -> None:
        """Charges every bit of every layer alike, so that the expected cost is the budget."""
        low, high = -STEEPEST_START, STEEPEST_START
        for _ in range(50):
            price = (low + high) / 2
            for mixture in self.mixtures:
                mixture.logits.copy_(-price * mixture.logits.new_tensor(mixture.candidates))
            low, high = (price, high) if bool((self.expected_costs() > 1).any()) else (low, price)

    def step(self, closure: Callable[[], Tensor]) -> SearchStep:
        """One step, as `SearchAsga` has it."""
        temperature = self.options.final_temperature ** (self.done / max(1, self.steps - 1))
        for module in self.gm.modules():
            if isinstance(module, MixtureQuantizer):
                module.temperature = temperature
        loss, above, gradient, aligned = self._two_gradients(closure)
        mean = [(first + second) / 2 for first, second in zip(gradient, aligned, strict=True)]
        self._count_gains(mean[len(self.weights) :])
        costs = self._descend(mean)
        gap = max(0.0, above - loss)
        norms = global_norm(gradient) * global_norm(aligned)
        seen = SearchStep(
            loss=loss,
            perturbed_loss=above,
            gap=gap,
            rho=self.rho,
            sigma=curvature(gap, self.rho) if self.rho else math.nan,
            cosine=float(inner_product(gradient, aligned) / norms),
            costs=tuple(costs.tolist()),
            betas=tuple(self.betas.tolist()),
            temperature=temperature,
        )
        self._adapt(gap, costs)
        return seen

    def _two_gradients(self, closure: Callable[[], Tensor]) -> tuple[float, float, list[Tensor], list[Tensor]]:
        """L, L_a, g and g_a."""
        random_state = RandomState(self._parameters())
        loss, gradient = self._backward(closure)
        if self.options.rho == 0:
            return loss, loss, gradient, gradient
        parameters = [self._parameters()[index] for index in self.perturbed]
        directions = [gradient[index] for index in self.perturbed]
        scale = ascent_scale(float(global_norm(directions)), self.rho) - self.options.alignment
        moved = perturbed(parameters, directions, scale)
        with moved, preserve_buffers(self.gm), random_state.replay():
            above, aligned = self._backward(closure)
        return loss, above, gradient, aligned

    def _backward(self, closure: Callable[[], Tensor]) -> tuple[float, list[Tensor]]:
        loss = closure()
        gradient = list(torch.autograd.grad(loss, self._parameters(), allow_unused=True, materialize_grads=True))
        value, norm = float(loss.detach()), float(global_norm(gradient))
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise TrainingError(
                f"step {self.done + 1} of the search has loss {value:g} and gradient norm {norm:g}: look at the batch, "
                "or lower the learning rates"
            )
        return value, gradient

    @torch.no_grad()
    def _count_gains(self, gradient: list[Tensor]) -> None:
        """Adds up -dL/dp_b, but for the mean over the mixture: by the softmax, dL/dz_b is p_b/T times that."""
        for gain, mixture, slope in zip(self.gains, self.mixtures, gradient, strict=True):
            probabilities = mixture.probabilities()
            gain -= slope * mixture.temperature / probabilities.clamp_min(torch.finfo(slope.dtype).tiny)

    def _descend(self, gradient: list[Tensor]) -> Tensor:
        """Steps both optimizers; returns the expected costs before the step."""
        costs = self.expected_costs()
        excess = costs.detach() - 1
        prices = (self.betas + self.options.damping * excess).clamp_min(0)
        charged = torch.autograd.grad((prices * costs).sum(), self.logits)
        for parameter, slope in zip(self._parameters(), gradient, strict=True):
            parameter.grad = slope
        for logits, slope in zip(self.logits, charged, strict=True):
            logits.grad += slope
        self.weight_optimizer.step()
        self.logits_optimizer.step()
        return costs.detach()

    def _adapt(self, gap: float, costs: Tensor) -> None:
        """Radius and prices for the next step."""
        self.mean_gap = gap if self.done == 0 else SMOOTHING * self.mean_gap + (1 - SMOOTHING) * gap
        smallest, largest = self.options.rho_range
        self.rho = min(max(math.log1p(self.mean_gap), smallest), largest)
        self.betas = (self.betas + self.options.dual_lr * (costs - 1)).clamp_min(0)
        self.done += 1

    def scores(self) -> tuple[tuple[float, ...], ...]:
        """For every choice, the mean gain of each of its precisions."""
        of_mixture = dict(zip(self.mixtures, self.gains, strict=True))
        return tuple(
            tuple((choice.over_pairs(torch.add, [of_mixture[each] for each in choice.mixtures]) / self.done).tolist())
            for choice in self.choices
        )


class _ExpectedCosts:
    """The cost that each constraint expects of the mixtures, as a share of its limit: closed form, differentiable.

    A layer's expected BitOps are `MACs E[b_w] E[b_a]`, and `MACs E[b**2]` in a product, whose operands share `b`.
    """

    def __init__(self, gm: SaqGraphModule, choices: Sequence[Choice], budgets: Sequence[Budget]) -> None:
        self.choices = choices
        costs = cost_table(gm)
        constraints = budget_constraints(budgets, costs, {choice.name: choice.precisions() for choice in choices})
        like = choices[0].mixtures[0].logits
        of_group = {
            group: like.new_tensor([[cost / each.limit for cost in each.costs[row]] for each in constraints])
            for row, group in enumerate(costs.groups)
        }
        self.count = len(constraints)
        self.of_choice = [of_group.pop(choice.name) for choice in choices]
        self.fixed = sum((table[:, 0] for table in of_group.values()), like.new_zeros(self.count))

    def __call__(self) -> Tensor:
        """(constraints,)"""
        expected = self.fixed
        for choice, table in zip(self.choices, self.of_choice, strict=True):
            expected = expected + table @ choice.probabilities()
        return expected


def _trainable(gm: SaqGraphModule, without: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    left_out = set(without)
    return [each for each in gm.parameters() if each.requires_grad and each not in left_out]
