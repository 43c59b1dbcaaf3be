"""The main job from end to end on scikit-learn's digits: float model, search, quantized training, report, files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.checkpoint import save
from saq_fx.data import Images, accuracy, digits
from saq_fx.graph import SaqGraphModule
from saq_fx.networks import SmallResNet
from saq_fx.parameters import parameter_groups
from saq_fx.plots import plot_bits
from saq_fx.precision import Budget, write_whole
from saq_fx.prepare import apply_policy, prepare_saq
from saq_fx.report import PrecisionReport, precision_report
from saq_fx.search import search_precision
from saq_fx.training import SAQ

_TRAINING_IMAGES = 300  # so few that precision shows in the accuracy
_BATCH = 50
_BUDGET = Budget.ratio(0.14, of="W8A8")
_CONSOLE = Console(stderr=True)


@dataclass(frozen=True)
class Result:
    """One line of the demo's table: accuracy in percent, total BitOps, weight bytes."""

    name: str
    accuracy: float
    bitops: float
    weight_bytes: float


def run_demo(folder: Path, *, quick: bool = False, seed: int = 0) -> list[Result]:
    """Runs the demo and writes policy, checkpoint, report and picture to `folder`.

    Args:
        quick: a tenth of the training, to see that everything runs; the accuracies then mean nothing.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    training, test = digits(_TRAINING_IMAGES)
    epochs = 3 if quick else 30
    example = training.x[:1]

    model = SmallResNet()
    train_float(model, training, epochs, seed)
    float_report = precision_report(prepare_saq(model, example_inputs=example, precision=None))
    results = [_result("float", model, float_report, test)]

    for name in ("W4A4", "W2A2"):
        gm = prepare_saq(model, example_inputs=training.x[:256], precision=name)
        train_quantized(gm, training, epochs, seed, f"Training uniform {name}")
        results.append(_result(f"uniform {name}", gm, precision_report(gm), test))

    gm = prepare_saq(model, example_inputs=training.x[:256])
    batches = list(training.batches(_BATCH, torch.Generator().manual_seed(seed)))
    found = search_precision(
        gm,
        batches,
        F.cross_entropy,
        budget=_BUDGET,
        candidates=(2, 3, 4, 6),
        steps=epochs * len(batches),
    )
    apply_policy(gm, found.policy)
    train_quantized(gm, training, epochs, seed, "Training the searched policy")
    report = precision_report(gm)
    results.append(_result(f"searched, {_BUDGET}", gm, report, test))

    found.policy.save(folder / "policy.json")
    save(gm, folder / "model.safetensors")
    write_whole(folder / "report.txt", f"{report}\n".encode())
    write_whole(folder / "report.html", report.to_html().encode())
    plot_bits(report, folder / "bits.png")
    print(report)
    print()
    print(results_table(results))
    print(f"\npolicy.json, model.safetensors, report.txt, report.html and bits.png are in {folder}/")
    return results


def results_table(results: list[Result]) -> str:
    """The demo's table as text."""
    rows = [(each.name, each.accuracy, each.bitops / 1e6, each.weight_bytes / 1e3) for each in results]
    return tabulate(rows, ("", "test accuracy, %", "BitOps, M", "weights, kB"), floatfmt=("", ".1f", ".1f", ".1f"))


def train_float(model: nn.Module, training: Images, epochs: int, seed: int) -> None:
    """Trains a float model by SGD with momentum 0.9 and a cosine schedule from 0.1."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    _train(model, training, epochs, seed, optimizer, step, "Training in float")


def train_quantized(gm: SaqGraphModule, training: Images, epochs: int, seed: int, title: str) -> None:
    """Trains a quantized graph by SAQ around SGD: rho 0.3, period 4, cosine schedule from 0.02 (SAQ, Sec. 5)."""
    base = torch.optim.SGD(parameter_groups(gm, 1e-4), 0.02, momentum=0.9)
    optimizer = SAQ(gm, base, rho=0.3, case=3, period=4, beta=0.7)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.step(lambda: F.cross_entropy(gm(x), y))

    _train(gm, training, epochs, seed, base, step, title)


def _train(
    model: nn.Module,
    training: Images,
    epochs: int,
    seed: int,
    optimizer: torch.optim.Optimizer,
    step: Callable[[Tensor, Tensor], None],
    title: str,
) -> None:
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in track(range(epochs), f"{title:30}", console=_CONSOLE):
        for x, y in training.batches(_BATCH, generator):
            step(x, y)
        schedule.step()


def _result(name: str, model: nn.Module, report: PrecisionReport, test: Images) -> Result:
    return Result(name, accuracy(model, test.batches(256)), report.total_bitops, report.total_weight_bytes)
