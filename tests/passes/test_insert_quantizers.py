"""Where quantizers stand among the nodes of a graph."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.graph import layers
from saq_fx.prepare import prepare_saq


class Built(nn.Module):
    """A weight that is written to in place before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.entries, self.layer = nn.Parameter(torch.randn(6)), nn.Linear(4, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        triangular, rows = torch.zeros(4, 4), torch.tril_indices(4, 4, -1)
        triangular[rows[0], rows[1]] = self.entries
        return self.layer(x) @ triangular


class Rewritten(Built):
    """A weight that is written to in place between two uses."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layer.weight.detach().clone()
        x = F.linear(x, weight)
        weight[0] = self.entries[:4]
        return F.linear(x, weight)


@pytest.mark.parametrize("kind", [Built, Rewritten])
def test_weights_are_quantized_as_they_are_when_they_are_used(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(3, 4)
    gm = prepare_saq(model, example_inputs=x, precision="W8A8")
    with torch.no_grad():
        assert torch.allclose(gm(x), model(x), atol=0.02 * float(model(x).abs().max()))
    if kind is Built:
        gm(x).sum().backward()
        assert gm.get_parameter("entries").grad is not None


class Masked(nn.Module):
    """A weight under a mask that comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("mask", torch.ones(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.mask * (self.layer.weight + 0))


def test_a_layer_is_named_by_its_parameter_also_behind_a_mask() -> None:
    gm = prepare_saq(Masked(), example_inputs=torch.randn(2, 4))
    assert [(layer.name, layer.weight) for _, layer in layers(gm)] == [("layer", "layer.weight")]
