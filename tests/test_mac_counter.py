"""MACs as they run, against closed forms; what torch's own counter knows is tested with the costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saq_fx.mac_counter import MacCounter

TOKENS, WIDTH, HIDDEN = 10, 8, 16
ATTENTION = TOKENS * 4 * WIDTH**2 + 2 * TOKENS * 5 * WIDTH
MATRIX, VECTOR = torch.ones(5, 5), torch.ones(5)

COUNTED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "attention": (lambda x: nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval()(x, x, x), ATTENTION),
    "encoder layer": (
        lambda x: nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True).eval()(x),
        ATTENTION + 2 * TOKENS * WIDTH * HIDDEN,
    ),
    "lstm": (lambda x: nn.LSTM(WIDTH, HIDDEN, batch_first=True)(x), TOKENS * 4 * HIDDEN * (WIDTH + HIDDEN)),
    "gru": (lambda x: nn.GRU(WIDTH, HIDDEN, batch_first=True)(x), TOKENS * 3 * HIDDEN * (WIDTH + HIDDEN)),
    "mv": (lambda x: MATRIX.mv(VECTOR), 25),
    "addmv_": (lambda x: torch.zeros(5).addmv_(MATRIX, VECTOR), 25),
    "dot": (lambda x: VECTOR.dot(VECTOR) + torch.vdot(VECTOR, VECTOR), 10),
    "baddbmm_": (lambda x: torch.zeros(2, 5, 5).baddbmm_(x, x.mT), 2 * 5 * 5 * WIDTH),
    "addbmm": (lambda x: torch.addbmm(MATRIX, x, x.mT), 2 * 5 * 5 * WIDTH),
    "nothing": (lambda x: (x + 1).softmax(-1), 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_runs_is_counted(name: str) -> None:
    run, macs = COUNTED[name]
    with torch.no_grad(), MacCounter() as counter:
        run(torch.randn(2, 5, WIDTH))
    assert counter.macs == macs
