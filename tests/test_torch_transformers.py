"""The transformers of torch itself: layers and products quantized, whatever the masks, in both modes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from saq_fx.prepare import prepare_saq
from saq_fx.report import precision_report

Inputs = dict[str, Tensor]

# Of (batch, sequence, width) = (1, 5, 8).
PADDED = torch.tensor([[False] * 3 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
MASKS: dict[str, dict[str, Inputs]] = {
    "layer": {
        "none": {},
        "padding": {"src_key_padding_mask": PADDED},
        "causal": {"src_mask": CAUSAL},
        "boolean": {"src_mask": CAUSAL != 0},
        "both": {"src_mask": CAUSAL != 0, "src_key_padding_mask": PADDED},
    },
    "encoder": {
        "none": {},
        "padding": {"src_key_padding_mask": PADDED},
        "causal": {"mask": CAUSAL},
        "both": {"mask": CAUSAL != 0, "src_key_padding_mask": PADDED},
    },
    "decoder": {"none": {}, "padding": {"tgt_key_padding_mask": PADDED, "memory_key_padding_mask": PADDED}},
    "transformer": {"none": {}, "padding": {"src_key_padding_mask": PADDED, "memory_key_padding_mask": PADDED}},
}
PRODUCTS = {"layer": 2, "encoder": 4, "decoder": 4, "transformer": 6}


def make(kind: str, batch_first: bool, norm_first: bool) -> nn.Module:
    def layer() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first)

    if kind == "layer":
        return layer()
    if kind == "encoder":
        return nn.TransformerEncoder(layer(), 2)  # type: ignore[arg-type]
    if kind == "decoder":
        return nn.TransformerDecoder(
            nn.TransformerDecoderLayer(8, 2, 16, batch_first=batch_first, norm_first=norm_first), 1
        )
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=batch_first, norm_first=norm_first)


def inputs_of(kind: str, masks: Inputs, batch_first: bool) -> Inputs:
    names = {"layer": ["src"], "encoder": ["src"], "decoder": ["tgt", "memory"], "transformer": ["src", "tgt"]}[kind]
    shape = (1, 5, 8) if batch_first else (5, 1, 8)
    return {**{name: torch.randn(shape) for name in names}, **masks}


def run(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    module.zero_grad()
    torch.manual_seed(0)
    output = module(**inputs)
    output.square().sum().backward()
    return [output, *(each.grad for each in module.parameters() if each.grad is not None)]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("kind", "masks"), [(kind, name) for kind, masks in MASKS.items() for name in masks])
def test_layers_and_products_are_quantized(kind: str, masks: str, batch_first: bool, norm_first: bool) -> None:
    model = make(kind, batch_first, norm_first)
    inputs, others = (inputs_of(kind, MASKS[kind][masks], batch_first) for _ in range(2))
    gm = prepare_saq(model, example_inputs=inputs, precision=None)
    for training in (False, True):
        for given in (inputs, others):
            pairs = zip(run(model.train(training), given), run(gm.train(training), given), strict=True)
            for expected, actual in pairs:
                # Projections of keys and values are one product in torch, and two here.
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    report = precision_report(prepare_saq(model, example_inputs=inputs))
    assert sum(".matmul" in row.name for row in report.rows) == PRODUCTS[kind]
    assert report.total_macs == macs(model, inputs)
    assert report.uncounted == ()


def macs(model: nn.Module, inputs: Inputs) -> int:
    """As torch's own counter has it, with the operations that fused ones consist of."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops() // 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("masks", MASKS["encoder"])
def test_inference_does_not_go_around_the_quantizers(masks: str) -> None:
    """Without gradients, torch's own encoder would leave its children for one fused operation in float."""
    model, inputs = make("encoder", True, False).eval(), inputs_of("encoder", MASKS["encoder"][masks], True)
    gm = prepare_saq(model, example_inputs=inputs)
    expected = gm(**inputs)
    with torch.no_grad():
        assert torch.equal(gm(**inputs), expected)
        assert not torch.allclose(model(**inputs), expected, atol=1e-3)
    assert torch.backends.mha.get_fastpath_enabled()
