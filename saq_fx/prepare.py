"""From a float model to an annotated, quantized graph; and changing its bits afterwards."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from saq_fx.annotation import LayerAnnotation, record_of
from saq_fx.capture import capture, capture_around
from saq_fx.copying import copied
from saq_fx.errors import CalibrationError, PassError, PrecisionError, SaqError, TracingError
from saq_fx.fitting import Observed
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.hooks import preserve_hooks
from saq_fx.inputs import ExampleInputs, split_inputs
from saq_fx.pass_base import Pipeline, check_facts
from saq_fx.passes.annotate_layers import AnnotateLayers
from saq_fx.passes.assign_precision import AssignPrecision
from saq_fx.passes.calibrate import Calibrate
from saq_fx.passes.canonicalize import Canonicalize
from saq_fx.passes.fit_levels import FitLevels
from saq_fx.passes.insert_quantizers import InsertQuantizers
from saq_fx.passes.open_attention import OpenAttention
from saq_fx.passes.open_einsum import OpenEinsum
from saq_fx.places import place_and_cause
from saq_fx.precision import Policy, Precision
from saq_fx.quantizers import Quantizer
from saq_fx.recipe import Recipe
from saq_fx.shapes import does_not_run, failure_of


@contextmanager
def _uncollected() -> Iterator[None]:
    """Within: no garbage collection. What a graph is made of stays, and walking it again and again takes long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_uncollected()
@torch.inference_mode(False)
def prepare_saq(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: ExampleInputs | None = None,
    precision: str | Precision | Policy | None = "W4A4",
    recipe: Recipe | None = None,
) -> SaqGraphModule:
    """Rewrites a model into a quantized graph with a precision on every layer. The model itself is not changed.

    Args:
        model: any module, a `GraphModule` traced before, or an `ExportedProgram`.
        example_inputs: a tensor, a tuple of positional inputs, or a dict of keyword inputs. Gives shapes and MACs (for
            one sample) and first clipping levels. Without it reports and budgets are not available, and levels are
            set by the first batch that the graph sees.
        precision: bits of every layer but the pinned first and last ones ("W4A4", a Precision), a Policy, or None:
            the float graph, which reproduces the model.
        recipe: how quantizers are made; the default suits the network (see `Recipe`).

    Raises:
        TracingError: the model cannot be captured, or does not run on the example; names the module and the line.
        PatternError: a policy's pattern matches no layer.
    """
    if not isinstance(model, nn.Module | ExportedProgram):
        raise SaqError(f"prepare_saq takes an ExportedProgram or an nn.Module, not {type(model).__name__}")
    with preserve_hooks(model) if isinstance(model, nn.Module) else nullcontext():
        return _prepared(model, example_inputs, precision, recipe)


def _prepared(
    model: nn.Module | ExportedProgram,
    example_inputs: ExampleInputs | None,
    precision: str | Precision | Policy | None,
    recipe: Recipe | None,
) -> SaqGraphModule:
    gm = capture(model, example_inputs)
    if record_of(gm).recipe is not None:
        raise SaqError("this graph is quantized already: use apply_policy to change its bits")
    if precision is not None:
        _check_values(gm)
    try:
        return _rewritten(gm, example_inputs, precision, recipe)
    except TracingError as error:
        gm = _captured_around(model, example_inputs, error)
    return _rewritten(gm, example_inputs, precision, recipe)


def _rewritten(
    gm: SaqGraphModule,
    example_inputs: ExampleInputs | None,
    precision: str | Precision | Policy | None,
    recipe: Recipe | None,
) -> SaqGraphModule:
    if precision is None:
        Pipeline((Canonicalize(), AnnotateLayers(example_inputs))).run(gm)
        return gm
    recipe = recipe or Recipe()
    policy = precision if isinstance(precision, Policy) else Policy.uniform(precision)
    observed: Observed = {}
    passes = (
        Canonicalize(),
        OpenAttention(),
        OpenEinsum(),
        AnnotateLayers(example_inputs, recipe.embeddings, observed),
        AssignPrecision(policy, recipe.first_last),
        InsertQuantizers(recipe),
        FitLevels(observed),
    )
    Pipeline(passes).run(gm)
    return gm


def _captured_around(
    model: nn.Module | ExportedProgram, example_inputs: ExampleInputs | None, error: TracingError
) -> SaqGraphModule:
    """Captures by parts a model whose graph does not run, as where code tries what fails with real tensors only.

    Raises:
        TracingError: the model does not run on the example either, or is a graph.
    """
    if not isinstance(model, nn.Module) or example_inputs is None:
        raise error
    inputs = split_inputs(example_inputs)
    failure = failure_of(copied(model), inputs)
    if failure is not None:
        raise does_not_run(type(model).__name__, inputs, place_and_cause(failure)) from error
    if isinstance(model, fx.GraphModule):
        raise error
    return capture_around(model, example_inputs, str(error))


def _check_values(gm: SaqGraphModule) -> None:
    for name, parameter in gm.named_parameters():
        if parameter.is_meta:
            raise SaqError(
                f"parameter {name} is on the meta device and has no values to fit clipping levels to: load the weights "
                "first (to_empty, load_state_dict), or prepare with precision=None for costs alone"
            )


def apply_policy(gm: SaqGraphModule, policy: Policy | Precision | str) -> None:
    """Changes the bits of a prepared graph in place.

    Layers that the policy does not name keep theirs. Where bits change, clipping levels are fitted anew: a weight's
    and an activation's at the next forward; call `calibrate` to set them from data of your choice.

    Raises:
        PatternError: a name or pattern that matches no layer.
        PassError: the graph was prepared with precision=None, or is relaxed for a search.
    """
    check_facts(gm, frozenset({"annotations", "quantizers"}), "apply_policy")
    policy = policy if isinstance(policy, Policy) else Policy.uniform(policy)
    Pipeline((AssignPrecision(policy),)).run(gm)
    for _, layer in layers(gm):
        for quantizer, bits in layer_quantizers(gm, layer):
            quantizer.set_bits(bits)


def layer_quantizers(gm: SaqGraphModule, layer: LayerAnnotation) -> Iterable[tuple[Quantizer, int]]:
    """A layer's quantizer modules, each with the bits that the layer's precision gives it."""
    if layer.precision is None:
        raise PrecisionError(f"layer {layer.name} has no precision")
    pairs = (
        (layer.weight_quantizer, layer.precision.weight),
        (layer.input_quantizer, layer.precision.activation),
    )
    for path, bits in pairs:
        if path is not None:
            quantizer = gm.get_submodule(path)
            if not isinstance(quantizer, Quantizer):
                raise PassError(
                    f"layer {layer.name} has a {type(quantizer).__name__} for a quantizer, since its bits are being "
                    "searched: use the graph that was searched a copy of"
                )
            yield quantizer, bits


def calibrate(gm: SaqGraphModule, batches: Iterable[ExampleInputs]) -> None:
    """Sets every clipping level from data: weights from themselves, activations from the batches.

    Args:
        batches: inputs of the model, each a tensor, a tuple of positional inputs or a dict of keyword inputs.

    Raises:
        CalibrationError: no batch, or values that are not finite.
        PassError: the graph has no quantizers.
    """
    batches = tuple(batches)
    if not batches:
        raise CalibrationError("calibration got no batches: pass at least one")
    Pipeline((Calibrate(batches),)).run(gm)
