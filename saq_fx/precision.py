"""What a user asks for: precisions, policies over layers, and budgets; all of them validated at birth."""

import json
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from difflib import get_close_matches
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from saq_fx.errors import CheckpointError, PatternError, PrecisionError

FLOAT_BITS = 32
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, order=True)
class Precision:
    """Bits of a layer's weight and of its input activation: each 2 to 8, or 32 for float.

    Raises PrecisionError for any other width.
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for operand, bits in (("weight", self.weight), ("activation", self.activation)):
            if type(bits) is not int or not (MIN_BITS <= bits <= MAX_BITS or bits == FLOAT_BITS):
                raise PrecisionError(
                    f"{operand} bits are {bits!r}; give an integer from {MIN_BITS} to {MAX_BITS}, "
                    f"or {FLOAT_BITS} for float"
                )

    @classmethod
    def parse(cls, value: "PrecisionLike") -> "Precision":
        """Read "W4A4", "float" or a (weight, activation) pair; a Precision is returned as it is.

        Raises PrecisionError for anything else.
        """
        if isinstance(value, Precision):
            return value
        if isinstance(value, tuple) and len(value) == 2:
            return cls(*value)
        if value == "float":
            return cls(FLOAT_BITS, FLOAT_BITS)
        match = re.fullmatch(r"W([0-9]{1,2})A([0-9]{1,2})", value) if isinstance(value, str) else None
        if match is None:
            raise PrecisionError(f"{value!r} is no precision; write weight and activation bits like 'W4A4'")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation}"


PrecisionLike: TypeAlias = Precision | str | tuple[int, int]


@dataclass(frozen=True)
class LayerKey:
    """What a policy knows of a layer: its name, operator, enclosing module classes, and pinned precision."""

    name: str
    op: str
    module_classes: tuple[str, ...] = ()
    pinned: Precision | None = None

    def matches(self, pattern: str) -> bool:
        """Whether a glob over names, "op:..." or "class:..." (globs too) describes this layer."""
        if pattern.startswith("op:"):
            return fnmatchcase(self.op, pattern.removeprefix("op:"))
        if pattern.startswith("class:"):
            return any(fnmatchcase(name, pattern.removeprefix("class:")) for name in self.module_classes)
        return fnmatchcase(self.name, pattern)


class Policy(Mapping[str, Precision]):
    """An immutable mapping from layer names or patterns to precisions, with an optional default.

    A key is an exact layer name, a glob ("layer1.*"), an operator ("op:conv2d") or a module class
    ("class:BasicBlock"). The order of the keys is part of the policy: of several patterns the last one wins. What is to
    stay in float is given the precision "float".
    Raises PrecisionError, naming the key, for an entry that is no precision.
    """

    def __init__(self, layers: Mapping[str, PrecisionLike] = {}, default: PrecisionLike | None = None) -> None:
        if not isinstance(layers, Mapping):
            raise PrecisionError(f"a policy maps layers to precisions, as {{'fc': 'W4A4'}}; it got {layers!r}")
        self._layers = {_checked_key(key): _parse_entry(repr(key), value) for key, value in layers.items()}
        self._default = None if default is None else _parse_entry("the default", default)

    @classmethod
    def uniform(cls, precision: PrecisionLike) -> Self:
        """The policy that gives every layer without a pin the same precision."""
        return cls(default=precision)

    @property
    def default(self) -> Precision | None:
        """The precision of layers that nothing else applies to; None leaves the choice to the caller."""
        return self._default

    def __getitem__(self, key: str) -> Precision:
        return self._layers[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self._state() == other._state()

    def __hash__(self) -> int:
        return hash(self._state())

    def __repr__(self) -> str:
        return f"Policy({len(self)} entries, default={self._default})"

    def _state(self) -> tuple[Any, ...]:
        return tuple(self._layers.items()), self._default

    def resolve(self, layers: Sequence[LayerKey]) -> dict[str, Precision | None]:
        """Give each layer its precision, or None where nothing applies.

        An exact name beats a pin; a pin beats patterns and the default; of several patterns the last wins.
        Raises PatternError, naming every key that matches no layer and the layers nearest to it.
        """
        names = {layer.name for layer in layers}
        patterns = [key for key in self if key not in names]
        unmatched = [pattern for pattern in patterns if not any(layer.matches(pattern) for layer in layers)]
        if unmatched:
            raise PatternError(_unmatched_message(unmatched, layers))
        return {layer.name: self._choose(layer, patterns) for layer in layers}

    def _choose(self, layer: LayerKey, patterns: list[str]) -> Precision | None:
        if layer.name in self._layers:
            return self._layers[layer.name]
        if layer.pinned is not None:
            return layer.pinned
        last = next((pattern for pattern in reversed(patterns) if layer.matches(pattern)), None)
        return self._default if last is None else self._layers[last]

    def to_json(self) -> str:
        """The policy as JSON text, one layer a line, in the order of its keys."""
        document = {
            "format": "saq_fx.policy",
            "version": 1,
            "default": None if self._default is None else str(self._default),
            "layers": {key: str(precision) for key, precision in self._layers.items()},
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises CheckpointError or PrecisionError, naming the field, for anything else.
        """
        try:
            document = json.loads(text, object_pairs_hook=_unique_fields)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"no policy, for it is not valid JSON: {error}") from error
        if not isinstance(document, dict) or document.get("format") != "saq_fx.policy":
            raise CheckpointError("no policy: field 'format' should be 'saq_fx.policy'")
        if document.get("version") != 1:
            raise CheckpointError(f"field 'version' is {document.get('version')!r}; it should be 1")
        if unknown := document.keys() - {"format", "version", "default", "layers"}:
            raise CheckpointError(f"fields {sorted(unknown)} are unknown; take them out")
        layers = document.get("layers")
        if not isinstance(layers, dict):
            raise CheckpointError("field 'layers' should map layer names to precisions like 'W4A4'")
        return cls(layers, document.get("default"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON: the file appears whole or not at all."""
        write_whole(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a policy that `save` wrote.

        Raises CheckpointError or PrecisionError, naming file and field, when the file holds no policy.
        """
        try:
            return cls.from_json(Path(path).read_bytes())
        except (CheckpointError, PrecisionError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from error


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all: to a temporary file in the same folder, which then takes its name.

    A folder that does not exist is made: what took hours to compute is not lost for want of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _checked_key(key: object) -> str:
    if not isinstance(key, str):
        raise PrecisionError(f"{key!r} is no layer name or pattern; the keys of a policy are strings")
    return key


def _parse_entry(owner: str, value: PrecisionLike) -> Precision:
    try:
        return Precision.parse(value)
    except PrecisionError as error:
        raise PrecisionError(f"policy entry for {owner}: {error}") from error


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"field {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return fields


def _unmatched_message(patterns: list[str], layers: Sequence[LayerKey]) -> str:
    kinds = {f"op:{layer.op}" for layer in layers}
    kinds |= {f"class:{name}" for layer in layers for name in layer.module_classes}
    lines = []
    for pattern in patterns:
        kind, colon, _ = pattern.partition(":")
        # A name may be that of a class, or of an operator, without its prefix.
        known = (
            {each for each in kinds if each.startswith(f"{kind}:")} if colon else kinds | {each.name for each in layers}
        )
        nearest = get_close_matches(pattern, sorted(known), cutoff=0.0)
        lines.append(f"  {pattern!r}: the nearest are {', '.join(nearest) or 'none'}")
    return "\n".join(["these keys of the policy match no layer; correct or remove them:", *lines])


BudgetKind: TypeAlias = Literal["bitops", "ratio", "average_bits", "weight_bytes"]

_BITOPS_EXPONENTS = {"P": 15, "T": 12, "G": 9, "M": 6, "K": 3, "k": 3, "": 0}
_BYTES_EXPONENTS = {"GB": 9, "MB": 6, "kB": 3, "KB": 3, "B": 0}
_BINARY_BYTES = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
_NUMBER = r"([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]{1,3})?)"
_BUDGET_FORMS = "'34.7G' or '2e10' (BitOps), '0.5xW8A8', 'avg4' (bits), '11MB' or '10.5MiB' (weight bytes)"


@dataclass(frozen=True)
class Budget:
    """An upper limit on a model's cost, made by `bitops`, `ratio`, `average_bits`, `weight_bytes` or `parse`.

    `str(budget)` is a text form that `parse` reads back as an equal budget.
    Raises PrecisionError for a value that is not a positive finite number.
    """

    kind: BudgetKind
    value: float
    of: Precision | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("bitops", "ratio", "average_bits", "weight_bytes"):
            raise PrecisionError(f"{self.kind!r} is no kind of budget; the forms are {_BUDGET_FORMS}")
        number = isinstance(self.value, Real) and not isinstance(self.value, bool)
        if not (number and 0 < self.value <= sys.float_info.max):
            raise PrecisionError(f"a budget is a positive finite number, not {self.value!r}: {_BUDGET_FORMS}")
        if (self.kind == "ratio") != isinstance(self.of, Precision):
            raise PrecisionError(f"a ratio, and only a ratio, is of a precision, as in {_BUDGET_FORMS}")
        object.__setattr__(self, "value", float(self.value))

    @classmethod
    def bitops(cls, limit: float) -> Self:
        """At most so many BitOps (MACs x weight bits x activation bits) in total."""
        return cls("bitops", limit)

    @classmethod
    def ratio(cls, fraction: float, of: PrecisionLike = "W8A8") -> Self:
        """At most this fraction of the total BitOps that the model has with every layer at precision `of`."""
        return cls("ratio", fraction, Precision.parse(of))

    @classmethod
    def average_bits(cls, bits: float) -> Self:
        """At most so many bits on average, over weight elements and, separately, over activation elements."""
        return cls("average_bits", bits)

    @classmethod
    def weight_bytes(cls, limit: float) -> Self:
        """At most so many bytes of weights in total."""
        return cls("weight_bytes", limit)

    @classmethod
    def parse(cls, text: "Budget | str") -> "Budget":
        """Read "34.7G" or "2e10" (BitOps), "0.5xW8A8", "avg4", "11MB"; a Budget is returned as it is.

        Suffixes are K, M, G, T, P for BitOps; for bytes B, kB, MB, GB (decimal) and KiB, MiB, GiB (binary).
        Raises PrecisionError, listing these forms, for anything else.
        """
        if isinstance(text, Budget):
            return text
        if not isinstance(text, str):
            raise PrecisionError(f"{text!r} is no budget; write one as {_BUDGET_FORMS}")
        if match := re.fullmatch(_NUMBER + "x(W[0-9]+A[0-9]+)", text):
            return cls.ratio(float(match[1]), of=match[2])
        if match := re.fullmatch("avg" + _NUMBER, text):
            return cls.average_bits(float(match[1]))
        if (match := re.fullmatch(_NUMBER + " ?([A-Za-z]*)", text)) is None:
            raise PrecisionError(f"{text!r} is no budget; write one as {_BUDGET_FORMS}")
        number, unit = Decimal(match[1]), match[2]
        if unit in _BITOPS_EXPONENTS:
            return cls.bitops(float(number.scaleb(_BITOPS_EXPONENTS[unit])))
        if unit in _BYTES_EXPONENTS:
            return cls.weight_bytes(float(number.scaleb(_BYTES_EXPONENTS[unit])))
        if unit in _BINARY_BYTES:
            return cls.weight_bytes(float(number * _BINARY_BYTES[unit]))
        raise PrecisionError(f"{text!r} has the unknown unit {unit!r}; write a budget as {_BUDGET_FORMS}")

    def __str__(self) -> str:
        if self.kind == "ratio":
            return f"{_shortest(self.value)}x{self.of}"
        if self.kind == "average_bits":
            return f"avg{_shortest(self.value)}"
        exponents = _BITOPS_EXPONENTS if self.kind == "bitops" else _BYTES_EXPONENTS
        unit, exponent = next(
            (item for item in exponents.items() if self.value >= 10.0 ** item[1]), list(exponents.items())[-1]
        )
        return f"{_shortest(self.value, exponent)}{unit}"


def _shortest(value: float, exponent: int = 0) -> str:
    """The fewest digits that read back as value, in units of 10**exponent."""
    return f"{Decimal(repr(value)).scaleb(-exponent).normalize():f}"
