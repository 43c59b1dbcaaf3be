"""Relaxing: a mixture in the place of each quantizer, with one vector of logits for each choice."""

import copy
from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saq_fx.choices import choices
from saq_fx.errors import PassError, PatternError, PrecisionError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.inputs import split_inputs
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.networks import SmallResNet
from saq_fx.pass_base import Pipeline
from saq_fx.passes.relax_precision import RelaxPrecision
from saq_fx.precision import Policy, Precision
from saq_fx.prepare import apply_policy, prepare_saq
from saq_fx.recipe import Recipe
from tests.test_prepare import tensors
from tests.zoo import ZOO

UNPINNED = Recipe(first_last=None)


def prepared(name: str, recipe: Recipe | None = None) -> SaqGraphModule:
    return prepare_saq(ZOO[name].make(), example_inputs=ZOO[name].inputs(), recipe=recipe)


def relaxed(name: str, recipe: Recipe | None = None) -> SaqGraphModule:
    gm = prepared(name, recipe)
    RelaxPrecision().run(gm)
    return gm


def operands(gm: SaqGraphModule, name: str) -> tuple[Any, Any]:
    """The modules that quantize a layer's weight, or second operand, and its input."""
    layer = next(layer for _, layer in layers(gm) if layer.name == name)
    weight, activation = (path and gm.get_submodule(path) for path in (layer.weight_quantizer, layer.input_quantizer))
    return weight, activation


def select(mixture: MixtureQuantizer, bits: int) -> None:
    """Leaves one candidate in a mixture."""
    with torch.no_grad():
        mixture.logits.fill_(-torch.inf)[mixture.candidates.index(bits)] = 0.0


@pytest.mark.parametrize("name", ZOO)
def test_mixtures_are_where_the_quantizers_were(name: str) -> None:
    gm = prepared(name)
    free = [layer for _, layer in layers(gm) if layer.pinned is None]
    code = gm.code
    assert Pipeline((RelaxPrecision(),)).run(gm).modified == bool(free)
    assert gm.code == code
    paths = {path for layer in free for path in (layer.weight_quantizer, layer.input_quantizer) if path}
    assert paths == {path for path, each in gm.named_modules() if isinstance(each, MixtureQuantizer)}
    assert not RelaxPrecision().run(gm).modified


@pytest.mark.parametrize("recipe", [None, UNPINNED])
@pytest.mark.parametrize("name", ZOO)
def test_a_mixture_of_one_candidate_is_its_quantizer(name: str, recipe: Recipe | None) -> None:
    gm = prepared(name, recipe).double().eval()
    inputs = torch.fx.node.map_aggregate(
        ZOO[name].inputs(),
        lambda each: each.double() if isinstance(each, Tensor) and each.is_floating_point() else each,
    )
    plain = copy.deepcopy(gm)
    RelaxPrecision(weight=(2, 5), activation=(3, 6)).run(gm)
    chosen = {}
    for choice, (weight, activation) in zip(choices(gm), cycle(product((2, 5), (6, 3))), strict=False):
        bits = {choice.weight: weight, choice.activation: activation}
        for mixture in choice.mixtures:
            select(mixture, bits[mixture])
        chosen.update(dict.fromkeys(choice.layers, Precision(weight, activation)))
    apply_policy(plain, Policy(chosen))
    args, kwargs = split_inputs(inputs)
    outputs, expected = tensors(gm(*args, **kwargs)), tensors(plain(*args, **kwargs))
    for output, reference in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, reference, rtol=1e-10, atol=1e-10)


def test_layers_that_share_a_weight_share_one_choice() -> None:
    gm = relaxed("residual")
    (choice,) = choices(gm)
    assert (choice.name, choice.layers) == ("block", ("block", "block@1"))
    (weight, first), (same, second) = operands(gm, "block"), operands(gm, "block@1")
    assert weight is same
    assert first is not second
    assert first.logits is second.logits is not weight.logits
    assert sum(name.endswith("logits") for name, _ in gm.named_parameters()) == 2


def test_a_pin_of_one_layer_pins_all_that_share_its_weight() -> None:
    gm = relaxed("tied")
    assert choices(gm) == []


def test_the_operands_of_a_product_share_one_choice() -> None:
    gm = relaxed("attention")
    found = {choice.name: choice for choice in choices(gm)}
    of_product = next(choice for name, choice in found.items() if name == "matmul")
    second, first = operands(gm, "matmul")
    assert of_product.weight is None
    assert first.logits is second.logits is of_product.mixtures[0].logits
    assert of_product.precisions() == [Precision(bits, bits) for bits in (2, 3, 4, 6)]
    copied, original = copy.deepcopy(gm), gm
    second, first = operands(copied, "matmul")
    assert first.logits is second.logits is not operands(original, "matmul")[0].logits


