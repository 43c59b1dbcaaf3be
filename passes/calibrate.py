"""Sets clipping levels from data."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from saq_fx.annotation import record_of
from saq_fx.errors import CalibrationError
from saq_fx.graph import SaqGraphModule
from saq_fx.nested import cloned
from saq_fx.pass_base import Pass, PassResult
from saq_fx.quantizers import NOT_FINITE, Quantizer, initialize_all
from saq_fx.recipe import Recipe
from saq_fx.shapes import interpreted, replaced_forwards, without_trace
from saq_fx.tracing import ExampleInputs, split_inputs

_SAMPLES_PER_BATCH = 2**14


@dataclass(frozen=True)
class Calibrate(Pass):
    """Initialises clipping levels by the recipe's method (minimum mean squared error unless it says otherwise).

    The float graph runs once on every batch in evaluation mode; each quantizer sees what would enter it, from which
    an evenly spaced sample is kept. Levels are then fitted (docs/method.md).

    Args:
        batches: inputs of the model, as for `example_inputs`; without any, levels are left to the first forward.
        skip_nonfinite: leave a quantizer whose input overflows to a later forward, instead of raising.
    """

    batches: Iterable[ExampleInputs] = ()
    skip_nonfinite: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "quantizers"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Changes the quantizers' levels, not the graph.

        Raises:
            CalibrationError: values that are not finite; names the quantizer.
        """
        observers = {each: _Observer(path) for path, each in gm.named_modules() if isinstance(each, Quantizer)}
        with without_trace(gm), interpreted(gm), replaced_forwards(observers):
            for batch in self.batches:
                args, kwargs = cloned(split_inputs(batch))
                gm(*args, **kwargs)
        recipe = record_of(gm).recipe or Recipe()
        data = ((quantizer, observer.seen()) for quantizer, observer in observers.items() if observer.samples)
        rejected = initialize_all(data, recipe.calibration)
        if rejected and not self.skip_nonfinite:
            raise CalibrationError(f"{observers[rejected[0]].path}: {NOT_FINITE}")
        return PassResult(gm, modified=False)


class _Observer:
    """Stands for a quantizer: keeps samples of what enters it, and lets it through."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.samples: list[Tensor] = []
        self._is_weight = "weight_quantizer" in path.rpartition(".")[2]

    def __call__(self, value: Tensor) -> Tensor:
        if self._is_weight:
            self.samples = [value.detach()]
        else:
            flat = value.detach().flatten()
            # A copy: what follows may write to the tensor in place, and a view would keep all of it.
            self.samples.append(flat[:: max(1, flat.numel() // _SAMPLES_PER_BATCH)].clone())
        return value

    def seen(self) -> Tensor:
        """All samples."""
        return self.samples[0] if len(self.samples) == 1 else torch.cat(self.samples)
