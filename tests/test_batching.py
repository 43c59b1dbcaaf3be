"""Cutting batches of any nesting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from saq_fx.batching import batch_size, cut
from saq_fx.errors import TrainingError


@given(samples=st.integers(1, 40), size=st.none() | st.integers(1, 50), fraction=st.floats(0.01, 1.0))
def test_chunks_make_up_the_batch(samples: int, size: int | None, fraction: float) -> None:
    batch = {"x": torch.arange(samples), "more": [torch.arange(2 * samples).reshape(samples, 2), "a name"]}
    seen: list[Tensor] = []

    def closure(batch: dict[str, Tensor]) -> Tensor:
        assert torch.equal(batch["x"] * 2, batch["more"][0][:, 0])
        assert batch["more"][1] == "a name"
        seen.append(batch["x"])
        return batch["x"].sum()

    parts = cut(closure, (batch,), size, fraction)
    assert sum(part.share for part in parts) == pytest.approx(1.0)
    for part in parts:
        part.first()
        part.second(torch.tensor(1.0))
    assert torch.equal(torch.cat(seen[::2]), torch.arange(samples))
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        assert fraction * len(first) <= len(second) < fraction * len(first) + 1
        assert torch.equal(first[: len(second)], second)


def test_the_second_pass_takes_the_samples_of_the_largest_losses() -> None:
    batch = torch.arange(7)
    seen: list[Tensor] = []

    def closure(batch: Tensor) -> Tensor:
        seen.append(batch)
        return (batch * 4) % 7  # of 0 to 6: 0, 4, 1, 5, 2, 6, 3

    for part in cut(closure, (batch,), None, 0.4):
        part.second(part.first())
    assert seen[1].tolist() == [1, 3, 5]
    (part,) = cut(closure, (batch,), None, 0.4)
    with pytest.raises(TrainingError, match="returned 14 losses for a batch of 7 samples"):
        part.second(torch.zeros(14))


def test_what_cannot_be_cut_is_named() -> None:
    with pytest.raises(TrainingError, match=r"it has \[\(4,\), \(3, 2\)\]"):
        batch_size((torch.ones(4), torch.ones(3, 2)))
    with pytest.raises(TrainingError, match=r"it has \[\(\)\]"):
        batch_size(torch.tensor(1.0))
    with pytest.raises(TrainingError, match=r"it has \[\]"):
        batch_size({"a": 1})
