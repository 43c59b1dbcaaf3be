"""What a sharpness-aware step can be told, and what it tells."""

import inspect
import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from saq_fx.errors import TrainingError
from saq_fx.passes.insert_perturbations import CASES

LOSSES = ("both", "vanilla", "perturbed")
PERTURBABLE = ("bias", "norm", "clipping")


@dataclass(frozen=True)
class StepStatistics:
    """What one step saw; losses are 0-d tensors, means over the batch and over data-parallel workers.

    `perturbed_loss` is that of the samples of the second pass, which may be those of the largest losses.

    `cosine` is that of the two gradients g and g_s, `perturbed_gradient_norm` is ||g_s||. `moved_share` is the share of
    quantized weights that the perturbation moved to another level, in case 2, where rounding can swallow it. These
    are None where no second pass ran; `cosine` also where a gradient is zero.
    """

    loss: Tensor
    gradient_norm: float
    perturbed_loss: Tensor | None = None
    perturbed_gradient_norm: float | None = None
    cosine: float | None = None
    moved_share: float | None = None
    skipped: bool = False

    @property
    def second_pass(self) -> bool:
        """Whether a second forward and backward pass ran."""
        return self.perturbed_loss is not None


def check_options(rho: float, case: int, period: int, beta: float, losses: str, perturb: Collection[str]) -> None:
    """Raises TrainingError naming the first option of SAQ that makes no sense."""
    if not (_is_number(rho) and 0 <= rho < math.inf):
        raise TrainingError(f"rho must be a finite number of at least 0, not {rho!r}")
    if case not in CASES:
        raise TrainingError(f"case must be 1, 2 or 3, not {case!r}")
    if not (isinstance(period, int) and period >= 1):
        raise TrainingError(f"period must be a whole number of at least 1, not {period!r}")
    if not (_is_number(beta) and math.isfinite(beta)):
        raise TrainingError(f"beta must be finite, not {beta!r}")
    if losses not in LOSSES:
        raise TrainingError(f"losses must be one of {', '.join(LOSSES)}, not {losses!r}")
    unknown = sorted(str(each) for each in set(perturb) - set(PERTURBABLE))
    if unknown:
        raise TrainingError(f"perturb takes {', '.join(PERTURBABLE)}, not {', '.join(unknown)}")


def check_cuts(chunk_size: int | None, second_pass_fraction: float, max_gradient_norm: float | None) -> None:
    """Raises TrainingError naming the first option about parts of batches, or about clipping, that makes no sense."""
    if chunk_size is not None and not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise TrainingError(f"chunk_size must be a number of samples, at least 1, not {chunk_size!r}")
    if not (_is_number(second_pass_fraction) and 0 < second_pass_fraction <= 1):
        raise TrainingError(f"second_pass_fraction must be above 0 and at most 1, not {second_pass_fraction!r}")
    if max_gradient_norm is not None and not (_is_number(max_gradient_norm) and max_gradient_norm > 0):
        raise TrainingError(f"max_gradient_norm must be above 0, not {max_gradient_norm!r}")


def check_base_optimizer(optimizer: Any) -> None:
    """Raises TrainingError for what cannot step on gradients that it is given, without a closure."""
    name = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        raise TrainingError(f"base_optimizer is an optimizer of torch.optim or the like, not {name}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise TrainingError(
            f"{name} computes the loss itself, as SAQ does: the base optimizer must step without a closure, as SGD does"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
