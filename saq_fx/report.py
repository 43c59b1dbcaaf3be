"""The precision report: one row per layer with its MACs, bits, BitOps and bytes, and the totals."""

import csv
import html
import io
import json
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

from tabulate import tabulate
from torch import fx

from saq_fx.annotation import LayerAnnotation, Shape, record_of
from saq_fx.cost import LayerCost, cost_table
from saq_fx.graph import layers
from saq_fx.precision import FLOAT_BITS

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_TEXT_WIDTH = 110
_HEADERS = (
    "layer",
    "op",
    "weight (shape)",
    "output (shape)",
    "MACs (1 MAC = 1 multiply + 1 add)",
    "weight (bits)",
    "activation (bits)",
    "BitOps (MACs x bits x bits)",
    "weight (bytes)",
    "activation (bytes)",
    "pinned",
)
_ALIGNMENT = ("left",) * 4 + ("right",) * 6 + ("left",)
_NOTES = (
    "Counted for a batch of one sample, or for the whole example where the model does not take one sample alone. A "
    "float operand has 32 bits. The weight bits of a product of two activations are those of its second operand. "
    "Weight bytes include the levels of the weight's quantizer.",
    "BitOps compare arithmetic at different bit-widths. They are not latency: that depends on the hardware.",
)


@dataclass(frozen=True)
class LayerRow:
    """One layer, for one sample.

    `weight_shape` is None for a product of two activations, whose `weight_bits` are those of its second operand.
    `pinned` says why the bits are fixed: the layer is "first", "last" or the "only" one, or its weight is "shared" with
    such a layer. None where they are not.
    """

    name: str
    op: str
    weight_shape: Shape | None
    output_shape: Shape
    macs: int
    weight_bits: int
    activation_bits: int
    bitops: int
    weight_bytes: float
    activation_bytes: float
    pinned: str | None


