"""Every pass on every model of the zoo: honest `modified`, facts that hold on the result, annotations intact."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from saq_fx.annotation import annotation_of, record_of
from saq_fx.capture import capture
from saq_fx.errors import PassError
from saq_fx.graph import SaqGraphModule, graphs, layers
from saq_fx.inputs import split_inputs
from saq_fx.pass_base import FACTS, Pass, PassResult, Pipeline, check_facts
from saq_fx.passes.annotate_layers import AnnotateLayers
from saq_fx.passes.assign_precision import AssignPrecision
from saq_fx.passes.calibrate import Calibrate
from saq_fx.passes.canonicalize import Canonicalize
from saq_fx.passes.insert_perturbations import InsertPerturbations, RemovePerturbations
from saq_fx.passes.insert_quantizers import InsertQuantizers
from saq_fx.passes.open_attention import OpenAttention
from saq_fx.passes.open_einsum import OpenEinsum
from saq_fx.passes.reestimate_batchnorm import ReestimateBatchNorm
from saq_fx.passes.relax_precision import RelaxPrecision
from saq_fx.passes.train_saq import TrainSaq
from saq_fx.precision import Policy, Precision
from saq_fx.training_recipe import TrainingRecipe
from tests.zoo import ZOO


def passes(inputs: Any) -> list[Pass]:
    return [
        Canonicalize(),
        OpenAttention(),
        OpenEinsum(),
        AnnotateLayers(inputs),
        AssignPrecision(Policy.uniform("W4A4"), Precision(8, 8)),
        InsertQuantizers(),
        Calibrate((inputs,)),
        InsertPerturbations(case=3),
        InsertPerturbations(case=2),
        RemovePerturbations(),
        InsertPerturbations(case=1),
        TrainSaq([(inputs, None)], mean_square, TrainingRecipe(epochs=1, period=1)),
        ReestimateBatchNorm((inputs,)),
        RelaxPrecision((2, 4), (3, 6)),
    ]


def mean_square(outputs: Any, _: Any) -> Tensor:
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([leaf.square().mean() for leaf in leaves]).sum()


def fingerprint(gm: SaqGraphModule) -> Any:
    nodes = [
        (node.op, node.name, str(node.target), str(node.args), annotation_of(node))
        for _, part in graphs(gm)
        for node in part.graph.nodes
    ]
    return nodes, [record_of(part) for _, part in graphs(gm)], sorted(name for name, _ in gm.named_modules())


@pytest.mark.parametrize("name", ZOO)
def test_each_pass_keeps_its_contract(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs()
    gm = capture(entry.make(), inputs)
    annotated = None
    for each in passes(inputs):
        before = fingerprint(gm)
        result = Pipeline((each,)).run(gm)
        assert result.graph_module is gm
        assert result.modified == (before != fingerprint(gm)), each.name
        gm.graph.lint()
        check_facts(gm, each.gives, each.name)

        again = fingerprint(gm)
        assert not Pipeline((each,)).run(gm).modified, f"{each.name} changes its own result"
        assert again == fingerprint(gm)

        names = [layer.name for _, layer in layers(gm)]
        assert annotated is None or names == annotated, f"{each.name} lost annotations"
        annotated = names or None
    assert len(annotated or ()) == entry.layers
    args, kwargs = split_inputs(inputs)
    assert gm(*args, **kwargs) is not None


@pytest.mark.parametrize("name", ZOO)
def test_positions_and_uncounted(name: str) -> None:
    entry = ZOO[name]
    inputs = entry.inputs()
    gm = capture(entry.make(), inputs)
    Pipeline((Canonicalize(), OpenAttention(), AnnotateLayers(inputs))).run(gm)
    position = {layer.name: layer.position for _, layer in layers(gm)}
    for first in entry.first:
        assert position[first] in ("first", "only")
    for last in entry.last:
        assert position[last] in ("last", "only")
    assert tuple(each for each, _ in record_of(gm).uncounted) == entry.uncounted


def test_missing_fact_names_pass_and_fact() -> None:
    gm = capture(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(PassError, match=r"before AssignPrecision \(after Canonicalize\).*'annotations'"):
        Pipeline((Canonicalize(), AssignPrecision())).run(gm)
    assert FACTS["annotations"](gm) is not None


def test_failing_pass_names_those_already_run() -> None:
    class Broken(Pass):
        def run(self, gm: SaqGraphModule) -> Any:
            raise ZeroDivisionError("oops")

    gm = capture(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(PassError, match=r"Broken \(after Canonicalize\) failed: oops"):
        Pipeline((Canonicalize(), Broken())).run(gm)


def test_broken_graph_names_the_passes() -> None:
    class Breaking(Pass):
        def run(self, gm: SaqGraphModule) -> PassResult:
            gm.graph.find_nodes(op="get_attr")[0].target = "nothing.weight"
            return PassResult(gm, modified=True)

    gm = capture(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(PassError, match=r"broken after Canonicalize, Breaking: .*nonexistent attribute"):
        Pipeline((Canonicalize(), Breaking())).run(gm)


def test_pass_that_runs_the_graph_finds_it_up_to_date() -> None:
    class Negate(Pass):
        def run(self, gm: SaqGraphModule) -> PassResult:
            output = gm.graph.output_node()
            with gm.graph.inserting_before(output):
                output.update_arg(0, gm.graph.call_function(torch.neg, (output.args[0],)))
            return PassResult(gm, modified=True)

    class Run(Pass):
        def run(self, gm: SaqGraphModule) -> PassResult:
            seen.append(gm(x))
            return PassResult(gm, modified=False)

    seen: list[Tensor] = []
    model, x = torch.nn.Sequential(torch.nn.Linear(2, 2)), torch.randn(3, 2)
    gm = capture(model)
    assert torch.equal(gm(x), model(x))
    Pipeline((Canonicalize(), Negate(), Run())).run(gm)
    assert torch.equal(seen[0], -model(x))
    assert torch.equal(gm(x), -model(x))


def test_timings_reach_the_observer() -> None:
    seen = []
    gm = capture(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    Pipeline((Canonicalize(), OpenAttention()), after_each=lambda timing, _: seen.append(timing)).run(gm)
    assert [(timing.name, timing.modified) for timing in seen] == [
        ("Canonicalize", True),
        ("OpenAttention", False),
    ]
    assert all(timing.seconds >= 0 for timing in seen)
