"""From an `ExportedProgram` to a graph whose BatchNorm and dropout follow `train()` and `eval()` again."""

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from saq_fx.annotation import inherit_owner, join_path, update_record
from saq_fx.effects import OnlyIn
from saq_fx.graph import SaqGraphModule, attribute_at
from saq_fx.modes import add_training_flag, flag_path
from saq_fx.operators import operator_named

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
_COUNTER = "num_batches_tracked"


def from_exported(program: ExportedProgram) -> SaqGraphModule:
    """The program's own graph, in evaluation mode at first; the program is not changed.

    What the model did in one mode only, other than by BatchNorm and dropout, stays as it was exported. So do those of
    these that were in the other mode than most of them: a frozen BatchNorm, a dropout that never stops.
    """
    exported: Any = program.module(check_guards=False)
    graph: fx.Graph = exported.graph
    _recompose(graph)
    gm = SaqGraphModule(exported, graph, "Exported")
    add_training_flag(gm, False)
    _follow_mode(gm)
    graph.lint()
    update_record(gm, tracing="given program")
    return gm.eval()


def _follow_mode(gm: SaqGraphModule) -> None:
    """Puts a flag that is read at every call in the place of those that export has frozen."""
    in_mode: dict[Any, list[fx.Node]] = {True: [], False: []}
    for node in gm.graph.nodes:
        if node.target in _TRAINING_ARGUMENT:
            in_mode[node.args[_TRAINING_ARGUMENT[node.target]]].append(node)
    following = max(in_mode.values(), key=len)
    if not following:
        return
    with gm.graph.inserting_before(following[0]):
        flag = gm.graph.call_module(flag_path(""))
    for node in following:
        node.update_arg(_TRAINING_ARGUMENT[node.target], flag)
        if node.target is _ATEN.batch_norm.default:
            _count_batches(gm, node, flag)


def _count_batches(gm: SaqGraphModule, norm: fx.Node, flag: fx.Node) -> None:
    statistics: Any = norm.args[3]
    counter = join_path(str(getattr(statistics, "target", "")).rpartition(".")[0], _COUNTER)
    if isinstance(attribute_at(gm, counter), torch.Tensor):
        with gm.graph.inserting_before(norm):
            count = gm.graph.get_attr(counter)
            gm.graph.call_function(OnlyIn(_ATEN.add_.Tensor, training=True, used=False), (flag, count, 1))


def _recompose(graph: fx.Graph) -> None:
    """Makes what `run_decompositions` takes apart what it was: convolutions, BatchNorm and dropout.

    And takes out the steps of BatchNorm's counters, which were exported in one mode only.
    """
    for node in list(graph.nodes):
        if node.target is _ATEN.convolution.default:
            _make_convolution(node)
        elif node.target in (
            _ATEN._native_batch_norm_legit_functional.default,
            _ATEN._native_batch_norm_legit_no_training.default,
        ):
            _make_batch_norm(node)
        elif node.target is _ATEN.native_dropout.default and _items(node).keys() <= {0}:
            _replace_first_item(node, _ATEN.dropout.default, node.args)
        elif node.target in (_ATEN.add_.Tensor, _ATEN.copy_.default) and str(node.args[0]).endswith(_COUNTER):
            graph.erase_node(node)


def _make_convolution(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    dimensions = len(stride)  # type: ignore[arg-type]
    if transposed:
        node.target = operator_named(f"conv_transpose{dimensions}d").function
        node.args = (x, weight, bias, stride, padding, output_padding, groups, dilation)
    else:
        node.target = operator_named(f"conv{dimensions}d").function
        node.args = (x, weight, bias, stride, padding, dilation, groups)


def _make_batch_norm(node: fx.Node) -> None:
    """Of a BatchNorm that moves, if at all, statistics that are buffers."""
    x, weight, bias, mean, variance, *is_training, momentum, eps = node.args
    items = _items(node)
    moved = [(mean, items.get(3)), (variance, items.get(4))]
    copies = [user for _, item in moved if item is not None for user in item.users]
    known = [(statistic, item) for statistic, item in moved if item is not None]
    is_plain = getattr(mean, "op", "") == "get_attr" and not items.keys() & {1, 2}
    if not is_plain or [(copy.target, *copy.args) for copy in copies] != [
        (_ATEN.copy_.default, *each) for each in known
    ]:
        return
    for each in (*copies, *(item for _, item in known)):
        node.graph.erase_node(each)
    arguments = (x, weight, bias, mean, variance, is_training == [True], momentum, eps, False)
    _replace_first_item(node, _ATEN.batch_norm.default, arguments)


def _items(node: fx.Node) -> dict[int, fx.Node]:
    """What is picked of the several values that a node has."""
    return {user.args[1]: user for user in node.users if user.target is operator.getitem}  # type: ignore[misc]


def _replace_first_item(node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Puts a call in the place of a node of which nothing but the first item is used."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    inherit_owner([new], node)
    for item in _items(node).values():
        item.replace_all_uses_with(new)
        node.graph.erase_node(item)
    node.graph.erase_node(node)
