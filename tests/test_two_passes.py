"""The gradients of two passes against autograd written out, where a parameter is both in front of a mixture and not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.errors import TrainingError
from saq_fx.mixtures import MixtureQuantizer
from saq_fx.quantizers import ClipWeightQuantizer
from saq_fx.two_passes import TwoPasses

RADIUS = 0.3


class Mixed(nn.Module):
    """A weight that a mixture quantizes and that is used as it is, too."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.double))
        self.bias = nn.Parameter(torch.randn(3, dtype=torch.double))
        quantizers = [ClipWeightQuantizer(bits, dtype=torch.double) for bits in (2, 4)]
        self.mixture = MixtureQuantizer(quantizers, nn.Parameter(torch.tensor([0.2, -0.1], dtype=torch.double)))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        """(N, 4) -> (N, 3)."""
        self.passes += 1
        return F.linear(
            torch.tanh(F.linear(x, self.mixture(self.weight), self.bias)), self.weight.T @ self.weight[:, :3]
        )


def loss_of(output: Tensor) -> Tensor:
    return output.square().mean()


def expected(module: Mixed, x: Tensor, alignment: float | None) -> dict[str, Tensor]:
    """The step's gradient of every parameter, with the perturbation as a tensor of its own."""
    names, parameters = zip(*module.named_parameters(), strict=True)

    def gradients(moved_weight: Tensor, moved_bias: Tensor) -> list[Tensor]:
        hidden = F.linear(x, module.mixture.mix(module.weight) + moved_weight, module.bias + moved_bias)
        output = F.linear(torch.tanh(hidden), module.weight.T @ module.weight[:, :3])
        return list(torch.autograd.grad(loss_of(output), [moved_weight, moved_bias, *parameters]))

    zeros = [torch.zeros_like(each).requires_grad_() for each in (module.weight, module.bias)]
    first = gradients(*zeros)
    norm = torch.stack([each.square().sum() for each in first[:2]]).sum().sqrt()
    scale = RADIUS / norm - (alignment or 0.0)
    second = gradients(*((scale * each).requires_grad_() for each in first[:2]))
    share = 1.0 if alignment is None else 0.5
    pairs = zip(names, first[2:], second[2:], strict=True)
    return {name: a + share * (b - a) for name, a, b in pairs}


@pytest.mark.parametrize("alignment", [None, 0.0, 0.05])
def test_gradients_are_those_written_out(alignment: float | None) -> None:
    module, batches = Mixed(), torch.randn(3, 5, 4, dtype=torch.double)
    module(batches[0])  # fits the levels
    with TwoPasses(module, [module.mixture]) as passes:
        for x in batches:
            before = {name: each.detach().clone() for name, each in module.named_parameters()}
            passes.run(lambda x=x: loss_of(module(x)), RADIUS, alignment)
            wanted = expected(module, x, alignment)
            for name, parameter in module.named_parameters():
                assert torch.equal(parameter, before[name]), name
                torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-12, atol=1e-14, msg=name)
    assert module.passes == 1 + 2 * len(batches)
    assert module.mixture.held is None


def test_at_radius_zero_there_is_one_pass() -> None:
    module, x = Mixed(), torch.randn(5, 4, dtype=torch.double)
    module(x)
    wanted = torch.autograd.grad(loss_of(module(x)), list(module.parameters()))
    with TwoPasses(module, [module.mixture]) as passes:
        losses = passes.run(lambda: loss_of(module(x)), 0.0, 1e-3)
        for parameter, gradient in zip(module.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-14)
    assert losses.loss == losses.perturbed_loss
    assert module.passes == 3


@pytest.mark.parametrize("bad", ["nan", "shape"])
def test_a_bad_loss_is_refused_and_nothing_stays_moved(bad: str) -> None:
    module, x = Mixed(), torch.randn(5, 4, dtype=torch.double)
    module(x)
    before = module.bias.detach().clone()
    with pytest.raises(TrainingError, match="loss"), TwoPasses(module, [module.mixture]) as passes:
        passes.run(lambda: module(x) if bad == "shape" else loss_of(module(x)) * torch.nan, RADIUS, None)
    assert torch.equal(module.bias, before)
    assert module.mixture.held is None
