"""One graph that behaves as the model does both in `train()` and in `eval()`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from saq_fx.alignment import aligned, chance_pairs, read_parameters
from saq_fx.annotation import inherit_owner, join_path, mark_training_only, owner_path
from saq_fx.effects import OnlyIn, follows_mode, has_effects
from saq_fx.errors import TracingError
from saq_fx.held import has_forward_hooks
from saq_fx.operators import operator_of

_FLAG = "training_flag"


class TrainingFlag(nn.Module):
    """Reads whether its owner is in training mode, anew at every call."""

    def forward(self) -> bool:
        """The current mode."""
        return self.training


def select_mode(training: bool, in_training: Any, in_evaluation: Any) -> Any:
    """The value that belongs to the current mode."""
    return in_training if training else in_evaluation


def common_mode(paths: tuple[str, ...], *flags: bool) -> bool:
    """The mode of several modules, whose code was traced with all of them in the same."""
    if len(set(flags)) > 1:
        modes = ", ".join(f"{path or 'the model'}: {flag}" for path, flag in zip(paths, flags, strict=True))
        raise TracingError(
            "these modules' code depends on each other's mode, and they are in training as follows: "
            f"{modes}. Set them to one mode, or freeze what they compute by requires_grad_(False)"
        )
    return flags[0]


def flag_path(owner: str) -> str:
    """Where the flag of the module at `owner` is."""
    return join_path(owner, _FLAG)


def is_flag(node: fx.Node) -> bool:
    """Whether a node reads the mode of a module."""
    return node.op == "call_module" and str(node.target).rpartition(".")[2] == _FLAG


def add_training_flag(module: nn.Module, training: bool) -> None:
    """Gives a module the child that reads its mode."""
    if not hasattr(module, _FLAG):
        module.training_flag = TrainingFlag().train(training)


def add_flags(model: nn.Module, graph: fx.Graph) -> None:
    """Gives modules the flags that a graph of the model reads."""
    for node in graph.nodes:
        if is_flag(node):
            module = model.get_submodule(str(node.target).rpartition(".")[0])
            add_training_flag(module, module.training)


def remove_flags(model: nn.Module) -> None:
    """Takes the flags out of modules whose code is going to run as Python, down to graphs in them."""
    vars(model)["_modules"].pop(_FLAG, None)
    for child in model.children():
        if not isinstance(child, fx.GraphModule):
            remove_flags(child)


class UnmergeableError(TracingError):
    """The module at `path` does in one mode only what no graph of both modes can hold."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message)
        self.path = path


def merge_modes(
    model: nn.Module, training: fx.Graph, evaluation: fx.Graph, steering: Mapping[str, Iterable[str]]
) -> "Merged":
    """Merges the graphs traced in training and in evaluation mode.

    Both node sequences are aligned; where an aligned node's arguments differ, `select_mode` picks by the mode of the
    module whose code made the difference. Nodes of one mode only run in both, and their values are not used in the
    other; those with effects run in theirs only (`OnlyIn`). So the result is right whatever the alignment, unless a
    node fails on what the other mode gives it, of another shape (`Merged.unsure`). Layers that only training reaches
    (auxiliary heads) are marked, so that they are neither quantized nor counted.

    Args:
        model: what was traced.
        training, evaluation: its graphs, with the same leaves.
        steering: path of a module whose code asks for modes -> paths of the modules whose modes it asks for.

    Raises:
        UnmergeableError: such a module has to stay Python.
    """
    merger = _Merger(model, steering)
    runs = list(aligned(list(training.nodes), list(evaluation.nodes)))
    by_chance = chance_pairs(runs)
    for are_pairs, train_nodes, eval_nodes in runs:
        if are_pairs:
            for train_node, eval_node in zip(train_nodes, eval_nodes, strict=True):
                if train_node in by_chance:
                    mark_training_only(merger.add_half(train_node, training=True))
                    merger.add_half(eval_node, training=False)
                else:
                    merger.add_pair(train_node, eval_node)
            continue
        for train_node in train_nodes:
            mark_training_only(merger.add_single(train_node, training=True))
        for eval_node in eval_nodes:
            merger.add_single(eval_node, training=False)
    merger.check_layers()
    merger.graph.set_codegen(training._codegen)
    return Merged(merger.graph, merger.unsure)


@dataclass(frozen=True)
class Merged:
    """A graph of both modes.

    `unsure` are nodes of one mode only that get the other one's values in the other: whether their mode is training,
    and the module whose code asks for modes there.
    """

    graph: fx.Graph
    unsure: Mapping[fx.Node, tuple[bool, str]]


