"""Levels fitted to the one run of the example are those that a calibration on it sets, bit for bit."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from saq_fx.prepare import calibrate, prepare_saq
from saq_fx.recipe import Recipe
from tests.zoo import ZOO


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(scheme="lsq", per_channel=True, embeddings=True)])
@pytest.mark.parametrize("name", ZOO)
def test_levels_are_those_of_a_calibration(name: str, recipe: Recipe) -> None:
    entry = ZOO[name]
    model, inputs = entry.make(), entry.inputs()
    fitted = prepare_saq(model, example_inputs=inputs, recipe=recipe)
    calibrated = prepare_saq(model, example_inputs=inputs, recipe=recipe)
    calibrate(calibrated, [inputs])
    expected = calibrated.state_dict()
    assert fitted.state_dict().keys() == expected.keys()
    for key, value in fitted.state_dict().items():
        assert torch.equal(value, expected[key]), key


def test_graph_that_was_prepared_as_float() -> None:
    model, x = ZOO["residual"].make(), ZOO["residual"].inputs()
    twice = prepare_saq(prepare_saq(model, example_inputs=x, precision=None), example_inputs=x).state_dict()
    for key, value in prepare_saq(model, example_inputs=x).state_dict().items():
        assert torch.equal(value, twice[key]), key


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, counts convolutions."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.convolution.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("batch", "runs"), [(1, 1), (4, 2)])  # of a batch, and for the shapes of one sample
def test_example_runs_once(batch: int, runs: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 6, 3))
    with _Counting() as counting:  # type: ignore[no-untyped-call]
        prepare_saq(model, example_inputs=torch.randn(batch, 3, 9, 9))
    assert counting.count == 3 * runs
