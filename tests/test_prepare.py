"""The float graph is the model; the quantized one survives copies, and its bits change in place."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from saq_fx.annotation import record_of
from saq_fx.errors import CalibrationError, PassError, PatternError, SaqError, TracingError
from saq_fx.graph import SaqGraphModule, layers
from saq_fx.inputs import split_inputs
from saq_fx.precision import Policy, Precision
from saq_fx.prepare import apply_policy, calibrate, layer_quantizers, prepare_saq
from saq_fx.quantizers import Quantizer
from saq_fx.recipe import Recipe
from saq_fx.report import precision_report
from tests.zoo import ZOO

FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t", "mnasnet0_5",
    "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t",
    "swin_v2_t", "vgg11_bn", "vit_b_32",
)  # fmt: skip
SIZES = {"maxvit_t": 224, "vit_h_14": 224, "inception_v3": 299, "alexnet": 64, "googlenet": 64}


def tensors(value: Any) -> list[Tensor]:
    """All tensors of a nested output, in order."""
    found: list[Tensor] = []
    torch.fx.node.map_aggregate(value, lambda item: found.append(item) if isinstance(item, Tensor) else None)
    return found or [item for item in vars(value).values() if isinstance(item, Tensor)]


def run(module: nn.Module, inputs: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs, and gradients of the sum of their squares, from a fixed random state."""
    module.zero_grad()
    args, kwargs = split_inputs(inputs)
    torch.manual_seed(1)
    outputs = tensors(module(*args, **kwargs))
    sum(each.square().sum() for each in outputs).backward()  # type: ignore[union-attr]
    gradients = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    return outputs, gradients


def assert_same_run(model: nn.Module, gm: nn.Module, inputs: Any) -> None:
    expected, expected_gradients = run(model, inputs)
    outputs, gradients = run(gm, inputs)
    assert all(torch.equal(*pair) for pair in zip(outputs, expected, strict=True))
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, expected_gradients[name]), f"gradient of {name}, training={gm.training}"


def assert_same_function(model: nn.Module, gm: nn.Module, inputs: Any) -> None:
    for training in (False, True):
        assert_same_run(model.train(training), gm.train(training), inputs)
        model.zero_grad()  # the gradients of the largest models fit into memory for one mode only
        gm.zero_grad()
    buffers = dict(gm.named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("name", ZOO)
def test_float_graph_is_the_model(name: str) -> None:
    model, inputs = ZOO[name].make(), ZOO[name].inputs()
    gm = prepare_saq(model, example_inputs=inputs, precision=None)
    assert gm.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in gm.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert_same_function(model, gm, inputs)


def classifier(name: str) -> tuple[nn.Module, Tensor]:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight, std=0.02)  # torchvision starts it at zero, which hides everything
    size = SIZES.get(name, 224 if name.startswith("vit") else 64)
    return model, torch.randn(2, 3, size, size)


def check_classifier(name: str) -> None:
    model, inputs = classifier(name)
    gm = prepare_saq(model, example_inputs=inputs, precision=None)
    for copied, parameter in zip(gm.parameters(), model.parameters(), strict=True):
        assert torch.equal(copied, parameter)
        copied.data = parameter.data  # the largest models do not fit into memory twice
    assert_same_function(model, gm, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models))
def test_float_graph_is_the_model_on_all_classifiers(name: str) -> None:
    check_classifier(name)


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1"])
def test_float_graph_is_the_model_on_classifiers(name: str) -> None:
    check_classifier(name)


