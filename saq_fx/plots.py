"""Pictures of a report; they need the extra `plot`."""

import io
import os
from typing import TYPE_CHECKING

from saq_fx.errors import MissingExtraError, SaqError
from saq_fx.precision import write_whole
from saq_fx.report import PrecisionReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH = 11.0  # inches
_ROW_HEIGHT, _MARGIN = 0.24, 1.2  # inches
_BAR = 0.4  # of a row
_DPI = 120


def plot_bits(report: PrecisionReport, path: str | os.PathLike[str]) -> None:
    """Draw each layer's weight and activation bits beside its share of the BitOps, in the order of execution.

    Every layer has a row of its own, so the picture grows with the network. It is a PNG, written whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SaqError: the report has no layers.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'saq_fx[plot]'") from error
    if not report.rows:
        raise SaqError("there is nothing to plot: the report has no layers")

    figure = Figure(figsize=(_WIDTH, _MARGIN + _ROW_HEIGHT * len(report.rows)), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    bits, share = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_bits(bits, report)
    _draw_share(share, report)
    bits.set_ylim(len(report.rows) - 0.5, -0.5)
    image = io.BytesIO()
    figure.savefig(image, format="png")
    write_whole(path, image.getvalue())


def _draw_bits(axes: "Axes", report: PrecisionReport) -> None:
    positions = range(len(report.rows))
    series = (
        ("weight (second operand of a product)", "tab:blue", -0.5, [row.weight_bits for row in report.rows]),
        ("activation", "tab:orange", 0.5, [row.activation_bits for row in report.rows]),
    )
    for label, color, side, bits in series:
        bars = axes.barh([row + side * _BAR for row in positions], bits, _BAR, color=color, label=label)
        axes.bar_label(bars, fontsize=6, padding=1)
    axes.set_yticks(positions, [row.name for row in report.rows], fontsize=7)
    axes.set_xlabel("bits")
    axes.margins(x=0.08)  # room for the labels
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)


def _draw_share(axes: "Axes", report: PrecisionReport) -> None:
    total = report.total_bitops or 1
    shares = [100 * row.bitops / total for row in report.rows]
    bars = axes.barh(range(len(shares)), shares, 2 * _BAR, color="tab:gray")
    axes.bar_label(bars, fmt="%.1f", fontsize=6, padding=1)
    axes.set_xlabel("share of the BitOps (%)")
    axes.margins(x=0.12)
    axes.tick_params(left=False, labelleft=False)
