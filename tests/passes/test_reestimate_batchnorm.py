"""BatchNorm statistics against the mean of those of the batches."""

import copy

import pytest
import torch
from torch import Tensor, nn

from saq_fx.errors import CalibrationError, PassError
from saq_fx.passes.reestimate_batchnorm import ReestimateBatchNorm
from saq_fx.prepare import prepare_saq
from tests.zoo import ZOO


def test_statistics_are_the_means_over_the_batches() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.Dropout(0.5)).double()
    batches = [torch.randn(5, 3, 6, 6, dtype=torch.float64) for _ in range(3)]
    gm = prepare_saq(model, example_inputs=batches[0], precision="W3A3").train()
    gm(batches[0])
    before = copy.deepcopy(gm)
    result = ReestimateBatchNorm(batches).run(gm)
    assert not result.modified
    outputs = []
    norm = gm.get_submodule("1")
    norm.register_forward_pre_hook(lambda _, args: outputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            gm.eval()(batch)
    mean = torch.stack([x.mean((0, 2, 3)) for x in outputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in outputs]).mean(0)
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(norm.running_var, variance, rtol=1e-12, atol=1e-12)
    assert norm.momentum == 0.3
    for name, parameter in gm.named_parameters():
        assert torch.equal(parameter, before.get_parameter(name))


def test_modes_come_back_and_nothing_else_moves() -> None:
    entry = ZOO["residual"]
    inputs = entry.inputs()
    gm = prepare_saq(entry.make(), example_inputs=inputs).train()
    gm.get_submodule("norm").eval()
    ReestimateBatchNorm([inputs]).run(gm)
    assert gm.training
    assert not gm.get_submodule("norm").training
    assert all(p.grad is None for p in gm.parameters())


def test_what_fails_leaves_the_statistics() -> None:
    entry = ZOO["residual"]
    inputs = entry.inputs()
    gm = prepare_saq(entry.make(), example_inputs=inputs).train()
    gm(inputs)
    before = {name: buffer.clone() for name, buffer in gm.named_buffers()}
    with pytest.raises(CalibrationError, match="no batches"):
        ReestimateBatchNorm([]).run(gm)
    with pytest.raises(RuntimeError):
        ReestimateBatchNorm([inputs, inputs[:, :1]]).run(gm)
    for name, buffer in gm.named_buffers():
        assert torch.equal(buffer, before[name]), name


class Activated(nn.BatchNorm2d):
    """Its forward is traced through, so that the graph has a function in its place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_functions_are_named_and_nothing_is_needed_without_batchnorm() -> None:
    gm = prepare_saq(nn.Sequential(nn.Conv2d(1, 2, 3), Activated(2)), example_inputs=torch.randn(2, 1, 5, 5))
    with pytest.raises(PassError, match="batch_norm: calls of batch_norm with statistics"):
        ReestimateBatchNorm([torch.randn(2, 1, 5, 5)]).run(gm)
    plain = prepare_saq(nn.Linear(2, 2), example_inputs=torch.ones(1, 2))
    assert not ReestimateBatchNorm([]).run(plain).modified
