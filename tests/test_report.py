"""The report: rows against the graph, totals against rows, and every format against its golden file."""

import csv
import io
import json
from collections.abc import Callable
from html.parser import HTMLParser

import pytest
import torch
import torchvision
from torch import nn

from saq_fx.errors import PassError
from saq_fx.precision import Policy
from saq_fx.prepare import apply_policy, prepare_saq
from saq_fx.report import LayerRow, PrecisionReport, _readable, precision_report
from tests.zoo import ZOO

Golden = Callable[[str, str], None]


def report_of(name: str, precision: str | Policy | None = "W4A4") -> PrecisionReport:
    """The report of a model of the zoo."""
    return precision_report(prepare_saq(ZOO[name].make(), example_inputs=ZOO[name].inputs(), precision=precision))


@pytest.fixture(scope="module")
def resnet18() -> PrecisionReport:
    model = torchvision.models.resnet18(weights=None)
    return precision_report(prepare_saq(model, example_inputs=torch.zeros(1, 3, 224, 224)))


def test_resnet18_has_the_authors_bitops(resnet18: PrecisionReport) -> None:
    assert resnet18.total_macs == 1_814_073_344
    assert resnet18.total_bitops == 34_714_419_200
    assert "34.7 G" in str(resnet18)
    assert [(row.name, row.pinned) for row in resnet18.rows if row.pinned] == [("conv1", "first"), ("fc", "last")]


@pytest.mark.parametrize("precision", ["W4A4", None])
@pytest.mark.parametrize("name", ["residual", "attention", "products", "tied", "recurrent"])
def test_totals_are_those_of_the_rows(name: str, precision: str | None) -> None:
    report = report_of(name, precision)
    rows = report.rows
    assert len(rows) > 0
    assert all(row.bitops == row.macs * row.weight_bits * row.activation_bits for row in rows)
    assert report.total_macs == sum(row.macs for row in rows)
    assert report.total_bitops == sum(row.bitops for row in rows)
    assert report.total_weight_bytes == sum(row.weight_bytes for row in rows)
    assert report.total_activation_bytes == sum(row.activation_bytes for row in rows)
    assert report.peak_activation_bytes == max(row.activation_bytes for row in rows)
    elements = sum(row.activation_bytes * 8 / row.activation_bits for row in rows)
    assert report.average_activation_bits == pytest.approx(report.total_activation_bytes * 8 / elements, rel=1e-12)


def test_a_float_graph_is_reported_with_32_bits() -> None:
    report = report_of("residual", None)
    assert {(row.weight_bits, row.activation_bits, row.pinned) for row in report.rows} == {(32, 32, None)}
    assert report.total_bitops == 1024 * report.total_macs
    assert report.total_weight_bytes == 4 * (8 * 3 * 9 + 8 * 8 * 9 + 5 * 8)
    assert (report.average_weight_bits, report.average_activation_bits) == (32, 32)
    assert report.quantized_share == 0


def test_a_layer_with_one_float_operand_is_not_in_the_quantized_share() -> None:
    report = report_of("residual", Policy({"block": (4, 32)}, default="W4A4"))
    macs = {row.name: row.macs for row in report.rows}
    assert report.rows[1].bitops == macs["block"] * 4 * 32
    assert report.quantized_share == 1 - macs["block"] / report.total_macs


def test_a_product_has_no_weight() -> None:
    row = next(row for row in report_of("attention").rows if row.name == "cross_attention.matmul")
    assert row == LayerRow(
        name="cross_attention.matmul",
        op="matmul",
        weight_shape=None,
        output_shape=(1, 2, 5, 5),
        macs=2 * 5 * 5 * 8,
        weight_bits=4,
        activation_bits=4,
        bitops=400 * 16,
        weight_bytes=0,
        activation_bytes=(2 * 5 * 8 + 2 * 8 * 5) / 2,
        pinned=None,
    )