def copies(gm: SaqGraphModule) -> dict[str, nn.Module]:
    buffer = io.BytesIO()
    torch.save(gm, buffer)
    buffer.seek(0)
    return {
        "deepcopy": copy.deepcopy(gm),
        "pickle": pickle.loads(pickle.dumps(gm)),
        "torch.save": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("name", ZOO)
def test_copies_keep_outputs_bits_and_annotations(name: str) -> None:
    inputs = ZOO[name].inputs()
    gm = prepare_saq(ZOO[name].make(), example_inputs=inputs, precision="W3A5").eval()
    args, kwargs = split_inputs(inputs)
    expected = tensors(gm(*args, **kwargs))
    for kind, other in copies(gm).items():
        assert isinstance(other, SaqGraphModule)
        assert [layer for _, layer in layers(other)] == [layer for _, layer in layers(gm)], kind
        assert record_of(other) == record_of(gm), kind
        assert all(torch.equal(*pair) for pair in zip(tensors(other(*args, **kwargs)), expected, strict=True)), kind
        assert other.state_dict().keys() == gm.state_dict().keys(), kind
        apply_policy(other, "W2A2")
        assert all(layer.pinned or str(layer.precision) != "W2A2" for _, layer in layers(gm)), kind


def test_state_dict_round_trip_keeps_bits() -> None:
    inputs = ZOO["residual"].inputs()
    gm = prepare_saq(ZOO["residual"].make(), example_inputs=inputs, precision="W4A4").eval()
    apply_policy(gm, Policy({"block": "W2A3", "block@1": "W2A6"}))
    expected = gm(inputs)
    other = prepare_saq(ZOO["residual"].make(), example_inputs=inputs).eval()
    other.load_state_dict(gm.state_dict())
    assert torch.equal(other(inputs), expected)
    assert [layer.precision for _, layer in layers(other)] == [layer.precision for _, layer in layers(gm)]


def test_float_checkpoint_loads_and_levels_follow_it() -> None:
    model, trained = ZOO["residual"].make(), ZOO["residual"].make()
    inputs = ZOO["residual"].inputs()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(3.0)
    gm = prepare_saq(model, example_inputs=inputs)
    gm.load_state_dict(trained.state_dict())
    expected = prepare_saq(trained, example_inputs=inputs)
    gm.eval()(inputs)
    level = gm.get_parameter("block.weight_quantizer.clipping_level")
    assert torch.equal(level, expected.get_parameter("block.weight_quantizer.clipping_level"))
    reloaded = gm.state_dict()
    gm.load_state_dict(reloaded)
    assert all(module.initialized for module in gm.modules() if isinstance(module, Quantizer))


def test_shared_layers_have_one_weight_quantizer() -> None:
    gm = prepare_saq(ZOO["residual"].make(), example_inputs=ZOO["residual"].inputs())
    block, again = (layer for _, layer in layers(gm) if layer.name.startswith("block"))
    assert block.weight_quantizer == again.weight_quantizer == "block.weight_quantizer"
    assert (block.input_quantizer, again.input_quantizer) == (
        "block.input_quantizer",
        "block.input_quantizer_1",
    )
    assert sum(node.target == "block.weight_quantizer" for node in gm.graph.nodes) == 1
    assert block.choice_group == again.choice_group == "block"


def test_first_and_last_layers_are_pinned() -> None:
    gm = prepare_saq(ZOO["residual"].make(), example_inputs=ZOO["residual"].inputs(), precision="W2A3")
    precision = {layer.name: str(layer.precision) for _, layer in layers(gm)}
    assert precision == {"stem": "W8A8", "block": "W2A3", "block@1": "W2A3", "head": "W8A8"}
    first = next(layer for _, layer in layers(gm))
    assert first.input_quantizer is None
    assert first.reads_network_input


def test_signedness_comes_from_the_producer() -> None:
    gm = prepare_saq(ZOO["convolutions"].make(), example_inputs=ZOO["convolutions"].inputs())
    signed = {layer.name: layer.activation_signed for _, layer in layers(gm)}
    assert not signed["dilated"]
    assert not signed["reflecting"]
    assert signed["same"]
    assert signed["transposed"]
    recipe = Recipe(signed={"same": False})
    gm = prepare_saq(ZOO["convolutions"].make(), example_inputs=ZOO["convolutions"].inputs(), recipe=recipe)
    assert not gm.get_submodule("same.input_quantizer").signed


def test_all_activations_may_have_offsets() -> None:
    entry = ZOO["residual"]
    inputs = entry.inputs()
    gm = prepare_saq(entry.make(), example_inputs=inputs, recipe=Recipe(activation_offsets=True))
    quantizers: list[Any] = [
        gm.get_submodule(layer.input_quantizer) for _, layer in layers(gm) if layer.input_quantizer
    ]
    assert [quantizer.signed for quantizer in quantizers] == [False, False, False]
    gm(inputs).square().sum().backward()
    assert all(float(quantizer.offset.grad.abs()) > 0 for quantizer in quantizers)
    assert record_of(gm).recipe == Recipe.from_dict(Recipe(activation_offsets=True).to_dict())


@pytest.mark.parametrize("scheme", ["clip", "lsq"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_eight_bits_are_close_to_float(scheme: str, per_channel: bool) -> None:
    model, inputs = ZOO["convolutions"].make().eval(), ZOO["convolutions"].inputs()
    recipe = Recipe(scheme=scheme, per_channel=per_channel)
    gm = prepare_saq(model, example_inputs=inputs, precision="W8A8", recipe=recipe)
    expected = model(inputs)
    assert (gm(inputs) - expected).norm() < 0.03 * expected.norm()


def test_apply_policy_changes_bits_in_place() -> None:
    inputs = ZOO["residual"].inputs()
    gm = prepare_saq(ZOO["residual"].make(), example_inputs=inputs)
    apply_policy(gm, Policy({"block*": Precision(2, 6)}))
    for _, layer in layers(gm):
        assert all(quantizer.bits == bits for quantizer, bits in layer_quantizers(gm, layer))
    weight = gm.get_submodule("block.weight_quantizer")(gm.get_parameter("block.weight"))
    assert len(weight.unique()) == 4
    calibrate(gm, [inputs, inputs])
    assert all(module.initialized for module in gm.modules() if isinstance(module, Quantizer))


class Rescaled(nn.Module):
    """Between two layers, of which one reads `h` before it is scaled in place, and one after."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        y = self.b(h)
        h = h.mul_(100) if self.in_place else h * 100
        return self.c(y + h)


def test_levels_fit_what_entered_whatever_is_written_to_it_later() -> None:
    x = torch.randn(8, 4)
    graphs = {}
    for in_place in (False, True):
        torch.manual_seed(0)
        graphs[in_place] = prepare_saq(Rescaled(in_place), example_inputs=x)
    expected = graphs[False].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in graphs[True].state_dict().items())


def test_code_is_generated_when_it_is_asked_for_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generated: list[torch.fx.Graph] = []
    python_code = torch.fx.Graph.python_code

    def counted(graph: torch.fx.Graph, *args: Any, **kwargs: Any) -> Any:
        generated.append(graph)
        return python_code(graph, *args, **kwargs)

    monkeypatch.setattr(torch.fx.Graph, "python_code", counted)
    model, x = ZOO["residual"].make(), ZOO["residual"].inputs()
    gm = prepare_saq(model, example_inputs=x)
    calibrate(gm, [x])
    copied = copy.deepcopy(gm)
    assert not generated
    assert list(inspect.signature(gm.forward).parameters) == list(inspect.signature(model.forward).parameters)
    assert generated == [gm.graph]
    assert torch.equal(gm(x), gm(x))
    assert "block.weight_quantizer" in gm.code
    assert "weight_quantizer" in str(gm)
    assert generated == [gm.graph]
    output = copied.graph.output_node()
    with copied.graph.inserting_before(output):
        output.update_arg(0, copied.graph.call_function(torch.neg, (output.args[0],)))
    assert torch.equal(copied(x), -gm(x))
    output.update_arg(0, output.all_input_nodes[0].args[0])
    copied.recompile()
    assert torch.equal(copied(x), gm(x))
    assert len(generated) == 3


def test_code_is_up_to_date_for_what_compiles_a_graph() -> None:
    model, x = ZOO["residual"].make(), ZOO["residual"].inputs()
    expected = prepare_saq(model, example_inputs=x)(x)
    for compiled in (prepare_saq(model, example_inputs=x), nn.Sequential(prepare_saq(model, example_inputs=x))):
        compiled.compile(backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), expected)


def test_the_model_is_not_modified() -> None:
    model = ZOO["residual"].make().train()
    before = copy.deepcopy(model.state_dict())
    gm = prepare_saq(model, example_inputs=ZOO["residual"].inputs())
    gm(ZOO["residual"].inputs()).sum().backward()
    assert type(model.stem) is nn.Conv2d
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training is True for module in model.modules())


def test_a_traced_graph_is_accepted() -> None:
    model, inputs = ZOO["residual"].make().eval(), ZOO["residual"].inputs()
    gm = prepare_saq(torch.fx.symbolic_trace(model), example_inputs=inputs, precision=None)
    assert torch.equal(gm(inputs), model(inputs))
    assert record_of(gm).tracing == "given graph"


def test_errors_name_what_is_wrong() -> None:
    model, inputs = ZOO["residual"].make(), ZOO["residual"].inputs()
    with pytest.raises(PatternError, match="blokc"):
        prepare_saq(model, example_inputs=inputs, precision=Policy({"blokc": "W4A4"}))
    with pytest.raises(SaqError, match=r"nn\.Module, not str"):
        prepare_saq("resnet18")  # type: ignore[arg-type]
    gm = prepare_saq(model, example_inputs=inputs)
    with pytest.raises(SaqError, match="apply_policy"):
        prepare_saq(gm, example_inputs=inputs)
    with pytest.raises(CalibrationError, match="no batches"):
        calibrate(gm, [])
    with pytest.raises(PassError, match=r"to have 3 channels, but got 5 channels.* while computing %conv2d"):
        calibrate(gm, [torch.randn(2, 5, 4, 4)])
    with pytest.raises(CalibrationError, match=r"block\.input_quantizer"):
        calibrate(gm, [torch.full_like(inputs, float("nan"))])
    with pytest.raises(PassError, match="precision=None"):
        apply_policy(prepare_saq(model, precision=None), "W4A4")
    with pytest.raises(TracingError, match=r"shapes \[\(2, 5, 4, 4\)\]"):
        prepare_saq(model, example_inputs=torch.randn(2, 5, 4, 4))


class Words(nn.Module):
    """Two tables, one read twice, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 8, padding_idx=0)
        self.positions = nn.Embedding(6, 8)
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.tokens(tokens.flip(1)) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(torch.relu(self.inner(x)))


def test_embeddings_stay_float_unless_asked_for() -> None:
    tokens = torch.randint(50, (2, 6))
    gm = prepare_saq(Words(), example_inputs=tokens)
    assert [layer.name for _, layer in layers(gm)] == ["inner", "head"]
    assert precision_report(gm).uncounted == ()


@pytest.mark.parametrize("per_channel", [False, True])
def test_embeddings_are_layers_without_macs(per_channel: bool) -> None:
    tokens = torch.randint(50, (2, 6))
    recipe = Recipe(embeddings=True, per_channel=per_channel)
    policy = Policy({"op:embedding": "W3A8", "positions": "float"}, default="W4A4")
    gm = prepare_saq(Words(), example_inputs=tokens, precision=policy, recipe=recipe)
    rows = {row.name: row for row in precision_report(gm).rows}
    assert list(rows) == ["tokens", "tokens@1", "positions", "inner", "head"]
    assert [(row.op, row.macs, row.bitops, row.weight_bits) for row in list(rows.values())[:3]] == [
        ("embedding", 0, 0, 3),
        ("embedding", 0, 0, 3),
        ("embedding", 0, 0, 32),
    ]
    levels = 8 if per_channel else 1
    assert rows["tokens"].weight_bytes == 50 * 8 * 3 / 8 + 4 * levels
    assert rows["tokens@1"].weight_bytes == 0
    assert rows["tokens"].activation_bytes == 0
    assert [rows[name].pinned for name in rows] == [None, None, None, "first", "last"]
    table = gm.get_submodule("tokens.weight_quantizer")(gm.get_parameter("tokens.weight"))
    assert all(len(column.unique()) <= 8 for column in (table.T if per_channel else [table]))
    gm(tokens).sum().backward()
    assert bool((gm.get_parameter("tokens.weight").grad[0] == 0).all())


def test_a_table_tied_to_a_layer_shares_its_quantizer_and_bits() -> None:
    inputs = ZOO["tied"].inputs()
    gm = prepare_saq(ZOO["tied"].make(), example_inputs=inputs, precision="W3A3", recipe=Recipe(embeddings=True))
    found = {layer.name: layer for _, layer in layers(gm)}
    assert list(found) == ["embedding", "inner", "inner@1", "head"]
    table, head = found["embedding"], found["head"]
    assert table.weight_quantizer == head.weight_quantizer
    assert table.choice_group == head.choice_group == "head"
    assert str(table.precision) == str(head.precision) == "W8A8"  # the head is the last layer
    rows = {row.name: row for row in precision_report(gm).rows}
    assert (rows["embedding"].weight_bytes, rows["head"].weight_bytes) == (0, 11 * 8 + 4)


def test_overrides_by_name_operator_and_class() -> None:
    inputs = ZOO["attention"].inputs()
    policy = Policy(
        {"op:matmul": "W6A6", "class:MultiheadAttention": "W5A5", "self_*.out_proj": "float", "head": "W2A2"},
        default="W4A4",
    )
    gm = prepare_saq(ZOO["attention"].make(), example_inputs=inputs, precision=policy)
    found = {layer.name: (layer.op, str(layer.precision)) for _, layer in layers(gm)}
    assert found["self_attention.out_proj"] == ("linear", "W32A32")
    assert found["cross_attention.out_proj"] == ("linear", "W5A5")
    assert found["head"] == ("linear", "W2A2")
    assert found["packed"] == ("linear", "W4A4")
    products = {name: bits for name, (op, bits) in found.items() if op == "matmul"}
    assert sorted(products.values()) == ["W5A5"] * 4 + ["W6A6"] * 2
    with pytest.raises(PatternError, match=r"'op:conv2d': the nearest are op:linear"):
        prepare_saq(ZOO["attention"].make(), example_inputs=inputs, precision=Policy({"op:conv2d": "float"}))
    with pytest.raises(PatternError, match=r"'class:MultiHead': the nearest are class:MultiheadAttention"):
        prepare_saq(ZOO["attention"].make(), example_inputs=inputs, precision=Policy({"class:MultiHead": "float"}))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_float_graph_is_the_model_on_another_shape(name: str) -> None:
    model, inputs = classifier(name)
    gm = prepare_saq(model, example_inputs=inputs, precision=None)
    assert_same_function(model, gm, torch.randn(3, 3, 96, 80))


@pytest.mark.slow
@pytest.mark.parametrize("name", torchvision.models.list_models(module=torchvision.models.detection))
def test_float_graph_is_the_detector(name: str) -> None:
    sizes = {} if name.startswith("ssd") else {"min_size": 96, "max_size": 160}
    model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **sizes).eval()
    gm = prepare_saq(model, example_inputs=([torch.rand(3, 96, 96)],), precision=None)
    report = precision_report(gm)
    assert report.tracing == "by parts"
    assert report.uncounted == ()
    images = [torch.rand(3, 120, 80), torch.rand(3, 64, 100)]
    for found, expected in zip(gm(images), model(images), strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    ("inputs", "problem"),
    [
        (
            torch.zeros(2, 3, 32, 32),
            r"not run on the example inputs of shapes \[\(2, 3, 32, 32\)\]: .*`\w.*`: Wrong image height! .* got 32!",
        ),
        ((torch.zeros(2, 3, 64, 64), None), r"do not fit VisionTransformer\.forward.*: too many positional"),
        ({"image": torch.zeros(2, 3, 64, 64)}, r"do not fit VisionTransformer\.forward.*: .*keyword argument 'image'"),
    ],
)
@pytest.mark.parametrize("precision", [None, "W4A4"])
def test_examples_that_the_model_does_not_take_are_told_in_its_own_words(
    inputs: Any, problem: str, precision: str | None
) -> None:
    model = torchvision.models.VisionTransformer(64, 32, 1, 2, 8, 16)
    with pytest.raises(TracingError, match=problem):
        prepare_saq(model, example_inputs=inputs, precision=precision)


def test_whatever_lists_the_members_of_a_graph_can() -> None:
    gm = prepare_saq(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), example_inputs=torch.randn(2, 3))
    names = {name for name, _ in inspect.getmembers(gm)}  # as torch.jit.trace does
    assert "generate_code" in names
    assert "python_model" not in names
