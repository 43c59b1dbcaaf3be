"""Precisions, policies and budgets: what they accept, what they refuse and why, and text forms both ways."""

import copy
import json
import math
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saq_fx.errors import CheckpointError, PatternError, PrecisionError
from saq_fx.precision import FLOAT_BITS, Budget, LayerKey, Policy, Precision, PrecisionLike

BITS = st.sampled_from([*range(2, 9), FLOAT_BITS])
PRECISIONS = st.builds(Precision, BITS, BITS)
POLICIES = st.builds(Policy, st.dictionaries(st.text(), PRECISIONS, max_size=5), default=st.none() | PRECISIONS)
POSITIVE = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
BUDGETS = st.one_of(
    st.builds(Budget.bitops, POSITIVE),
    st.builds(Budget.ratio, POSITIVE, PRECISIONS),
    st.builds(Budget.average_bits, POSITIVE),
    st.builds(Budget.weight_bytes, POSITIVE),
)
LAYERS = [
    LayerKey("conv1", "conv2d", ("Conv2d",), pinned=Precision(8, 8)),
    LayerKey("layer1.0.conv1", "conv2d", ("BasicBlock", "Conv2d")),
    LayerKey("layer1.0.conv2", "conv2d", ("BasicBlock", "Conv2d")),
    LayerKey("layer1.0.attention[0]", "matmul", ("Attention",)),
    LayerKey("fc", "linear", ("Linear",), pinned=Precision(8, 8)),
]


def resolved(policy: Policy) -> dict[str, str]:
    return {name: str(precision) for name, precision in policy.resolve(LAYERS).items()}


@given(PRECISIONS)
def test_precision_round_trip(precision: Precision) -> None:
    assert Precision.parse(str(precision)) == precision
    assert Precision.parse((precision.weight, precision.activation)) is not precision
    assert Precision.parse(precision) is precision


def test_precisions_are_ordered_and_hashable() -> None:
    assert sorted({Precision(4, 4), Precision(2, 8), Precision(2, 2), Precision(2, 2)}) == [
        Precision(2, 2),
        Precision(2, 8),
        Precision(4, 4),
    ]


@pytest.mark.parametrize("bits", [1, 0, -4, 9, 16, 31, 33, 4.0, True, None, "4"])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(PrecisionError, match=r"weight bits are .*from 2 to 8, or 32 for float"):
        Precision(bits, 4)
    with pytest.raises(PrecisionError, match="activation bits are"):
        Precision(4, bits)


@pytest.mark.parametrize("text", ["", "W4", "A4W4", "w4a4", " W4A4", "W4A4\n", "W4.0A4", "W٤A4", 4, None, (4,)])
def test_other_forms_of_precision_are_refused(text: PrecisionLike) -> None:
    with pytest.raises(PrecisionError, match="like 'W4A4'"):
        Precision.parse(text)


def test_exact_name_beats_pin_beats_pattern_beats_default() -> None:
    policy = Policy({"fc": "W6A6", "op:*": "W3A3", "layer1.*": "W2A2", "class:BasicBlock": "W5A5"}, "W4A4")
    assert resolved(policy) == {
        "conv1": "W8A8",
        "layer1.0.conv1": "W5A5",
        "layer1.0.conv2": "W5A5",
        "layer1.0.attention[0]": "W2A2",
        "fc": "W6A6",
    }
    assert resolved(Policy.uniform("W4A4")) == {layer.name: "W8A8" if layer.pinned else "W4A4" for layer in LAYERS}


def test_the_last_matching_pattern_wins() -> None:
    one, other = ("layer1.*", "W2A2"), ("op:conv2d", "W3A3")
    assert Policy(dict([one, other])).resolve(LAYERS)["layer1.0.conv1"] == Precision(3, 3)
    assert Policy(dict([other, one])).resolve(LAYERS)["layer1.0.conv1"] == Precision(2, 2)
    assert Policy(dict([other, one])) != Policy(dict([one, other]))


