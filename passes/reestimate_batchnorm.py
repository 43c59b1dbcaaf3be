"""Running statistics of BatchNorm, estimated anew for the weights that a network ended up with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from saq_fx.errors import CalibrationError
from saq_fx.graph import SaqGraphModule
from saq_fx.pass_base import Pass, PassResult
from saq_fx.shapes import evaluating
from saq_fx.tracing import ExampleInputs, split_inputs


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Sets every BatchNorm's running mean and variance to the average of those of the batches.

    In low precision weights jump between levels, and statistics that trail behind them fit none of those jumped to
    (SAQ, Appendix A: ten batches after training MobileNetV2). All else is in evaluation mode meanwhile.

    Args:
        batches: inputs of the model, as for `example_inputs`, of equal sizes.

    Raises:
        CalibrationError: no batches.
    """

    batches: Iterable[ExampleInputs]

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Changes buffers, not the graph."""
        norms = [module for module in gm.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        if not norms:
            return PassResult(gm, modified=False)
        count = 0
        with evaluating(gm), _averaging(norms):
            device = next(tensor.device for tensor in gm.parameters())
            for count, batch in enumerate(self.batches, 1):  # noqa: B007
                args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(device), split_inputs(batch))
                gm(*args, **kwargs)
        if not count:
            raise CalibrationError("BatchNorm statistics cannot be estimated from no batches: pass at least one")
        return PassResult(gm, modified=False)


@contextmanager
def _averaging(norms: list[Any]) -> Iterator[None]:
    """Within, running statistics are the averages of all batches seen."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
