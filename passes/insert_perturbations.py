"""Leaf tensors next to the weight quantizers, through which a sharpness-aware step perturbs the weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, fx, nn

from saq_fx.annotation import inherit_owner, record_of, update_record
from saq_fx.dataflow import depends_on_inputs, tensor_at
from saq_fx.errors import PassError
from saq_fx.graph import SaqGraphModule, graphs, layers
from saq_fx.pass_base import Pass, PassResult, check_facts
from saq_fx.sharpness import Perturbation

# Case -> (where the gradient is read, where the perturbation enters), as sides of the quantizer.
CASES = {1: ("before", "after"), 2: ("before", "before"), 3: ("after", "after")}


@dataclass(frozen=True)
class InsertPerturbations(Pass):
    """Inserts a `Perturbation` next to every weight quantizer: `Q(w) -> Q(w) + delta` or `Q(w + delta)`.

    The case says where the perturbation enters and whose gradient defines it (SAQ, arXiv 2111.12273, 4.2):

    1. `L(Q(w) + eps(w))`: after the quantizer; the gradient of its input, read at a second leaf before it.
    2. `L(Q(w + eps(w)))`: before the quantizer; the gradient of its input.
    3. `L(Q(w) + eps(Q(w)))`: after the quantizer; the gradient of its output.

    A tied weight has one leaf. Leaves of another case are moved; a graph without quantizers gets none.

    Raises:
        PassError: no such case.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"perturbations"})

    case: int = 3

    def __post_init__(self) -> None:
        if self.case not in CASES:
            raise PassError(f"there is no perturbation case {self.case!r}: use 1, 2 or 3")

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place; leaves that are where they should be stay as they are."""
        return PassResult(gm, _apply(gm, partial(_insert_all, case=self.case, leaves={})))


@dataclass(frozen=True)
class RemovePerturbations(Pass):
    """Takes every `Perturbation` out: `Q(w) + delta -> Q(w)`. For graphs to be saved or lowered."""

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place."""
        return PassResult(gm, _apply(gm, _remove_all))


def _apply(gm: SaqGraphModule, change: Callable[[SaqGraphModule], bool]) -> bool:
    """Applies a change to a graph and to its parts; whether any of them changed."""
    changed = [change(part) for _, part in graphs(gm)]
    return any(changed)


def _insert_all(gm: SaqGraphModule, case: int, leaves: dict[tuple[nn.Module, str], Perturbation]) -> bool:
    """Gives one graph its leaves, those of a quantizer that another one shares from there; whether that changed it."""
    quantizers = _weight_quantizers(gm)
    wanted = {_leaf_path(target, side) for target in quantizers for side in CASES[case]}
    misplaced = wanted != set(_leaves(gm))
    modified = misplaced or record_of(gm).perturbation_case != case
    if misplaced:
        _remove(gm)
        for target, nodes in quantizers.items():
            for side in sorted(set(CASES[case])):
                leaf = leaves.setdefault((gm.get_submodule(target), side), Perturbation())
                gm.add_submodule(_leaf_path(target, side), leaf)
                for node in nodes:
                    _insert(node, _leaf_path(target, side), side)
    update_record(gm, perturbation_case=case)
    return modified


def _remove_all(gm: SaqGraphModule) -> bool:
    modified = _remove(gm) or record_of(gm).perturbation_case is not None
    update_record(gm, perturbation_case=None)
    return modified


