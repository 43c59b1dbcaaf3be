"""Preparing leaves no trace: not in the inputs, nor in random generators, nor in the state of model and graph."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from saq_fx.nested import cloned, map_tensors, tensors_in
from saq_fx.prepare import calibrate, prepare_saq
from saq_fx.report import precision_report


class Restless(nn.Module):
    """Writes to its input, counts its calls, averages a parameter, and adds noise, also in evaluation mode."""

    def __init__(self, by_value: bool) -> None:
        super().__init__()
        self.a, self.b, self.by_value = nn.Linear(8, 8), nn.Linear(8, 8), by_value
        self.average = nn.Parameter(torch.ones(8), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        self.calls.add_(1)
        self.average.view(2, 4).mul_(0.5).add_(x.mean())
        y = self.a(x) * self.average + torch.randn_like(x)
        if self.by_value and y.sum() > 1e6:
            y = y * 2
        return self.b(y)


@pytest.mark.parametrize("precision", [None, "W4A4"])
@pytest.mark.parametrize("by_value", [False, True])
def test_preparing_leaves_no_trace(by_value: bool, precision: str | None) -> None:
    model, x = Restless(by_value), torch.ones(2, 8)
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    gm = prepare_saq(model, example_inputs=x, precision=precision)
    if precision is not None:
        calibrate(gm, [x])
    assert torch.equal(x, torch.ones(2, 8))
    assert torch.equal(torch.get_rng_state(), random)
    for owner in (model, gm):
        found = owner.state_dict()
        assert all(torch.equal(found[name], value) for name, value in state.items())
    gm(x)
    assert gm.calls == 1
    assert torch.equal(x, torch.full((2, 8), 2.0))
    assert torch.equal(gm.average, torch.full((8,), 2.5))


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm, self.b = nn.Linear(8, 8), nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.a(x), lengths, batch_first=True, enforce_sorted=False)
        return self.b(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


class Unpacking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.b = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8)

    def forward(self, packed: PackedSequence) -> Tensor:
        return self.b(pad_packed_sequence(self.lstm(packed)[0], batch_first=True)[0])


def test_packed_sequences() -> None:
    x, lengths = torch.randn(2, 5, 8), torch.tensor([3, 5])
    model = Packed()
    gm = prepare_saq(model, example_inputs=(x, lengths), precision=None)
    assert torch.equal(gm(x, lengths), model(x, lengths))
    assert [row.name for row in precision_report(prepare_saq(model, example_inputs=(x, lengths))).rows] == ["a", "b"]
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    model = Unpacking()
    gm = prepare_saq(model, example_inputs=(packed,), precision=None)
    assert torch.equal(gm(packed), model(packed))


def test_nested_values_keep_their_kinds_and_their_sharing() -> None:
    x, y = torch.ones(2), torch.zeros(3)
    packed = pack_padded_sequence(torch.ones(2, 3, 1), torch.tensor([3, 2]), batch_first=True)
    nested: Any = {"one": [x, (y, x)], "two": packed, "three": slice(1), "four": None}
    assert [id(each) for each in tensors_in(nested)[:3]] == [id(x), id(y), id(x)]
    copied = cloned(nested)
    first, (second, third) = copied["one"]
    assert first is third
    assert first is not x
    assert torch.equal(second, y)
    assert type(copied["two"]) is PackedSequence
    assert torch.equal(copied["two"].batch_sizes, packed.batch_sizes)
    assert copied["three"] == slice(1)
    assert map_tensors(lambda tensor: tensor.numel(), nested["one"]) == [2, (3, 2)]