def test_a_layer_that_shares_a_pinned_weight_is_pinned_with_it() -> None:
    assert [(row.name, row.pinned) for row in report_of("tied").rows] == [
        ("inner", "first"),
        ("inner@1", "shared"),
        ("head", "last"),
    ]


def test_the_report_follows_the_policy() -> None:
    gm = prepare_saq(ZOO["residual"].make(), example_inputs=ZOO["residual"].inputs())
    before = precision_report(gm)
    apply_policy(gm, Policy({"block*": (2, 3)}))
    after = precision_report(gm)
    assert [(row.weight_bits, row.activation_bits) for row in after.rows] == [(8, 8), (2, 3), (2, 3), (8, 8)]
    assert before.total_bitops - after.total_bitops == 2 * before.rows[1].macs * (16 - 6)


def test_what_is_not_counted_is_listed_with_its_reason() -> None:
    reason = "GRU is not in the operator table; it stays in float"
    report = report_of("recurrent")
    assert report.uncounted == (("cell", reason),)
    assert f"cell ({reason})" in str(report)
    assert f"cell ({reason})" in report.to_html()
    assert json.loads(report.to_json())["uncounted"] == [{"name": "cell", "reason": reason}]
    assert "is not counted: none." in str(report_of("residual"))


def test_a_network_without_layers_has_an_empty_report() -> None:
    report = precision_report(prepare_saq(nn.ReLU(), example_inputs=torch.ones(1, 2)))
    assert (report.rows, report.total_bitops, report.peak_activation_bytes, report.quantized_share) == ((), 0, 0, 0)
    assert "total" in str(report)


def test_an_unprepared_model_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(PassError, match="call prepare_saq first"):
        precision_report(nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(PassError, match="prepare with example_inputs"):
        precision_report(prepare_saq(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (0.5, "0.5"), (512, "512"), (999.4, "999"), (999.6, "1 k"), (34_714_419_200, "34.7 G"),
        (1_814_073_344, "1.81 G"), (999_499_999, "999 M"), (999_500_000, "1 G"), (2.5e13, "25 T"), (7e17, "700 P"),
    ],
)  # fmt: skip
def test_numbers_are_readable(number: float, text: str) -> None:
    assert _readable(number) == text


def test_csv_and_json_hold_the_plain_numbers() -> None:
    report = report_of("attention")
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    document = json.loads(report.to_json())
    assert len(lines) == len(document["rows"]) == len(report.rows)
    for row, line, data in zip(report.rows, lines, document["rows"], strict=True):
        assert (line["name"], int(line["bitops"]), float(line["weight_bytes"])) == (
            row.name,
            row.bitops,
            row.weight_bytes,
        )
        assert line["output_shape"] == "x".join(map(str, row.output_shape))
        assert {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()} == vars(row)
    totals = document["totals"]
    assert totals["total_bitops"] == report.total_bitops
    assert totals["average_weight_bits"] == report.average_weight_bits


class TagBalance(HTMLParser):
    """The tags that are open where a page ends, and every address it refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.references += [value for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_html_is_a_whole_page_that_needs_no_other() -> None:
    model = nn.Sequential()
    model.add_module("<b>", nn.Linear(2, 2))
    page = precision_report(prepare_saq(model, example_inputs=torch.ones(1, 2))).to_html()
    parser = TagBalance()
    parser.feed(page)
    assert (parser.open, parser.references) == ([], [])
    assert "&lt;b&gt;" in page


@pytest.mark.parametrize("style", ["txt", "md", "csv", "json", "html"])
def test_every_format_is_as_it_was(style: str, golden: Golden) -> None:
    report = report_of("attention")
    texts = {
        "txt": report.__str__,
        "md": report.to_markdown,
        "csv": report.to_csv,
        "json": report.to_json,
        "html": report.to_html,
    }
    golden(f"report_attention.{style}", texts[style]())


def test_the_report_of_resnet18_is_as_it_was(resnet18: PrecisionReport, golden: Golden) -> None:
    golden("report_resnet18.txt", str(resnet18))
