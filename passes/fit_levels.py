"""Sets clipping levels from what the example run has shown."""

from dataclasses import dataclass, field
from typing import ClassVar

from saq_fx.annotation import record_of
from saq_fx.fitting import Observed, Observer
from saq_fx.graph import SaqGraphModule, attribute_at, layers
from saq_fx.pass_base import Pass, PassResult
from saq_fx.quantizers import Quantizer, initialize_all
from saq_fx.recipe import Recipe


@dataclass(frozen=True)
class FitLevels(Pass):
    """Initialises clipping levels by the recipe's method, as `Calibrate` does on the example, without another run.

    Quantizers whose data is not finite, or that the example does not reach, are left to a later forward.

    Args:
        observed: operands of the layers, as `AnnotateLayers` has filled it in.
    """

    observed: Observed = field(default_factory=dict)
    needs: ClassVar[frozenset[str]] = frozenset({"annotations", "quantizers"})

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Changes the quantizers' levels, not the graph."""
        observers: dict[Quantizer, Observer] = {}
        for _, layer in layers(gm):
            seen = self.observed.get(layer.name, {})
            paths = {layer.activation_operand: layer.input_quantizer, layer.weight_operand: layer.weight_quantizer}
            for operand, path in paths.items():
                if path is not None and operand in seen:
                    observers[attribute_at(gm, path)] = seen[operand]
        data = ((quantizer, observer.seen()) for quantizer, observer in observers.items() if observer.samples)
        initialize_all(data, (record_of(gm).recipe or Recipe()).calibration)
        return PassResult(gm, modified=False)
