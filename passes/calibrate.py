"""Sets clipping levels from data."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from saq_fx.annotation import record_of
from saq_fx.errors import CalibrationError
from saq_fx.graph import SaqGraphModule
from saq_fx.pass_base import Pass, PassResult
from saq_fx.quantizers import Quantizer
from saq_fx.recipe import Recipe
from saq_fx.shapes import bind_inputs, evaluating
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
        observer = _Observer(gm)
        with evaluating(gm):
            for batch in self.batches:
                observer.run(*bind_inputs(gm, *split_inputs(batch)))
        recipe = record_of(gm).recipe or Recipe()
        for path, samples in observer.samples.items():
            quantizer: Any = gm.get_submodule(path)
            try:
                quantizer.initialize(torch.cat(samples) if len(samples) > 1 else samples[0], recipe.calibration)
            except CalibrationError as error:
                if self.skip_nonfinite:
                    continue
                raise CalibrationError(f"{path}: {error}") from error
        return PassResult(gm, modified=False)


class _Observer(fx.Interpreter):
    """Runs the graph in float and keeps samples of what enters each quantizer."""

    def __init__(self, gm: SaqGraphModule) -> None:
        super().__init__(gm)
        self.samples: dict[str, list[Tensor]] = defaultdict(list)

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        module = self.fetch_attr(target)
        if not isinstance(module, Quantizer):
            return super().call_module(target, args, kwargs)
        (value,) = args
        self._keep(target, value)
        return value

    def _keep(self, target: str, value: Tensor) -> None:
        if "weight_quantizer" in target.rpartition(".")[2]:
            self.samples[target] = [value]
            return
        flat = value.flatten()
        stride = max(1, flat.numel() // _SAMPLES_PER_BATCH)
        self.samples[target].append(flat[::stride])
