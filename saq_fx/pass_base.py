"""What a compiler pass is, and how several run after each other.

A pass is a frozen dataclass: its fields are its options, `run` rewrites the graph in place and tells honestly whether
it changed anything. `needs` and `gives` name facts about the graph (the keys of `FACTS`); the pipeline checks both.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import fx, nn

from saq_fx.annotation import record_of
from saq_fx.errors import PassError, SaqError, with_notes
from saq_fx.graph import SaqGraphModule, attribute_at, graphs, layers


@dataclass(frozen=True)
class PassResult:
    """A rewritten graph module and whether the pass changed it."""

    graph_module: SaqGraphModule
    modified: bool


def _missing_annotations(gm: SaqGraphModule) -> str | None:
    return None if record_of(gm).annotated else "its layers are not annotated"


def _missing_shapes(gm: SaqGraphModule) -> str | None:
    names = [layer.name for _, layer in layers(gm) if layer.macs is None]
    return f"layers {', '.join(names[:3])} have no shapes: prepare with example_inputs" if names else None


def _missing_precision(gm: SaqGraphModule) -> str | None:
    names = [layer.name for _, layer in layers(gm) if layer.precision is None]
    return f"layers {', '.join(names[:3])} have no precision" if names else None


def _missing_quantizers(gm: SaqGraphModule) -> str | None:
    return None if record_of(gm).recipe else "it has no quantizers: prepare it with a precision, not precision=None"


def _missing_perturbations(gm: SaqGraphModule) -> str | None:
    return None if record_of(gm).perturbation_case else "it has no perturbation leaves"


FACTS: dict[str, Callable[[SaqGraphModule], str | None]] = {
    "annotations": _missing_annotations,
    "shapes": _missing_shapes,
    "precision": _missing_precision,
    "quantizers": _missing_quantizers,
    "perturbations": _missing_perturbations,
}


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of the graph. A subclass states its rule, formula and source in its docstring.

    A graph that a pass gets runs as the passes before it have left it. What it rewrites itself, and then runs, it
    interprets (`saq_fx.shapes.interpreted`) or recompiles first.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    gives: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def run(self, gm: SaqGraphModule) -> PassResult:
        """Rewrites `gm` in place; `modified` tells whether anything changed."""

    @property
    def name(self) -> str:
        """The class name: what messages and timings call this pass."""
        return type(self).__name__


def check_facts(gm: SaqGraphModule, facts: frozenset[str], when: str) -> None:
    """Raises PassError naming the first fact that does not hold for `gm`."""
    if not isinstance(gm, SaqGraphModule):
        raise PassError(f"{when}: this is a {type(gm).__name__}, no prepared model: call saq_fx.prepare_saq first")
    for fact in sorted(facts):
        missing = FACTS[fact](gm)
        if missing is not None:
            raise PassError(f"{when}: the graph lacks {fact!r}: {missing}")


@dataclass(frozen=True)
class PassTiming:
    """How long one pass took, in seconds, and whether it changed the graph."""

    name: str
    seconds: float
    modified: bool


@dataclass(frozen=True)
class Pipeline:
    """A literal tuple of passes, run in order, each checked against its contract on the graph it returns.

    Args:
        passes: the passes, in order.
        after_each: called with each timing and the graph module as it then is: for logging or printing.
    """

    passes: tuple[Pass, ...]
    after_each: Callable[[PassTiming, fx.GraphModule], None] | None = None

    def run(self, gm: SaqGraphModule) -> PassResult:
        """Runs every pass; lints before the graph is seen: once, if only at the end.

        Raises:
            PassError: a contract does not hold, a pass failed, or the graph is broken; names the pass and those
                already run.
        """
        done: list[str] = []
        modified = False
        for each in self.passes:
            before = f"{each.name} (after {', '.join(done) or 'nothing'})"
            check_facts(gm, each.needs, f"before {before}")
            start = time.perf_counter()
            result = _run_checked(each, gm, before)
            timing = PassTiming(each.name, time.perf_counter() - start, result.modified)
            gm, modified = result.graph_module, modified or result.modified
            done.append(each.name)
            if result.modified:
                for _, part in graphs(gm):
                    part.recompile()
            if self.after_each is not None:
                _lint(gm, done)
                self.after_each(timing, gm)
        if modified and self.after_each is None:
            _lint(gm, done)
        return PassResult(gm, modified)


def _lint(gm: SaqGraphModule, done: list[str]) -> None:
    for path, part in graphs(gm):
        problem = _problem_in(part)
        if problem is not None:
            place = f"the graph of {path}" if path else "the graph"
            raise PassError(f"{place} is broken after {', '.join(done)}: {problem}")


def _problem_in(gm: SaqGraphModule) -> str | None:
    """What is wrong with a graph, as `gm.graph.lint()` would find it in a longer time."""
    computed: set[fx.Node] = set()
    names: set[str] = set()
    for node in gm.graph.nodes:
        if not computed.issuperset(node.all_input_nodes):
            early = next(each for each in node.all_input_nodes if each not in computed)
            return f"{node} uses {early}, which is not computed before it in this graph"
        if node.name in names:
            return f"two nodes have the name {node}"
        if node.op in ("call_module", "get_attr"):
            found = attribute_at(gm, str(node.target))
            if found is None:
                return f"{node} refers to the nonexistent attribute {node.target}"
            if node.op == "call_module" and not isinstance(found, nn.Module):
                return f"{node} calls {node.target}, which is a {type(found).__name__} and no module"
        elif node.op == "call_function" and not callable(node.target):
            return f"{node} calls {node.target!r}, which is no function"
        computed.add(node)
        names.add(node.name)
    return None


def _run_checked(each: Pass, gm: SaqGraphModule, description: str) -> PassResult:
    try:
        result = each.run(gm)
    except SaqError:
        raise
    except Exception as error:
        raise PassError(f"pass {description} failed: {with_notes(error)}") from error
    check_facts(result.graph_module, each.gives, f"after {description}")
    return result
