"""Einsums of several operands: opened from the left, which is what torch computes; their products are layers."""

import random

import pytest
import torch
from torch import Tensor, nn

from saq_fx import prepare_saq
from saq_fx.passes.open_einsum import equations_of_pairs
from saq_fx.recipe import Recipe
from saq_fx.report import precision_report

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def contracted(equation: str, operands: list[Tensor]) -> Tensor:
    result = operands[0]
    for pair, operand in zip(equations_of_pairs(equation), operands[1:], strict=True):
        result = torch.einsum(pair, result, operand)
    return result


def test_pairs_are_what_torch_contracts() -> None:
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)
    for _ in range(200):
        indices = chance.sample("abcdeF", chance.randint(2, 5))
        terms = ["".join(chance.sample(indices, chance.randint(1, min(3, len(indices))))) for _ in range(3)]
        sizes = {index: chance.choice((1, 2, 3, 5)) for index in indices}
        used = sorted({*"".join(terms)})
        output = "->" + "".join(chance.sample(used, chance.randint(0, len(used)))) if chance.random() < 0.8 else ""
        operands = [torch.randn([sizes[each] for each in term], generator=generator).double() for term in terms]
        torch.testing.assert_close(
            contracted(",".join(terms) + output, operands), torch.einsum(",".join(terms) + output, *operands)
        )


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("... i, ij, ... j -> ...", [(2, 3, 4), (4, 5), (2, 3, 5)]),
        ("...i,...j,ij", [(2, 3, 4), (3, 5), (4, 5)]),
        ("i...,j,jk,k...->i", [(2, 3), (4,), (4, 5), (5, 3)]),
        ("bii,ij,bj->bj", [(2, 4, 4), (4, 5), (2, 5)]),
    ],
)
def test_pairs_with_an_ellipsis(equation: str, shapes: list[tuple[int, ...]]) -> None:
    operands = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    torch.testing.assert_close(contracted(equation, operands), torch.einsum(equation, *operands))


class Bilinear(nn.Module):
    """Form of two activations and a weight, in code that may stay Python."""

    def __init__(self, in_python: bool) -> None:
        super().__init__()
        self.a, self.b, self.in_python = nn.Linear(8, 8), nn.Linear(8, 6), in_python
        self.weight = nn.Parameter(torch.randn(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        if self.in_python and x.mean() > -1:
            x = 2 * x
        return torch.einsum("bi,ij,bj->b", [x, self.weight, self.b(x)])


@pytest.mark.parametrize("in_python", [False, True])
def test_products_of_an_einsum_are_layers(in_python: bool) -> None:
    model = Bilinear(in_python)
    graph = prepare_saq(model, example_inputs=X, precision=None)
    for x in (X, X[:1]):
        assert torch.equal(graph(x), model(x))
    gm = prepare_saq(model, example_inputs=X)
    found = precision_report(gm)
    assert sorted(row.macs for row in found.rows if row.op == "einsum") == [6, 48]
    assert found.quantized_share == 1
    assert found.uncounted == ()
    floating = prepare_saq(model, example_inputs=X, precision="float", recipe=Recipe(first_last=None))
    torch.testing.assert_close(floating(X), model(X))
    gm(X).sum().backward()
    assert model.weight.grad is None
    assert all(parameter.grad is not None for parameter in gm.parameters())