def test_the_networks_input_has_no_mixture() -> None:
    gm = relaxed("residual", UNPINNED)
    stem = next(choice for choice in choices(gm) if choice.name == "stem")
    assert stem.activation is None
    assert stem.precisions() == [Precision(bits, 8) for bits in (2, 3, 4, 6)]
    assert torch.equal(stem.probabilities(), stem.mixtures[0].probabilities())


def test_values_over_pairs_are_in_the_order_of_the_precisions() -> None:
    gm = prepared("residual")
    RelaxPrecision(weight=(2, 4), activation=(3, 5, 7)).run(gm)
    (choice,) = choices(gm)
    pairs = choice.over_pairs(torch.add, [10 * torch.tensor([2, 4]), torch.tensor([3, 5, 7])])
    assert pairs.tolist() == [10 * each.weight + each.activation for each in choice.precisions()]
    for mixture in choice.mixtures:
        nn.init.normal_(mixture.logits)
    weight, activation = (mixture.probabilities().tolist() for mixture in choice.mixtures)
    assert choice.probabilities().tolist() == pytest.approx([p * q for p, q in product(weight, activation)])


@pytest.mark.parametrize("bits", [(), (2, 2), (2, 9), (4, 32)])
def test_candidates_are_checked(bits: tuple[int, ...]) -> None:
    with pytest.raises(PrecisionError, match="activation"):
        RelaxPrecision(activation=bits)


def test_a_float_graph_is_refused() -> None:
    gm = prepare_saq(ZOO["residual"].make(), example_inputs=ZOO["residual"].inputs(), precision=None)
    with pytest.raises(PassError, match="quantizers"):
        Pipeline((RelaxPrecision(),)).run(gm)


def resnet(**options: Any) -> SaqGraphModule:
    gm = prepare_saq(SmallResNet(4), example_inputs=torch.randn(2, 1, 8, 8))
    RelaxPrecision(**options).run(gm)
    return gm


def test_candidates_by_name_operator_and_class() -> None:
    overrides = {
        "op:conv2d": (2, 4),
        "class:ResidualBlock": {"weight": (3, 5)},
        "block2.*": {"activation": (6,)},
        "block2.conv2": (7, 8),
    }
    found = {choice.name: choice for choice in choices(resnet(overrides=overrides))}
    candidates = {name: tuple(mixture.candidates for mixture in found[name].mixtures) for name in found}
    assert candidates["block1.conv1"] == ((3, 5), (2, 4))
    assert candidates["block2.conv1"] == ((3, 5), (6,))
    assert candidates["block2.conv2"] == ((7, 8), (7, 8))


def test_layers_that_are_to_have_the_same_bits_share_one_choice() -> None:
    gm = resnet(same_bits=["block1.*", ("block2.conv1", "block3.conv1"), "*.shortcut.*"])
    groups = {choice.name: choice.layers for choice in choices(gm)}
    assert groups == {
        "block1.conv1": ("block1.conv1", "block1.conv2"),
        "block2.conv1": ("block2.conv1", "block3.conv1"),
        "block2.conv2": ("block2.conv2",),
        "block2.shortcut.0": ("block2.shortcut.0", "block3.shortcut.0"),
        "block3.conv2": ("block3.conv2",),
    }


def test_weights_with_the_bits_of_their_activations() -> None:
    gm = resnet(equal_operands=["block1.*"])
    first, second, *others = choices(gm)
    for choice in (first, second):
        assert choice.precisions() == [Precision(bits, bits) for bits in (2, 3, 4, 6)]
        assert choice.labels == (choice.name,)
        assert torch.equal(choice.probabilities(), choice.weight.probabilities())
    assert all(len(choice.precisions()) == 16 and len(choice.labels) == 2 for choice in others)


def test_products_and_layers_may_share_a_choice() -> None:
    gm = prepared("attention")
    RelaxPrecision(same_bits=["*"], equal_operands=["op:matmul"]).run(gm)
    (choice,) = choices(gm)
    assert {"matmul", "embed"} & set(choice.layers)
    assert len(choice.mixtures) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"overrides": {"blcok1.*": (2,)}}, PatternError, "'blcok1.*' matches no layer .* nearest are block1"),
        ({"overrides": {"stem": (2,)}}, PatternError, "'stem' matches no layer that has a choice"),
        ({"overrides": {"block1.*": {"weights": (2,)}}}, PrecisionError, "candidates of 'weights'"),
        ({"overrides": {"block1.*": (2, 9)}}, PrecisionError, "weight candidates of 'block1.*' are"),
        (
            {"same_bits": ["block1.*"], "overrides": {"block1.conv2": (2, 4)}},
            PrecisionError,
            "block1.conv1 .* and block1.conv2",
        ),
        ({"weight": (2, 4), "equal_operands": ["block1.*"]}, PrecisionError, "block1.conv1: weights and activations"),
    ],
)
def test_what_cannot_be_chosen_is_named(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        resnet(**options)
