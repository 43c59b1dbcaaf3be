"""From an `ExportedProgram` to a graph whose BatchNorm and dropout follow `train()` and `eval()` again."""

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from saq_fx.annotation import update_record
from saq_fx.graph import SaqGraphModule
from saq_fx.modes import add_training_flag, flag_path

_ATEN = torch.ops.aten
# Operator -> position of the flag that export has frozen.
_TRAINING_ARGUMENT: dict[Any, int] = {
    _ATEN.batch_norm.default: 5,
    _ATEN.dropout.default: 2,
    _ATEN.dropout_.default: 2,
    _ATEN.feature_dropout.default: 2,
    _ATEN.alpha_dropout.default: 2,
    _ATEN.feature_alpha_dropout.default: 2,
}


def from_exported(program: ExportedProgram) -> SaqGraphModule:
    """The program's own graph, in evaluation mode at first; the program is not changed.

    What the model did in one mode only, other than by BatchNorm and dropout, stays as it was exported.
    """
    exported: Any = program.module(check_guards=False)
    graph: fx.Graph = exported.graph
    gm = SaqGraphModule(exported, graph, "Exported")
    add_training_flag(gm, False)
    flag: fx.Node | None = None
    for node in list(graph.nodes):
        position = _TRAINING_ARGUMENT.get(node.target)
        if position is not None:
            if flag is None:
                with graph.inserting_before(node):
                    flag = graph.call_module(flag_path(""))
            node.update_arg(position, flag)
        elif node.target is _ATEN.add_.Tensor and str(node.args[0]).endswith("num_batches_tracked"):
            # Counted in training mode only; nothing but a BatchNorm without momentum, which export unrolls, reads it.
            graph.erase_node(node)
    graph.lint()
    update_record(gm, tracing="given program")
    return gm.eval()
