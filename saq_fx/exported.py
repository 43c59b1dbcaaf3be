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
_BATCH_NORMS = (
    _ATEN._native_batch_norm_legit_functional.default,
    _ATEN._native_batch_norm_legit_no_training.default,
)


def from_exported(program: ExportedProgram) -> SaqGraphModule:
    """The program's own graph, in evaluation mode at first; the program is not changed.

    What the model did in one mode only, other than by BatchNorm and dropout, stays as it was exported. So does, of a
    program with any of these in training mode, what was not in it (a frozen BatchNorm), and a dropout that
    `run_decompositions` has made other operations.
    """
    exported: Any = program.module(check_guards=False)
    graph: fx.Graph = exported.graph
    for node in list(graph.nodes):
        if node.target is _ATEN.convolution.default:
            _make_convolution(exported, node)
        elif node.target in _BATCH_NORMS:
            _make_batch_norm(node)
        elif node.target is _ATEN.native_dropout.default and _items(node).keys() <= {0}:
            _replace_first_item(node, _ATEN.dropout.default, node.args)
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
        has_no_statistics = node.target is _ATEN.batch_norm.default and node.args[3] is None
        if node.target in _TRAINING_ARGUMENT and not has_no_statistics:
            in_mode[node.args[_TRAINING_ARGUMENT[node.target]]].append(node)
    following = in_mode[True] or in_mode[False]
    if not following:
        return
    with gm.graph.inserting_before(following[0]):
        flag = gm.graph.call_module(flag_path(""))
    for node in following:
        node.update_arg(_TRAINING_ARGUMENT[node.target], flag)
    _count_batches(gm, [node for node in following if node.target is _ATEN.batch_norm.default], flag)


def _count_batches(gm: SaqGraphModule, norms: list[fx.Node], flag: fx.Node) -> None:
    """Has the counters of BatchNorms count in training, which is exported in that mode only."""
    means = {norm: str(getattr(norm.args[3], "target", "")) for norm in norms}
    paths = {norm: join_path(mean.rpartition(".")[0], "num_batches_tracked") for norm, mean in means.items()}
    counters = {path for path in paths.values() if isinstance(attribute_at(gm, path), torch.Tensor)}
    for node in reversed(list(gm.graph.nodes)):
        counter: Any = node.args[0] if node.target in (_ATEN.add_.Tensor, _ATEN.copy_.default) else None
        while getattr(counter, "target", None) is _ATEN.add_.Tensor:
            counter = counter.args[0]
        if getattr(counter, "op", "") == "get_attr" and counter.target in counters:
            node.replace_all_uses_with(counter)
            gm.graph.erase_node(node)
    for norm, path in paths.items():
        if path in counters:
            with gm.graph.inserting_before(norm):
                count = OnlyIn(_ATEN.add_.Tensor, training=True, used=False)
                gm.graph.call_function(count, (flag, gm.graph.get_attr(path), 1))


def _make_convolution(exported: torch.nn.Module, node: fx.Node) -> None:
    x, weight, bias, *options, transposed, output_padding, groups = node.args
    known = attribute_at(exported, str(getattr(weight, "target", "")))
    dimensions = known.dim() - 2 if isinstance(known, torch.Tensor) else max(map(len, options))  # type: ignore[arg-type]
    lists: Any = [each * dimensions if len(each) == 1 else each for each in (*options, output_padding)]  # type: ignore[arg-type, operator]
    stride, padding, dilation, output_padding = lists
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
    if getattr(mean, "op", "") != "get_attr" or items.keys() & {1, 2}:
        return
    for statistics, index in ((mean, 3), (variance, 4)):
        if index in items:
            # BatchNorm writes them itself, and what is called next reads them.
            items[index].replace_all_uses_with(statistics)  # type: ignore[arg-type]
            for user in list(statistics.users):  # type: ignore[union-attr]
                if user.target is _ATEN.copy_.default and user.args == (statistics, statistics):
                    node.graph.erase_node(user)
            node.graph.erase_node(items[index])
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
