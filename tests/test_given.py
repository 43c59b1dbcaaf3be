"""What a model may be given: containers of tensors and None, keywords of any name; other ones are right or an error."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from saq_fx.errors import TracingError
from saq_fx.inputs import split_inputs
from saq_fx.prepare import prepare_saq
from tests.test_prepare import assert_same_function

X, M = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(0, 1, 12).reshape(3, 4)


class Pair(NamedTuple):
    x: Tensor
    mask: Tensor | None


@dataclass
class Record:
    x: Tensor
    mask: Tensor | None = None
    scale: float = 2.0


class Given(nn.Module):
    """Hands its inputs to a function, with a layer."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.layer, self.body = nn.Linear(4, 4), body

    def forward(self, inputs: Any) -> Any:
        return self.body(self.layer, inputs)


def masked(y: Tensor, mask: Tensor | None) -> Tensor:
    return y if mask is None else y * mask


def from_dict(layer: Any, d: Any) -> Tensor:
    y = masked(layer(d["x"]), d.get("mask"))
    return y + 1 if "shift" in d else y


def from_pair(layer: Any, pair: Any) -> Tensor:
    x, mask = pair
    return masked(layer(x), mask)


def from_fields(layer: Any, record: Any) -> Tensor:
    return masked(layer(record.x), record.mask)


def from_nested(layer: Any, items: Any) -> Tensor:
    first, rest = items
    return masked(layer(first), rest["masks"][1])


def by_key(layer: Any, d: Any) -> dict[str, Tensor]:
    return {key: layer(value) for key, value in {**d}.items()}


def ends(layer: Any, items: Any) -> Tensor:
    return layer(items[0]) + items[-1]


def every(layer: Any, items: Any) -> Tensor:
    return sum(layer(each) for each in items)


# Name: function; examples, of which a graph of one refuses the others; inputs that each graph takes.
CASES: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "dictionary": (from_dict, [{"x": X, "mask": M}, {"x": X, "mask": None}, {"x": X}, {"x": X, "shift": X}], []),
    "pair": (from_pair, [(X, M), (X, None)], []),
    "named pair": (from_fields, [Pair(X, M), Pair(X, None)], []),
    "dataclass": (from_fields, [Record(X, M), Record(X)], []),
    "nested": (from_nested, [(X, {"masks": [None, M]}), (X, {"masks": [X, None]})], []),
    "keys": (by_key, [{"a": X, "b": M}, {"b": X, "a": M}, {"a": X}], []),
    "ends": (ends, [[X, M]], [[X, M, X], [X], (X, M)]),
    "every": (every, [[X, M]], [[X], [X, M, X]]),
    "unused keys": (from_dict, [{"x": X, "other": M}], [{"x": X}, {"x": X, "more": None}]),
}


@pytest.mark.parametrize("name", CASES)
def test_containers(name: str) -> None:
    body, examples, alike = CASES[name]
    model = Given(body)
    for example in examples:
        gm = prepare_saq(model, example_inputs=(example,), precision=None)
        for inputs in (example, *alike):
            assert_same_function(model, gm, (inputs,))
        for inputs in examples:
            if inputs is not example:
                with pytest.raises(TracingError, match="another path"):
                    gm(inputs)


class Writing(nn.Module):
    """Puts what it computes into the dictionary that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, d: dict[str, Tensor]) -> dict[str, Tensor]:
        d["y"] = self.layer(d["x"])
        return d


def test_dictionaries_that_forward_changes() -> None:
    model = Writing()
    gm = prepare_saq(model, example_inputs=({"x": X},), precision=None)
    outputs = []
    for each in (model, gm):
        given = {"x": X}
        assert each(given) is given
        outputs.append(given["y"])
    assert torch.equal(*outputs)


class Keywords(nn.Module):
    """Arguments of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: float = 1.0, *, bias: Tensor, **more: Any) -> Tensor:
        y = masked(self.layer(x) * scale + bias, more.get("mask"))
        return y + more["extra"] if "extra" in more else y


def test_keywords_of_any_name() -> None:
    model = Keywords()
    example = {"x": X, "bias": X, "mask": M, "extra": M}
    gm = prepare_saq(model, example_inputs=example, precision=None)
    for inputs in (example, {name: example[name] for name in reversed(example)}):
        args, kwargs = split_inputs(inputs)
        assert torch.equal(gm(*args, **kwargs), model(*args, **kwargs))
    for missing in ("mask", "extra", "bias"):
        with pytest.raises(TracingError, match=f"'{missing}' is None or missing, and was given"):
            gm(**{name: value for name, value in example.items() if name != missing})
    gm = prepare_saq(model, example_inputs={"x": X, "bias": X, "mask": None}, precision=None)
    assert torch.equal(gm(X, bias=X), model(X, bias=X, mask=None))
    with pytest.raises(TracingError, match="'mask' was fixed at its default None"):
        gm(X, bias=X, mask=M)


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return masked(self.layer(x), mask)


def test_an_argument_that_was_given_is_missed() -> None:
    gm = prepare_saq(Optional(), example_inputs=(X, M), precision=None)
    for inputs in ((X,), (X, None)):
        with pytest.raises(TracingError, match="'mask' is None or missing"):
            gm(*inputs)