@dataclass(frozen=True)
class PrecisionReport:
    """What a prepared network costs, for one sample; `str()` is a table.

    `uncounted` are operations with arithmetic that the totals leave out, as (name, reason), and `uncounted_macs` their
    MACs as far as they are known. `tracing` is the way taken from model to graph. Averages are over all elements of the
    layers' weights and of their input activations.
    """

    rows: tuple[LayerRow, ...]
    average_weight_bits: float
    average_activation_bits: float
    uncounted: tuple[tuple[str, str], ...]
    tracing: str
    uncounted_macs: int = 0

    @property
    def total_macs(self) -> int:
        """MACs of all layers; one MAC is one multiply and one add."""
        return sum(row.macs for row in self.rows)

    @property
    def total_bitops(self) -> int:
        """BitOps of all layers."""
        return sum(row.bitops for row in self.rows)

    @property
    def total_weight_bytes(self) -> float:
        """Bytes of all layers' weights, each counted once, and of their quantizers' levels."""
        return sum(row.weight_bytes for row in self.rows)

    @property
    def total_activation_bytes(self) -> float:
        """Bytes of all layers' input activations."""
        return sum(row.activation_bytes for row in self.rows)

    @property
    def peak_activation_bytes(self) -> float:
        """Bytes of the input activations of the layer that has the most."""
        return max((row.activation_bytes for row in self.rows), default=0.0)

    @property
    def quantized_share(self) -> float:
        """Share of the MACs, from 0 to 1, with both operands below 32 bits; `uncounted_macs` have none."""
        quantized = (row.macs for row in self.rows if max(row.weight_bits, row.activation_bits) < FLOAT_BITS)
        return sum(quantized) / (self.total_macs + self.uncounted_macs or 1)

    def __str__(self) -> str:
        # Only the text form can break headers and notes into lines.
        table = self._table("simple", lambda header: header.replace(" (", "\n("))
        return "\n\n".join([table, *(textwrap.fill(note, _TEXT_WIDTH) for note in self._notes())])

    def to_markdown(self) -> str:
        """The table and its notes as Markdown."""
        return "\n\n".join([self._table("pipe"), *self._notes()])

    def to_csv(self) -> str:
        """The rows in plain numbers, without totals; shapes as 64x3x7x7."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(LayerRow))
        for row in self.rows:
            values = {
                **vars(row),
                "weight_shape": _shape(row.weight_shape),
                "output_shape": _shape(row.output_shape),
            }
            writer.writerow(values.values())
        return file.getvalue()

    def to_json(self) -> str:
        """Rows, totals and notes as JSON, in plain numbers."""
        document = {
            "format": "saq_fx.report",
            "version": 1,
            "rows": [asdict(row) for row in self.rows],
            "totals": self._totals(),
            "uncounted": [{"name": name, "reason": reason} for name, reason in self.uncounted],
            "tracing": self.tracing,
        }
        return json.dumps(document, indent=2) + "\n"

    def to_html(self) -> str:
        """The table and its notes as a page that needs no other file."""
        notes = "\n".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return _PAGE.format(table=self._table("html"), notes=notes)

    def _table(self, style: str, header: Callable[[str], str] = str) -> str:
        total = (
            "total", "", "", "", _readable(self.total_macs), f"avg {self.average_weight_bits:.2f}",
            f"avg {self.average_activation_bits:.2f}", _readable(self.total_bitops),
            _readable(self.total_weight_bytes), _readable(self.total_activation_bytes), "",
        )  # fmt: skip
        return tabulate(
            [*map(_cells, self.rows), total],
            [header(each) for each in _HEADERS],
            tablefmt=style,
            colalign=_ALIGNMENT,
            disable_numparse=True,
        )

    def _notes(self) -> list[str]:
        facts = (
            f"{self.quantized_share:.1%} of the MACs have both operands quantized. "
            f"Peak of the activations: {_readable(self.peak_activation_bytes)} bytes. Tracing: {self.tracing}."
        )
        uncounted = "; ".join(f"{name} ({reason})" for name, reason in self.uncounted) or "none"
        if self.uncounted_macs:
            uncounted += f"; together they have {_readable(self.uncounted_macs)} MACs, as far as that is known"
        return [facts, *_NOTES, f"Operations with arithmetic that is not counted: {uncounted}."]

    def _totals(self) -> dict[str, float]:
        names = (
            "total_macs", "total_bitops", "total_weight_bytes", "total_activation_bytes", "peak_activation_bytes",
            "average_weight_bits", "average_activation_bits", "quantized_share", "uncounted_macs",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def precision_report(gm: fx.GraphModule) -> PrecisionReport:
    """Reports MACs, bits, BitOps and bytes of every layer of a prepared model, quantized or float.

    Raises PassError, saying what to do, for a model that was not prepared, or was without example inputs.
    """
    costs = cost_table(gm)
    record = record_of(gm)
    annotations = (layer for _, layer in layers(gm))
    return PrecisionReport(
        rows=tuple(_row(cost, layer) for cost, layer in zip(costs, annotations, strict=True)),
        average_weight_bits=costs.average_weight_bits(costs.assigned),
        average_activation_bits=costs.average_activation_bits(costs.assigned),
        uncounted=record.uncounted,
        tracing=record.tracing,
        uncounted_macs=record.uncounted_macs,
    )


def _row(cost: LayerCost, layer: LayerAnnotation) -> LayerRow:
    bits = cost.assigned
    return LayerRow(
        name=layer.name,
        op=layer.op,
        weight_shape=None if layer.is_product else layer.weight_shape,
        output_shape=layer.output_shape or (),
        macs=cost.macs,
        weight_bits=bits.weight,
        activation_bits=bits.activation,
        bitops=cost.bitops(bits),
        weight_bytes=cost.weight_bytes(bits),
        activation_bytes=cost.activation_bytes(bits),
        pinned=(layer.position or "shared") if layer.pinned else None,
    )


def _cells(row: LayerRow) -> tuple[Any, ...]:
    return (
        row.name, row.op, _shape(row.weight_shape), _shape(row.output_shape), _readable(row.macs), row.weight_bits,
        row.activation_bits, _readable(row.bitops), _readable(row.weight_bytes), _readable(row.activation_bytes),
        row.pinned or "",
    )  # fmt: skip


def _shape(shape: Shape | None) -> str:
    return "" if shape is None else "x".join(map(str, shape))


def _readable(number: float) -> str:
    """Three digits with a decimal unit: 34714419200 is 34.7 G."""
    size, unit = next((each for each in _UNITS if number >= 0.9995 * each[0]), (1.0, ""))
    return f"{number / size:.3g} {unit}".rstrip()


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>Precision report</title>
<style>
body {{ font-family: sans-serif; margin: 2em; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ border-bottom: 1px solid #ddd; padding: 0.2em 0.7em; }}
th {{ position: sticky; top: 0; background: white; }}
tr:last-child {{ font-weight: bold; }}
</style>
</head>
<body>
<h1>Precision report</h1>
{table}
{notes}
</body>
</html>
"""
