"""Running statistics of BatchNorm, estimated anew for the weights that a network ended up with."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from saq_fx.errors import CalibrationError, PassError
from saq_fx.graph import SaqGraphModule, graphs
from saq_fx.inputs import ExampleInputs, split_inputs
from saq_fx.pass_base import Pass, PassResult
from saq_fx.shapes import evaluating
from saq_fx.sharpness import Buffers


@dataclass(frozen=True)
class ReestimateBatchNorm(Pass):
    """Sets every BatchNorm's running mean and variance to the average of those of the batches.

    In low precision weights jump between levels, and statistics that trail behind them fit none of those jumped to
    (SAQ, Appendix A: ten batches after training MobileNetV2). All else is in evaluation mode meanwhile.

    Args:
        batches: inputs of the model, as for `example_inputs`, of equal sizes.

    Raises:
        CalibrationError: no batches. Statistics are then what they were.
        PassError: statistics belong to a call of `batch_norm`, not to a module.
    """

    batches: Iterable[ExampleInputs]

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Changes buffers, not the graph."""
        _refuse_functions(gm)
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


def _refuse_functions(gm: SaqGraphModule) -> None:
    names = [
        node.name
        for _, part in graphs(gm)
        for node in part.graph.nodes
        if node.target in (F.batch_norm, torch.batch_norm) and any(arg is not None for arg in node.args[1:3])
    ]
    if names:
        raise PassError(
            f"{', '.join(names[:3])}: calls of batch_norm with statistics, as a subclass of BatchNorm makes them, "
            "are out of reach: run the model in training mode instead"
        )


@contextmanager
def _averaging(norms: list[Any]) -> Iterator[None]:
    """Within, running statistics are the averages of all batches seen; if that fails, they are what they were."""
    momenta = [norm.momentum for norm in norms]
    buffers = Buffers(nn.ModuleList(norms))
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative average
        norm.training = True
    try:
        yield
    except BaseException:
        buffers.restore()
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
