"""One graph that behaves as the model does both in `train()` and in `eval()`."""

from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

from torch import fx, nn

from saq_fx.annotation import inherit_owner, mark_training_only, owner_path


class TrainingFlag(nn.Module):
    """Reads whether its owner is in training mode, anew at every call."""

    def forward(self) -> bool:
        """The current mode."""
        return self.training


def select_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """The value that belongs to the current mode."""
    return in_training if training else in_evaluation


def merge_modes(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """Merges the graphs traced in training and in evaluation mode.

    The two node sequences are aligned; where an aligned node's arguments differ, `select_mode` picks by the root's
    flag at run time. The result is right whatever the alignment. Nodes of one mode only run in both: layers that only
    training reaches (auxiliary heads) are marked, so that they are neither quantized nor counted.
    """
    train_nodes, eval_nodes = list(training.nodes), list(evaluation.nodes)
    merger = _Merger()
    matcher = SequenceMatcher(None, _keys(train_nodes), _keys(eval_nodes), autojunk=False)
    for tag, train_start, train_end, eval_start, eval_end in matcher.get_opcodes():
        if tag == "equal":
            pairs = zip(train_nodes[train_start:train_end], eval_nodes[eval_start:eval_end], strict=True)
            for train_node, eval_node in pairs:
                merger.add_pair(train_node, eval_node)
            continue
        for train_node in train_nodes[train_start:train_end]:
            mark_training_only(merger.add_single(train_node, merger.from_training))
        for eval_node in eval_nodes[eval_start:eval_end]:
            merger.add_single(eval_node, merger.from_evaluation)
    merger.graph.set_codegen(training._codegen)
    return merger.graph


def _keys(nodes: Iterable[fx.Node]) -> list[tuple[str, Any, str]]:
    return [(node.op, node.target, owner_path(node)) for node in nodes]


class _Merger:
    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.from_training: dict[fx.Node, fx.Node] = {}
        self.from_evaluation: dict[fx.Node, fx.Node] = {}
        self._flag: fx.Node | None = None

    def add_single(self, node: fx.Node, mapping: dict[fx.Node, fx.Node]) -> fx.Node:
        """Copies a node of one graph."""
        mapping[node] = self.graph.node_copy(node, mapping.__getitem__)
        return mapping[node]

    def add_pair(self, train_node: fx.Node, eval_node: fx.Node) -> None:
        """Copies a node of both graphs, with a selection wherever its arguments differ."""
        train_arguments = fx.map_arg((train_node.args, train_node.kwargs), self.from_training.__getitem__)
        eval_arguments = fx.map_arg((eval_node.args, eval_node.kwargs), self.from_evaluation.__getitem__)
        args, kwargs = self._merge(train_arguments, eval_arguments, train_node)
        if train_node.op == "output":
            merged = self.graph.output(args[0])
        else:
            merged = self.graph.create_node(train_node.op, train_node.target, args, kwargs, train_node.name)
            inherit_owner(merged, train_node)
        self.from_training[train_node] = self.from_evaluation[eval_node] = merged

    def _merge(self, train_value: Any, eval_value: Any, origin: fx.Node) -> Any:
        same_kind = type(train_value) is type(eval_value)
        if isinstance(train_value, fx.Node) or isinstance(eval_value, fx.Node) or not same_kind:
            return train_value if train_value is eval_value else self._select(train_value, eval_value, origin)
        if isinstance(train_value, tuple | list) and len(train_value) == len(eval_value):
            items = [self._merge(*pair, origin) for pair in zip(train_value, eval_value, strict=True)]
            return type(train_value)(items)
        if isinstance(train_value, dict) and train_value.keys() == eval_value.keys():
            return {key: self._merge(train_value[key], eval_value[key], origin) for key in train_value}
        return train_value if train_value == eval_value else self._select(train_value, eval_value, origin)

    def _select(self, train_value: Any, eval_value: Any, origin: fx.Node) -> fx.Node:
        if self._flag is None:
            self._flag = self.graph.call_module("training_flag")
        selected = self.graph.call_function(select_mode, (self._flag, train_value, eval_value))
        inherit_owner(selected, origin)
        return selected