class _Merger:
    def __init__(self, model: nn.Module, steering: Mapping[str, Iterable[str]]) -> None:
        self.graph = fx.Graph()
        self._model, self._steering = model, steering
        self._merged: dict[bool, dict[fx.Node, fx.Node]] = {True: {}, False: {}}
        self._flags: dict[frozenset[str], fx.Node] = {}
        # Of the merged nodes of one mode only: the modules on whose modes they depend; and those that are layers.
        self._owners: dict[fx.Node, frozenset[str]] = {}
        self._layers: dict[bool, list[fx.Node]] = {True: [], False: []}
        self.unsure: dict[fx.Node, tuple[bool, str]] = {}
        self._differing: set[fx.Node] = set()  # merged nodes of both modes whose values are another in each

    def add_single(self, node: fx.Node, *, training: bool) -> fx.Node:
        """Copies a node of one graph."""
        self._check_single(node, training)
        merged = self._merged[training]
        owners = self._asked_at(owner_path(node))
        owners = owners.union(*(self._owners.get(merged[source], ()) for source in node.all_input_nodes))
        if has_effects(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), merged.__getitem__)
            function = OnlyIn(node.target, training, used=bool(node.users))
            copied = self.graph.call_function(function, (self._flag(owners), *args), kwargs)
            inherit_owner([copied], node)
        else:
            copied = self.graph.node_copy(node, merged.__getitem__)
            if read_parameters(node):
                self._layers[training].append(node)
        self._add(node, copied, owners, training)
        return copied

    def _add(self, node: fx.Node, copied: fx.Node, owners: frozenset[str], training: bool) -> None:
        self._merged[training][node], self._owners[copied] = copied, owners
        if any(source in self._differing or source in self.unsure for source in copied.all_input_nodes):
            self.unsure[copied] = training, self._place(owner_path(node))

    def add_half(self, node: fx.Node, *, training: bool) -> fx.Node:
        """Copies a node of one graph that is called in the other one, too, with other arguments, and only computes."""
        merged = self._merged[training]
        copied = self.graph.node_copy(node, merged.__getitem__)
        owners = frozenset().union(*(self._owners.get(merged[source], ()) for source in node.all_input_nodes))
        self._add(node, copied, owners or self._asked_at(owner_path(node)), training)
        return copied

    def add_pair(self, train_node: fx.Node, eval_node: fx.Node) -> None:
        """Copies a node of both graphs, with a selection wherever its arguments differ."""
        train_arguments = fx.map_arg((train_node.args, train_node.kwargs), self._merged[True].__getitem__)
        eval_arguments = fx.map_arg((eval_node.args, eval_node.kwargs), self._merged[False].__getitem__)
        args, kwargs = self._merge(train_arguments, eval_arguments, train_node)
        if train_node.op == "output":
            merged = self.graph.output(args[0])
        else:
            merged = self.graph.create_node(train_node.op, train_node.target, args, kwargs, train_node.name)
            inherit_owner([merged], train_node)
        self._merged[True][train_node] = self._merged[False][eval_node] = merged
        if any(source in self._differing or source.target is select_mode for source in merged.all_input_nodes):
            self._differing.add(merged)

    def check_layers(self) -> None:
        """Raises UnmergeableError where a layer has one node a mode: that of training would stay in float."""
        for node in self._layers[True]:
            for other in self._layers[False]:
                shared = read_parameters(node) & read_parameters(other)
                if shared:
                    message = f"training and evaluation call {min(shared)} at places that cannot be matched"
                    raise UnmergeableError(self._place(owner_path(node), owner_path(other)), message)

    def _check_single(self, node: fx.Node, training: bool) -> None:
        owner, mode = owner_path(node), "training" if training else "evaluation"
        if node.op == "call_module" and not is_flag(node):
            module = self._model.get_submodule(str(node.target))
            has_code = any(True for _ in module.children()) and type(module) is not nn.MultiheadAttention
            is_python = has_code or has_forward_hooks(module)
            if is_python or (not training and follows_mode(module)):
                parent = str(node.target).rpartition(".")[0]
                raise UnmergeableError(self._place(parent), f"only in {mode} does it run {node.target}")
        if operator_of(node) is not None and has_effects(node):
            raise UnmergeableError(self._place(owner), f"only in {mode} does it run {node.name}")

    def _place(self, *paths: str) -> str:
        """The innermost module around all of these paths whose code asks for modes."""
        places = [each for each in self._steering if all(is_within(path, each) for path in paths)]
        return max(places, key=len, default="")

    def _asked_at(self, path: str) -> frozenset[str]:
        """The modules whose modes the code around a path asks for; where it asks for none, those that any code does."""
        around = [owners for place, owners in self._steering.items() if is_within(path, place)]
        return frozenset().union(*(around or self._steering.values()))

    def _flag(self, owners: frozenset[str]) -> fx.Node:
        if owners not in self._flags:
            paths = tuple(sorted(owners))
            flags = tuple(self.graph.call_module(flag_path(path)) for path in paths)
            self._flags[owners] = (
                flags[0] if len(flags) == 1 else self.graph.call_function(common_mode, (paths, *flags))
            )
        return self._flags[owners]

    def _merge(self, train_value: Any, eval_value: Any, origin: fx.Node) -> Any:
        same_kind = type(train_value) is type(eval_value)
        if isinstance(train_value, fx.Node) or isinstance(eval_value, fx.Node) or not same_kind:
            return train_value if train_value is eval_value else self._select(train_value, eval_value, origin)
        if type(train_value) in (tuple, list) and len(train_value) == len(eval_value):
            items = [self._merge(*pair, origin) for pair in zip(train_value, eval_value, strict=True)]
            return type(train_value)(items)
        if isinstance(train_value, dict) and train_value.keys() == eval_value.keys():
            return {key: self._merge(train_value[key], eval_value[key], origin) for key in train_value}
        return train_value if train_value == eval_value else self._select(train_value, eval_value, origin)

    def _select(self, train_value: Any, eval_value: Any, origin: fx.Node) -> fx.Node:
        values = [each for each in (train_value, eval_value) if isinstance(each, fx.Node)]
        singles = [self._owners[each] for each in values if each in self._owners]
        if singles:
            owners = frozenset().union(*singles)
        elif len(values) == 2:
            # Any code on the way here may have chosen one of them.
            owners = frozenset().union(*self._steering.values())
        else:
            owners = self._asked_at(owner_path(origin))
        selected = self.graph.call_function(select_mode, (self._flag(owners), train_value, eval_value))
        inherit_owner([selected], origin)
        return selected


def is_within(path: str, place: str) -> bool:
    """Whether a path is that of the module at `place` or of one inside it."""
    return not place or path == place or path.startswith(f"{place}.")
