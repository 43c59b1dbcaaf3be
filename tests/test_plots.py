"""The pictures of reports and searches: what is drawn, that it is whole, and what happens without matplotlib."""

import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from saq_fx import plots
from saq_fx.errors import MissingExtraError, SaqError
from saq_fx.passes.search_asga import SearchStep
from saq_fx.plots import plot_bits, plot_search
from saq_fx.report import LayerRow, PrecisionReport


def report(layers: int) -> PrecisionReport:
    """A report of so many layers with bits from 2 to 8."""
    rows = tuple(
        LayerRow(
            name=f"stage{index // 10}.block{index % 10}.attention.projection",
            op="linear",
            weight_shape=(8, 8),
            output_shape=(1, 8),
            macs=64,
            weight_bits=2 + index % 7,
            activation_bits=8 - index % 7,
            bitops=64 * (2 + index % 7) * (8 - index % 7),
            weight_bytes=64.0,
            activation_bytes=8.0,
            pinned=None,
        )
        for index in range(layers)
    )
    return PrecisionReport(rows, 4.0, 4.0, (), "symbolic")


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    saved: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        saved.append(figure)
        save(figure, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def test_bars_are_the_bits_and_the_shares(tmp_path: Path, figures: list[Figure]) -> None:
    drawn = report(12)
    plot_bits(drawn, tmp_path / "bits.png")
    bits, share = figures[0].axes
    weight, activation = ([bar.get_width() for bar in bars] for bars in bits.containers)
    assert weight == [row.weight_bits for row in drawn.rows]
    assert activation == [row.activation_bits for row in drawn.rows]
    shares = [bar.get_width() for bar in share.containers[0]]
    assert shares == pytest.approx([100 * row.bitops / drawn.total_bitops for row in drawn.rows])
    assert sum(shares) == pytest.approx(100)
    top_down = sorted(bits.get_yticks(), key=lambda y: -bits.transData.transform((0, y))[1])
    names = [label.get_text() for label in bits.get_yticklabels()]
    assert [names[int(position)] for position in top_down] == [row.name for row in drawn.rows]


@pytest.mark.parametrize("layers", [1, 60, 200])
def test_every_name_is_legible(layers: int, tmp_path: Path, figures: list[Figure]) -> None:
    plot_bits(report(layers), tmp_path / "bits.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "bits.png").shape
    labels = [label.get_window_extent() for label in figures[0].axes[0].get_yticklabels()]
    assert len(labels) == layers
    assert all(0 <= box.x0 < box.x1 < width and 0 <= box.y0 < box.y1 <= height for box in labels)
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(labels))


def test_the_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bits.png"
    path.write_bytes(b"as it was")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail)
        with pytest.raises(OSError, match="no space left"):
            plot_bits(report(3), path)
    assert [each.name for each in tmp_path.iterdir()] == ["bits.png"]
    assert path.read_bytes() == b"as it was"
    plot_bits(report(3), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"saq_fx\[plot\]"):
        plots.plot_bits(report(1), tmp_path / "bits.png")
    assert not list(tmp_path.iterdir())


def test_a_report_without_layers_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SaqError, match="no layers"):
        plot_bits(report(0), tmp_path / "bits.png")


def test_a_search_is_drawn_step_by_step(tmp_path: Path, figures: list[Figure]) -> None:
    steps = [
        SearchStep(
            2.0 - t, 2.5 - t, 0.5, 0.1, None, 0.9, 1.0, 0.2, 1.0, {"conv weight": (0.0, t)}, {"conv weight": 3 + t}
        )
        for t in (0.0, 0.5, 1.0)
    ]
    plot_search(steps, tmp_path / "search.png")
    assert (tmp_path / "search.png").read_bytes().startswith(b"\x89PNG")
    bits, losses, cost, sharpness = figures[0].axes
    lines = {
        line.get_label(): list(line.get_ydata()) for axes in (bits, losses, cost, sharpness) for line in axes.lines
    }
    assert lines["conv weight"] == [3.0, 3.5, 4.0]
    assert lines["perturbed_loss"] == [2.5, 2.0, 1.5]
    assert lines["rho"] == [0.1] * 3
    with pytest.raises(SaqError, match="no history"):
        plot_search([], tmp_path / "search.png")
