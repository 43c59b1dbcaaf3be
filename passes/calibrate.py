"""Sets clipping levels from data."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from saq_fx.annotation import record_of
from saq_fx.errors import CalibrationError
from saq_fx.fitting import Observer
from saq_fx.graph import SaqGraphModule
from saq_fx.inputs import ExampleInputs, split_inputs
from saq_fx.nested import cloned
from saq_fx.pass_base import Pass, PassResult
from saq_fx.quantizers import NOT_FINITE, Quantizer, initialize_all
from saq_fx.recipe import Recipe
from saq_fx.shapes import interpreted, replaced_forwards, without_trace


@dataclass(frozen=True)
class Calibrate(Pass):
    """Initialises clipping levels by the recipe's method (minimum mean squared error unless it says otherwise).

    The float graph runs once on every batch in evaluation mode; each quantizer sees what would enter it, from which
    an evenly spaced sample is kept. Levels are then fitted (docs/method.md).

    Args:
        batches: inputs of the model, as for `example_inputs`; without any, levels are left to the first forward.
    """

    batches: Iterable[ExampleInputs] = ()
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "quantizers"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Changes the quantizers' levels, not the graph.

        Raises:
            CalibrationError: values that are not finite; names the quantizer.
        """
        paths = {each: path for path, each in gm.named_modules() if isinstance(each, Quantizer)}
        observers = {each: Observer("weight_quantizer" in path.rpartition(".")[2]) for each, path in paths.items()}
        with without_trace(gm), interpreted(gm), replaced_forwards(observers):
            for batch in self.batches:
                args, kwargs = cloned(split_inputs(batch))
                gm(*args, **kwargs)
        recipe = record_of(gm).recipe or Recipe()
        data = ((quantizer, observer.seen()) for quantizer, observer in observers.items() if observer.samples)
        rejected = initialize_all(data, recipe.calibration)
        if rejected:
            raise CalibrationError(f"{paths[rejected[0]]}: {NOT_FINITE}")
        return PassResult(gm, modified=False)
