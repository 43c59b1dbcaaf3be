"""Pictures of a report and of a search; they need the extra `plot`."""

import io
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saq_fx.errors import MissingExtraError, SaqError
from saq_fx.passes.search_asga import SearchStep
from saq_fx.precision import write_whole
from saq_fx.report import PrecisionReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH = 11.0  # inches
_ROW_HEIGHT, _MARGIN = 0.24, 1.2  # inches
_BAR = 0.4  # of a row
_SEARCH_HEIGHT = 7.0  # inches
_LEGEND_ENTRIES = 40
_DPI = 120


def plot_bits(report: PrecisionReport, path: str | os.PathLike[str]) -> None:
    """Draw each layer's weight and activation bits beside its share of the BitOps, in the order of execution.

    Every layer has a row of its own, so the picture grows with the network. It is a PNG, written whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SaqError: the report has no layers.
    """
    if not report.rows:
        raise SaqError("there is nothing to plot: the report has no layers")
    figure = _figure(_MARGIN + _ROW_HEIGHT * len(report.rows))
    bits, share = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_bits(bits, report)
    _draw_share(share, report)
    bits.set_ylim(len(report.rows) - 0.5, -0.5)
    _save(figure, path)


def plot_search(history: Sequence[SearchStep], path: str | os.PathLike[str]) -> None:
    """Draw what a search did, step by step: expected bits of every choice, losses, cost and price, h, rho and sigma.

    It is a PNG, written whole or not at all.

    Raises:
        MissingExtraError: matplotlib is not installed.
        SaqError: the history has no steps.
    """
    if not history:
        raise SaqError("there is nothing to plot: the search has no history")
    figure = _figure(_SEARCH_HEIGHT)
    (bits, losses), (cost, sharpness) = figure.subplots(2, 2, sharex=True)
    for name in history[0].bits:
        bits.plot([step.bits[name] for step in history], label=name, linewidth=1)
    bits.set_ylabel("expected bits")
    if len(history[0].bits) <= _LEGEND_ENTRIES:
        bits.legend(fontsize=5, ncols=2)
    series = (
        (losses, ("loss", "perturbed_loss"), "loss"),
        (cost, ("cost", "beta"), "expected cost (share of the budget), its price (loss)"),
        (sharpness, ("gap", "rho", "sigma"), "h, rho (parameters), sigma"),
    )
    for axes, names, label in series:
        for name in names:
            axes.plot([getattr(step, name) for step in history], label=name, linewidth=1)
        axes.set_ylabel(label, fontsize=8)
        axes.legend(fontsize=7)
    sharpness.set_yscale("symlog", linthresh=1e-3)
    for axes in (cost, sharpness):
        axes.set_xlabel("step")
    _save(figure, path)


def _figure(height: float) -> "Figure":
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("plots need matplotlib: pip install 'saq_fx[plot]'") from error
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: str | os.PathLike[str]) -> None:
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