def _weight_quantizers(gm: SaqGraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that call each weight quantizer, by its path; none of weights whose shape is known in a run only.

    What sizes of inputs shape (learned queries, repeated for each sample) has no shape that a leaf could have; the
    parameters that it is made of are perturbed in place.
    """
    targets = {layer.weight_quantizer for _, layer in layers(gm) if layer.weight_quantizer and not layer.is_product}
    shaped_by_inputs = depends_on_inputs(gm.graph, or_sizes=True)
    calls: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target in targets and node not in shaped_by_inputs:
            calls.setdefault(str(node.target), []).append(node)
    return calls


def _leaf_path(quantizer: str, side: str) -> str:
    return f"{quantizer}_delta_{side}"


def _leaf(gm: SaqGraphModule, quantizer: str, side: str) -> Perturbation:
    return cast("Perturbation", gm.get_submodule(_leaf_path(quantizer, side)))


def _leaves(gm: SaqGraphModule) -> list[str]:
    """Those of this graph; its parts have their own."""
    targets = dict.fromkeys(str(node.target) for node in gm.graph.nodes if node.op == "call_module")
    return [path for path in targets if isinstance(gm.get_submodule(path), Perturbation)]


def _insert(quantizer: fx.Node, path: str, side: str) -> None:
    graph = quantizer.graph
    if side == "before":
        with graph.inserting_before(quantizer):
            leaf = graph.call_module(path, (quantizer.args[0],))
        quantizer.update_arg(0, leaf)
    else:
        with graph.inserting_after(quantizer):
            leaf = graph.call_module(path, (quantizer,))
        quantizer.replace_all_uses_with(leaf, delete_user_cb=lambda user: user is not leaf)
    inherit_owner([leaf], quantizer)


def _remove(gm: SaqGraphModule) -> bool:
    paths = _leaves(gm)
    for node in list(gm.graph.nodes):
        if node.op == "call_module" and node.target in paths:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    for path in paths:
        gm.delete_submodule(path)
    return bool(paths)


@dataclass(frozen=True)
class PerturbedWeight:
    """A quantized weight: the leaves that read its gradient and perturb it, the parameters it is made of."""

    gradient: Perturbation
    perturbation: Perturbation
    parameters: tuple[nn.Parameter, ...]
    shape: torch.Size
    graph_module: SaqGraphModule
    quantizer: fx.Node

    def is_current(self) -> bool:
        """Whether the graph still holds the leaves."""
        case = record_of(self.graph_module).perturbation_case
        if case is None:
            return False
        owner_path, _, name = str(self.quantizer.target).rpartition(".")
        owner = self.graph_module.get_submodule(owner_path)
        sides = zip((self.gradient, self.perturbation), CASES[case], strict=True)
        return all(getattr(owner, _leaf_path(name, side), None) is leaf for leaf, side in sides)

    def quantized(self) -> Tensor:
        """The quantized weight as it is now: in case 2, of the weight with its delta."""
        return _value(self.graph_module, self.quantizer)

    def codes(self) -> Tensor:
        """The integers that stand for the quantized weight as it is now."""
        quantizer: Any = self.graph_module.get_submodule(str(self.quantizer.target))
        return cast("Tensor", quantizer.codes(_value(self.graph_module, self.quantizer.all_input_nodes[0])))

    def value(self) -> Tensor:
        """The tensor whose gradient defines the perturbation: the quantized weight in case 3, else the weight."""
        case = record_of(self.graph_module).perturbation_case or 0
        behind = CASES[case][0] == "after"
        return self.quantized() if behind else _value(self.graph_module, self.quantizer.all_input_nodes[0])


def perturbed_weights(gm: SaqGraphModule) -> list[PerturbedWeight]:
    """Every quantized weight that is computed from parameters, once, in the order of execution.

    Raises:
        PassError: the graph has no perturbation leaves.
    """
    check_facts(gm, InsertPerturbations.gives, "perturbed_weights")
    return list({weight.perturbation: weight for _, part in graphs(gm) for weight in _weights_of(part)}.values())


def _weights_of(gm: SaqGraphModule) -> list[PerturbedWeight]:
    sides = CASES[record_of(gm).perturbation_case or 0]
    found = []
    for target, (node, *_) in _weight_quantizers(gm).items():
        parameters = _parameters_behind(gm, node)
        if parameters:
            gradient, perturbation = (_leaf(gm, target, side) for side in sides)
            shape = _value(gm, node.all_input_nodes[0]).shape
            found.append(PerturbedWeight(gradient, perturbation, parameters, shape, gm, node))
    return found


def _parameters_behind(gm: SaqGraphModule, quantizer: fx.Node) -> tuple[nn.Parameter, ...]:
    """The parameters that a quantizer's input is computed from: several, where weights are parametrized."""
    found: dict[nn.Parameter, None] = {}
    ahead = list(quantizer.all_input_nodes)
    while ahead:
        node = ahead.pop()
        ahead.extend(node.all_input_nodes)
        if node.op == "get_attr":
            tensor = tensor_at(gm, str(node.target))
            if isinstance(tensor, nn.Parameter):
                found[tensor] = None
    return tuple(found)


@torch.no_grad()
def _value(gm: SaqGraphModule, node: fx.Node) -> Tensor:
    """The value of a node that depends on no input of the graph."""
    interpreter = fx.Interpreter(gm)

    def evaluate(node: fx.Node) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), evaluate)
        return getattr(interpreter, node.op)(node.target, args, kwargs)

    value: Tensor = evaluate(node)
    return value


def moved_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Share of the elements that differ between two lists of codes; None of empty lists."""
    if not before:
        return None
    moved = torch.stack([(a != b).sum() for a, b in zip(before, after, strict=True)]).sum()
    return float(moved) / sum(tensor.numel() for tensor in before)


Leaf = tuple[Tensor, Tensor]
"""The tensor whose gradient defines a perturbation and the one by which it enters: one and the same in cases 2, 3."""


def make_leaves(weights: Sequence[PerturbedWeight]) -> list[Leaf]:
    """Tensors for `zero_deltas`, one or two for each weight and of its shape."""
    leaves = []
    for weight in weights:
        delta = _empty(weight)
        leaves.append((delta if weight.gradient is weight.perturbation else _empty(weight), delta))
    return leaves


@contextmanager
def zero_deltas(weights: Sequence[PerturbedWeight], leaves: Sequence[Leaf] | None = None) -> Iterator[Sequence[Leaf]]:
    """Gives every leaf of the graph a zero delta that collects a gradient, and takes them away on leaving.

    In case 3 they stand for the quantized weights, so that `lambda_max` with respect to them is the sharpness that SAQ
    lowers.

    Args:
        leaves: those of an earlier time, whose memory is used again.
    """
    leaves = make_leaves(weights) if leaves is None else leaves
    try:
        for weight, leaf in zip(weights, leaves, strict=True):
            for tensor in leaf:
                tensor.grad = None
                tensor.detach().zero_()
            weight.gradient.delta, weight.perturbation.delta = leaf
        yield leaves
    finally:
        for weight, leaf in zip(weights, leaves, strict=True):
            weight.gradient.delta = weight.perturbation.delta = None
            for tensor in leaf:
                tensor.grad = None


def _empty(weight: PerturbedWeight) -> Tensor:
    like = weight.parameters[0]
    return torch.empty(weight.shape, dtype=like.dtype, device=like.device, requires_grad=True)