def test_an_exact_name_wins_wherever_it_stands_and_whatever_it_holds() -> None:
    policy = Policy({"layer1.0.attention[0]": "W6A6", "layer1.*": "W2A2"})
    assert policy.resolve(LAYERS)["layer1.0.attention[0]"] == Precision(6, 6)


def test_nothing_applies() -> None:
    assert Policy().resolve(LAYERS) == {layer.name: layer.pinned for layer in LAYERS}


def test_all_unmatched_keys_are_named_with_the_nearest_layers() -> None:
    policy = Policy({"layer1.0.conv3": "W4A4", "op:conv": "W4A4", "class:Basicblock": "W4A4", "fc": "W4A4"})
    with pytest.raises(PatternError) as caught:
        policy.resolve(LAYERS)
    _, name, op, module_class = str(caught.value).splitlines()
    assert name.startswith("  'layer1.0.conv3': the nearest are layer1.0.conv")
    assert op.startswith("  'op:conv': the nearest are op:conv2d")
    assert module_class.startswith("  'class:Basicblock': the nearest are class:BasicBlock")
    with pytest.raises(PatternError, match=r"'BasicBlock': the nearest are class:BasicBlock, .*\n.* are op:linear"):
        Policy({"BasicBlock": "W4A4", "linear": "W4A4"}).resolve(LAYERS)


def test_a_pattern_is_case_sensitive() -> None:
    with pytest.raises(PatternError, match=r"'Layer1\.\*'"):
        Policy({"Layer1.*": "W4A4"}).resolve(LAYERS)


def test_policy_is_an_immutable_mapping() -> None:
    policy = Policy({"conv1": "W8A8", "fc": (6, 4)}, default="W4A4")
    assert dict(policy) == {"conv1": Precision(8, 8), "fc": Precision(6, 4)}
    assert (policy["fc"], len(policy), policy.default) == (Precision(6, 4), 2, Precision(4, 4))
    assert repr(policy) == "Policy(2 entries, default=W4A4)"
    with pytest.raises(TypeError):
        policy["fc"] = Precision(2, 2)  # type: ignore[index]
    with pytest.raises(AttributeError):
        policy.default = None  # type: ignore[misc]


@given(POLICIES)
def test_policy_copies_are_equal(policy: Policy) -> None:
    for again in (
        copy.deepcopy(policy),
        pickle.loads(pickle.dumps(policy)),
        Policy.from_json(policy.to_json()),
    ):
        assert again == policy
        assert hash(again) == hash(policy)
        assert list(again) == list(policy)


def test_policy_entries_are_checked_at_birth() -> None:
    with pytest.raises(PrecisionError, match="maps layers to precisions"):
        Policy([("fc", "W4A4")])  # type: ignore[arg-type]
    with pytest.raises(PrecisionError, match="'conv1': weight bits are 9"):
        Policy({"conv1": "W9A4"})
    with pytest.raises(PrecisionError, match="the default: 'four'"):
        Policy(default="four")
    with pytest.raises(PrecisionError, match="3 is no layer name"):
        Policy({3: "W4A4"})  # type: ignore[dict-item]


