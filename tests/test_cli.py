"""The command line, models by name, and the demo in its short form."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from saq_fx import Policy, Precision, SearchResult, apply_policy, cost_table, demo, load, precision_report, prepare_saq
from saq_fx.cli import main
from saq_fx.errors import SaqError
from saq_fx.models import build
from saq_fx.networks import SmallResNet
from saq_fx.train_command import settings_of
from saq_fx.training_recipe import TrainingRecipe


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["saq-fx", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


@pytest.fixture
def model_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text("from torch import nn\ndef small():\n    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))\n")
    return path


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_file: Path) -> None:
    assert run(monkeypatch, "report", f"{model_file}:small", "--shape", "1,4", "--format", "json") == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["macs"] for row in report["rows"]] == [12, 6]


def test_report_with_a_policy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_file: Path, tmp_path: Path
) -> None:
    Policy({"0": "W2A8", "1": "W3A5"}).save(tmp_path / "p.json")
    arguments = ["report", f"{model_file}:small", "--shape", "1,4", "--policy", str(tmp_path / "p.json")]
    assert run(monkeypatch, *arguments, "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split(",")[5:7] == ["2", "8"]
    assert lines[2].split(",")[5:7] == ["3", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet18"], "names no model"),
        (["nowhere:resnet18"], "unknown source 'nowhere'"),
        (["torchvision:resnet0"], "does not make a model 'resnet0'"),
        (["missing.py:f"], "no file missing.py"),
        (["torchvision:resnet18", "--shape", "big"], "--shape 'big'"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, "report", *arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("saq-fx: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_models_by_name(name: str) -> None:
    assert isinstance(build(name), nn.Module)


def test_factories_that_make_no_model(model_file: Path) -> None:
    with pytest.raises(SaqError, match="no function 'large'"):
        build(f"{model_file}:large")
    model_file.write_text("def small(): return 3\n")
    with pytest.raises(SaqError, match="returned int"):
        build(f"{model_file}:small")


@pytest.mark.slow
def test_demo_writes_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = demo.run_demo(tmp_path / "out", quick=True)
    names = {"policy.json", "model.safetensors", "report.txt", "report.html", "bits.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert [result.name.split(",")[0] for result in results] == ["float", "uniform W4A4", "uniform W2A2", "searched"]
    of_float, four, two, searched = (result.bitops for result in results)
    assert two < searched < four < of_float
    assert "BitOps" in capsys.readouterr().out


def test_train_and_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    networks = Path(__file__).parent.parent / "saq_fx" / "networks.py"
    folder = tmp_path / "run"
    float_model = build(f"{networks}:SmallResNet")
    torch.save(float_model.state_dict(), tmp_path / "float.pt")
    command = ["train", f"{networks}:SmallResNet", "--data", "digits", "--folder", str(folder), "--epochs", "1"]
    assert run(monkeypatch, *command, "--weights", str(tmp_path / "float.pt"), "--batch", "100", "--lr", "0.05") == 0
    printed = capsys.readouterr().out
    assert "test accuracy:" in printed
    gm = load(SmallResNet(), folder / "model.safetensors", example_inputs=torch.zeros(1, 1, 8, 8))
    assert (folder / "report.txt").read_text() == f"{precision_report(gm)}\n"
    assert run(monkeypatch, *command, "--weights", str(tmp_path / "float.pt"), "--batch", "100", "--lr", "0.05") == 0
    again = load(SmallResNet(), folder / "model.safetensors", example_inputs=torch.zeros(1, 1, 8, 8))
    assert all(torch.equal(a, b) for a, b in zip(gm.parameters(), again.parameters(), strict=True)), "it had ended"
    assert run(monkeypatch, *command, "--batch", "100", "--lr", "0.01") == 1
    assert "of a run with other recipe" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--batch", "100", "--lr", "0.05", "--precision", "W2A2") == 1
    assert "of a run with other bits" in capsys.readouterr().err


def test_search_solves_for_other_budgets_and_networks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    networks, folder = Path(__file__).parent.parent / "saq_fx" / "networks.py", tmp_path / "run"
    start = ["search", f"{networks}:SmallResNet", "--data", "digits"]
    command = [*start, "--folder", str(folder), "--epochs", "1", "--batch", "200", "--candidates", "2,4"]
    assert run(monkeypatch, *command, "--budget", "0.14xW8A8", "--budget", "25kB") == 0
    assert "policy.json, report.txt, search.json and search.png are in" in capsys.readouterr().out
    gm = prepare_saq(SmallResNet(), example_inputs=torch.zeros(1, 1, 8, 8))
    found, costs = SearchResult.load(folder / "search.json"), cost_table(gm)
    assert len(found.history) == 5
    assert Policy.load(folder / "policy.json") == found.policy
    apply_policy(gm, found.policy)
    assert (folder / "report.txt").read_text() == f"{precision_report(gm)}\n"
    full = costs.total_bitops(costs.uniform(Precision(8, 8)))
    assert precision_report(gm).total_bitops <= 0.14 * full
    assert precision_report(gm).total_weight_bytes <= 25e3
    again = [*start, "--folder", str(tmp_path / "again"), "--result", str(folder / "search.json")]
    assert run(monkeypatch, *again, "--budget", "0.1xW8A8") == 0
    assert Policy.load(tmp_path / "again" / "policy.json") == found.policy_for("0.1xW8A8")
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"policy.json", "report.txt"}


def test_search_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    networks = Path(__file__).parent.parent / "saq_fx" / "networks.py"
    command = ["search", f"{networks}:SmallResNet", "--data", "digits", "--folder", str(tmp_path)]
    for arguments, message in (
        (["--budget", "0.01xW8A8"], "the smallest feasible one is 0.0746"),
        (["--budget", "much"], "'much'"),
        (["--budget", "avg4", "--candidates", "2;4"], "--candidates '2;4' is not a list of bits"),
        (["--budget", "avg4", "--batch", "2000"], "--batch 2000 leaves no batch of digits"),
        (["--budget", "avg4", "--result", str(tmp_path / "absent.json")], "absent.json is not a search result"),
    ):
        assert run(monkeypatch, *command, *arguments) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_train_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    networks = Path(__file__).parent.parent / "saq_fx" / "networks.py"
    command = ["train", f"{networks}:SmallResNet", "--data", "digits", "--folder", str(tmp_path)]
    assert run(monkeypatch, *command, "--paper", "resnet18") == 1
    assert "is not NETWORK:BITS" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--paper", "vgg:4") == 1
    assert "no settings for 'vgg'" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--paper", "mobilenet_v2:4") == 1
    assert "distils from the float model, whose weights are missing: give --weights" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--batch", "2000") == 1
    assert "batches is empty" in capsys.readouterr().err
    torch.save({}, tmp_path / "empty.pt")
    (tmp_path / "text.pt").write_text("no tensors")
    for name in ("empty.pt", "text.pt"):
        assert run(monkeypatch, *command, "--weights", str(tmp_path / name)) == 1
        assert "does not hold the weights of" in capsys.readouterr().err
    assert run(monkeypatch, *command, "--workers", "-1") == 2
    models = tmp_path / "models.py"
    models.write_text(
        "from torch import nn\ndef few():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 5))\n"
        "def large():\n    return nn.Linear(64, 10)\n"
    )
    assert run(monkeypatch, "train", f"{models}:few", *command[2:]) == 1
    assert "gives (1, 5) for one image of digits, whose labels go up to 9 at least" in capsys.readouterr().err
    assert run(monkeypatch, "train", f"{models}:large", *command[2:]) == 1
    assert "does not take the images of digits, (1, 1, 8, 8): " in capsys.readouterr().err


def test_settings_of_the_paper() -> None:
    small, mobile, default = (settings_of(name) for name in ("resnet18:2", "mobilenet_v2:4", ""))
    assert (small.recipe.rho, small.recipe.weight_decay, small.recipe.batch_size) == (0.30, 2.5e-5, 512)
    assert (small.precision, small.offsets) == ("W2A2", False)
    assert (mobile.precision, mobile.offsets) == ("W4A4", True)
    assert (default.recipe, default.precision) == (TrainingRecipe(batch_size=64), "W4A4")


def test_report_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["report", "torchvision:resnet18", "--shape"]
    assert run(monkeypatch, *command, "1,3,32,32", "--policy", str(tmp_path / "absent.json")) == 1
    assert "absent.json" in capsys.readouterr().err
    assert run(monkeypatch, *command, "1,-3,32,32") == 1
    assert "is not a list of sizes" in capsys.readouterr().err