def test_saved_policy_is_read_by_people(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy = Policy({"conv1": "W8A8", "layer1.*": "W2A4"}, default="W4A4")
    policy.save(path)
    assert path.read_text() == (
        '{\n  "format": "saq_fx.policy",\n  "version": 1,\n  "default": "W4A4",\n'
        '  "layers": {\n    "conv1": "W8A8",\n    "layer1.*": "W2A4"\n  }\n}\n'
    )
    assert Policy.load(path) == policy


def test_save_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "policy.json"
    Policy.uniform("W4A4").save(path)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Policy.uniform("W2A2").save(path)
    assert Policy.load(path) == Policy.uniform("W4A4")
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_made(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "first" / "policy.json"
    Policy.uniform("W4A4").save(path)
    assert Policy.load(path) == Policy.uniform("W4A4")


def test_saved_file_has_the_usual_permissions(tmp_path: Path) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    Policy().save(tmp_path / "policy.json")
    assert stat.S_IMODE((tmp_path / "policy.json").stat().st_mode) == stat.S_IMODE(usual.stat().st_mode)


DOCUMENT = json.loads(Policy({"fc": "W4A4"}).to_json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00\xd8", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "field 'format'"),
        (b'{"fc": "W4A4"}', "field 'format'"),
        (b'{"format": "saq_fx.policy", "format": "saq_fx.policy"}', "field 'format' occurs twice"),
        (DOCUMENT | {"version": 2}, "field 'version' is 2"),
        (DOCUMENT | {"bits": 4}, r"fields \['bits'\] are unknown"),
        (DOCUMENT | {"layers": ["fc"]}, "field 'layers'"),
        (DOCUMENT | {"layers": {"fc": 4}}, "entry for 'fc': 4 is no precision"),
        (DOCUMENT | {"layers": {"fc": "W1A4"}}, "entry for 'fc': weight bits are 1"),
        (DOCUMENT | {"default": [4, 4]}, r"the default: \[4, 4\] is no precision"),
        ({"format": "saq_fx.policy", "version": 1}, "field 'layers'"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, content: bytes | dict[str, object], message: str) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises((CheckpointError, PrecisionError), match=f"policy.json: .*{message}"):
        Policy.load(path)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("34.7G", Budget.bitops(34.7e9)),
        ("34.7 G", Budget.bitops(34.7e9)),
        ("2e10", Budget.bitops(2e10)),
        ("20000000000", Budget.bitops(2e10)),
        ("5k", Budget.bitops(5e3)),
        ("1.5T", Budget.bitops(1.5e12)),
        ("0.5xW8A8", Budget.ratio(0.5, of="W8A8")),
        ("2xW4A2", Budget.ratio(2, of=(4, 2))),
        ("avg4", Budget.average_bits(4)),
        ("avg3.5", Budget.average_bits(3.5)),
        ("11MB", Budget.weight_bytes(11e6)),
        ("10.5MiB", Budget.weight_bytes(10.5 * 2**20)),
        ("3 kB", Budget.weight_bytes(3000)),
        ("512B", Budget.weight_bytes(512)),
        ("1GiB", Budget.weight_bytes(2**30)),
    ],
)
def test_budget_forms(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget
    assert Budget.parse(budget) is budget


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget.bitops(34.7e9), "34.7G"),
        (Budget.bitops(999), "999"),
        (Budget.ratio(np.float64(0.5)), "0.5xW8A8"),
        (Budget.average_bits(4), "avg4"),
        (Budget.weight_bytes(11 * 2**20), "11.534336MB"),
        (Budget.weight_bytes(0.5), "0.5B"),
    ],
)
def test_budget_text(budget: Budget, text: str) -> None:
    assert str(budget) == text


@given(BUDGETS)
def test_budget_round_trip(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget
    assert hash(Budget.parse(str(budget))) == hash(budget)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "34.7X",
        "-5G",
        "0",
        "0MB",
        "1e999",
        "nan",
        "inf",
        "0xW8A8",
        "0.5xW9A8",
        "0.5x",
        "avg",
        "avg0",
        "4\n",
        "1,5G",
        5,
    ],
)
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(PrecisionError):
        Budget.parse(text)


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 10**309, True, "5", None])
def test_values_that_are_no_budget(value: float) -> None:
    for kind in (Budget.bitops, Budget.ratio, Budget.average_bits, Budget.weight_bytes):
        with pytest.raises(PrecisionError, match=r"positive finite number.*'34\.7G'.*'0\.5xW8A8'.*'avg4'.*'11MB'"):
            kind(value)


def test_budget_kind_is_checked() -> None:
    with pytest.raises(PrecisionError, match="'flops' is no kind of budget"):
        Budget("flops", 1.0)  # type: ignore[arg-type]
    with pytest.raises(PrecisionError, match="only a ratio, is of a precision"):
        Budget("bitops", 1.0, Precision(8, 8))
    with pytest.raises(PrecisionError, match="only a ratio, is of a precision"):
        Budget("ratio", 1.0)
