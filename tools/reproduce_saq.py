"""SAQ against plain quantization-aware training on scikit-learn's digits: Tables 4 to 7 of the paper, in our figures.

`python tools/reproduce_saq.py [--networks resnet mobilenet vit vit_long] [--seeds 5] [--folder benchmarks]`

Every run is kept in `saq_NETWORK.json` as soon as it ends, and not repeated; `saq.md` is made of all that is there.
The learning rates (of plain training, where a setting has several) and then the radius rho are chosen per network, in
float and per bit-width, on images used neither for training nor for the test, with seeds that the table does not use.
"""

import argparse
import copy
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.data import Images, accuracy, digits
from saq_fx.graph import SaqGraphModule
from saq_fx.networks import SmallMobileNet, SmallResNet, SmallViT
from saq_fx.parameters import parameter_groups
from saq_fx.pass_base import Pipeline
from saq_fx.passes.insert_perturbations import InsertPerturbations, perturbed_weights, zero_deltas
from saq_fx.precision import write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.sharpness import lambda_max, surrogate_gap
from saq_fx.training import SAQ

BATCH = 50
POOL = 1000  # images that are not in the test set
CHOOSING_SEEDS = (100, 101)
GAP_RADIUS = 0.5
BITS = ("W2A2", "W4A4")
EVERY_STEP = {"period": 1}
METHODS: dict[str, dict[str, Any]] = {
    "plain QAT": {"losses": "vanilla"},
    "plain QAT, twice the learning rate": {"losses": "vanilla", "lr_factor": 2},
    "SAM, then plain QAT": {"losses": "vanilla", "flat_start": True},
    "case 1": {"case": 1, **EVERY_STEP},
    "case 2": {"case": 2, **EVERY_STEP},
    "case 3": {"case": 3, **EVERY_STEP},
    "case 3, perturbed loss alone": {"losses": "perturbed", **EVERY_STEP},
    "case 3, period 4": {"period": 4},
    "case 3, period 4, second pass on half": {"period": 4, "second_pass_fraction": 0.5},
    "case 3, period 4, second pass on a quarter": {"period": 4, "second_pass_fraction": 0.25},
    "case 3, period 4, second pass on the hardest quarter": {
        "period": 4,
        "second_pass_fraction": 0.25,
        "reduction": "none",
    },
    "case 2, a tenth of the radius": {"case": 2, "radius_factor": 0.1, **EVERY_STEP},
    "case 3, half the radius": {"radius_factor": 0.5, **EVERY_STEP},
    "case 3, a fifth of the radius": {"radius_factor": 0.2, **EVERY_STEP},
    "case 3, a tenth of the radius": {"radius_factor": 0.1, **EVERY_STEP},
}


FLOAT, FLAT = "float", "float, by SAM"


@dataclass(frozen=True)
class Setting:
    """A network, how it is trained in float and in low precision, and what the table says of it."""

    make: Callable[[], nn.Module]
    images: int
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    float_rates: tuple[float, ...]
    float_epochs: int
    rates: tuple[float, ...]
    epochs: int
    radii: tuple[float, ...]
    bits: tuple[str, ...] = BITS
    methods: tuple[str, ...] = (FLOAT, FLAT, *METHODS)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """As the paper for convolutional networks."""
    return torch.optim.SGD(parameter_groups(model, 1e-4), lr, momentum=0.9)


def adamw(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """As the paper for Transformers."""
    return torch.optim.AdamW(parameter_groups(model, 0.05), lr)


CNN_RADII = (0.1, 0.3, 0.5, 1.0)
VIT_RADII = (0.02, 0.05, 0.1, 0.3)
LONG = ("plain QAT", "plain QAT, twice the learning rate", "case 3")
VIT_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)
SETTINGS = {
    "resnet": Setting(SmallResNet, 300, sgd, (0.1,), 40, (0.02,), 40, CNN_RADII),
    "mobilenet": Setting(SmallMobileNet, 300, sgd, (0.1,), 40, (0.02,), 40, CNN_RADII),
    "vit": Setting(SmallViT, 700, adamw, VIT_RATES, 40, VIT_RATES, 40, VIT_RADII),
    "vit_long": Setting(SmallViT, 700, adamw, (8e-3,), 40, (8e-3,), 160, (0.1, 0.3), ("W2A2",), LONG),
}


@dataclass
class Results:
    """The runs of one network, kept in a file that is written whole after each."""

    path: Path
    runs: dict[str, dict[str, float]] = field(default_factory=dict)

    @staticmethod
    def read(path: Path) -> "Results":
        """What is in the file, or nothing yet."""
        return Results(path, json.loads(path.read_text())["runs"] if path.exists() else {})

    def get(self, key: str, run: Callable[[], dict[str, float]]) -> dict[str, float]:
        """The run's figures: those kept, or those of running it now."""
        if key not in self.runs:
            self.runs[key] = run()
            made = {"date": str(date.today()), "torch": torch.__version__, "machine": platform.machine()}
            text = json.dumps({"made": made, "runs": self.runs}, indent=1)
            write_whole(self.path, f"{text}\n".encode())
            print(f"{key:60} {self.runs[key]}", flush=True)
        return self.runs[key]


@dataclass
class Bench:
    """One network's float models and runs."""

    name: str
    results: Results
    floats: dict[tuple[int, float, float], nn.Module] = field(default_factory=dict)

    @property
    def setting(self) -> Setting:
        """How this network is trained."""
        return SETTINGS[self.name]

    def images(self) -> tuple[Images, Images, Images]:
        """Training, choosing and test images."""
        pool, test = digits(POOL)
        count = self.setting.images
        return Images(pool.x[:count], pool.y[:count]), Images(pool.x[count:], pool.y[count:]), test

    @functools.cached_property
    def float_lr(self) -> float:
        """The learning rate of training in float."""
        return self.best("float rate", self.setting.float_rates, lambda lr, s: self.choosing(self.float_model(s, lr)))

    def float_model(self, seed: int, lr: float, rho: float = 0.0) -> nn.Module:
        """A model trained in float, by SAM with a radius."""
        if (seed, lr, rho) not in self.floats:
            torch.manual_seed(seed)
            model = self.setting.make()
            losses = "perturbed" if rho else "vanilla"
            optimizer = SAQ(model, self.setting.optimizer(model, lr), rho, period=1, losses=losses)
            train(model, optimizer, self.images()[0], self.setting.float_epochs, seed)
            self.floats[seed, lr, rho] = model
        return self.floats[seed, lr, rho]

    def choosing(self, model: nn.Module) -> float:
        """Accuracy on the images for choosing."""
        return accuracy(model, self.images()[1].batches(BATCH))

    def quantized(
        self, bits: str, lr: float, rho: float, seed: int, options: dict[str, Any]
    ) -> tuple[SaqGraphModule, dict[str, float]]:
        """A quantized model, trained, and what its training took."""
        options = dict(options)
        rho *= options.pop("radius_factor", 1)
        lr *= options.pop("lr_factor", 1)
        model = self.float_model(seed, self.float_lr, self.flat if options.pop("flat_start", False) else 0.0)
        training, reduction = self.images()[0], options.pop("reduction", "mean")
        gm = prepare_saq(copy.deepcopy(model).train(), example_inputs=training.x[:256], precision=bits)
        optimizer = SAQ(gm, self.setting.optimizer(gm, lr), rho, **options)
        return gm, train(gm, optimizer, training, self.setting.epochs, seed, reduction)

    def best(self, name: str, values: tuple[float, ...], accuracy_at: Callable[[float, int], float]) -> float:
        """The value of the best mean accuracy on the choosing images."""
        if len(values) == 1:
            return values[0]
        found = {}
        for value in values:
            runs = [
                self.results.get(f"choosing|{name}|{value}|{s}", lambda v=value, s=s: {"accuracy": accuracy_at(v, s)})  # type: ignore[misc]
                for s in CHOOSING_SEEDS
            ]
            found[value] = statistics.mean(run["accuracy"] for run in runs)
        return max(found, key=lambda value: found[value])

    @functools.cached_property
    def flat(self) -> float:
        """The radius of training in float."""
        return self.best(
            "float", self.setting.radii, lambda rho, s: self.choosing(self.float_model(s, self.float_lr, rho))
        )

    def chosen(self) -> dict[str, tuple[float, float]]:
        """The learning rate and the radius at each width."""
        setting = self.setting
        chosen = {}
        for bits in setting.bits:

            def after(lr: float, rho: float, seed: int, options: dict[str, Any], bits: str = bits) -> float:
                return self.choosing(self.quantized(bits, lr, rho, seed, options)[0])

            lr = self.best(f"{bits} rate", setting.rates, lambda lr, s: after(lr, 0.0, s, METHODS["plain QAT"]))
            chosen[bits] = lr, self.best(bits, setting.radii, lambda rho, s, lr=lr: after(lr, rho, s, EVERY_STEP))  # type: ignore[misc]
        return chosen

    def run(self, seeds: int) -> None:
        """All methods, bit-widths and seeds."""
        training, _, test = self.images()
        methods, chosen = self.setting.methods, self.chosen()
        for seed in range(seeds):
            for name in (each for each in (FLOAT, FLAT) if each in methods):
                rho = self.flat if name == FLAT else 0.0
                self.results.get(
                    f"{name}||{rho}|{seed}",
                    lambda r=rho, s=seed: {  # type: ignore[misc]
                        "accuracy": accuracy(self.float_model(s, self.float_lr, r), test.batches(BATCH))
                    },
                )
            for bits, (lr, rho) in chosen.items():
                for method, options in ((each, METHODS[each]) for each in methods if each in METHODS):
                    self.results.get(
                        f"{method}|{bits}|{rho}|{seed}",
                        lambda b=bits, lr=lr, r=rho, o=options, s=seed: measured(  # type: ignore[misc]
                            *self.quantized(b, lr, r, s, o), training, test
                        ),
                    )


def train(
    model: nn.Module, optimizer: SAQ, training: Images, epochs: int, seed: int, reduction: str = "mean"
) -> dict[str, float]:
    """Cross-entropy under a cosine schedule. Returns processor seconds per step, and how many weights case 2 moved."""
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    seconds, shares = [], []
    for _ in range(epochs):
        for x, y in training.batches(BATCH, generator):
            start = time.process_time()
            optimizer.step(lambda x, y: F.cross_entropy(model(x), y, reduction=reduction), x, y)
            seconds.append(time.process_time() - start)
            if optimizer.last_step is not None and optimizer.last_step.moved_share is not None:
                shares.append(optimizer.last_step.moved_share)
        schedule.step()
    moved = {"moved_share": statistics.mean(shares)} if shares else {}
    return {"step_seconds": statistics.mean(seconds), **moved}


def measured(gm: SaqGraphModule, taken: dict[str, float], training: Images, test: Images) -> dict[str, float]:
    """Accuracy on the test images; sharpness on the training images, with respect to the quantized weights."""
    result = {"accuracy": accuracy(gm, test.batches(BATCH)), **taken}
    Pipeline((InsertPerturbations(case=3),)).run(gm)
    gm.eval()

    def loss(batch: Images) -> Tensor:
        return F.cross_entropy(gm(batch.x), batch.y)

    with zero_deltas(perturbed_weights(gm)) as leaves:
        deltas = [delta for _, delta in leaves]
        found = lambda_max(loss, [training], deltas, iterations=60, tolerance=1e-2)
        result |= {"lambda_max": found.value, "lambda_residual": found.residual}
        result["gap"] = surrogate_gap(loss, [training], deltas, GAP_RADIUS)
    return result


def mean_and_deviation(values: Iterable[float], digits: int = 1) -> str:
    """`mean ± standard deviation`; the mean alone of a single value."""
    values = list(values)
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(results: Results) -> str:
    """One network's runs as a markdown table, one row per bit-width and method."""
    grouped: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for key, run in sorted(results.runs.items(), key=lambda item: position(item[0])):
        if not key.startswith("choosing"):
            method, bits, rho, seed = key.split("|")
            grouped.setdefault((bits, method, rho), {})[seed] = run
    rows = []
    for (bits, method, rho), runs in sorted(grouped.items(), key=lambda item: item[0][0]):
        control = grouped.get((bits, "plain QAT, twice the learning rate", rho), {})
        ahead = [run["accuracy"] - control[seed]["accuracy"] for seed, run in runs.items() if seed in control]
        quantized = [run for run in runs.values() if "lambda_max" in run]
        moved = [run["moved_share"] for run in runs.values() if "moved_share" in run]
        rows.append(
            (
                bits or "float",
                f"{method}, rho {rho}" if method.startswith("case") or ("SAM" in method and not bits) else method,
                len(runs),
                mean_and_deviation(run["accuracy"] for run in runs.values()),
                standard_error(ahead),
                mean_and_deviation((run["lambda_max"] for run in quantized), 2) if quantized else "",
                mean_and_deviation((run["gap"] for run in quantized), 3) if quantized else "",
                mean_and_deviation(1e3 * run["step_seconds"] for run in quantized) if quantized else "",
                mean_and_deviation(100 * each for each in moved) if moved else "",
            )
        )
    headers = (
        "bits", "method", "seeds", "test accuracy, %", "against twice the rate", "lambda_max", f"gap at {GAP_RADIUS}",
        "ms per step", "moved, %",
    )  # fmt: skip
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def position(key: str) -> int:
    """A run's place in the table."""
    order = ["choosing", FLOAT, FLAT, *METHODS]
    return order.index(key.split("|")[0])


def standard_error(differences: list[float]) -> str:
    """Mean of paired differences ± its standard error."""
    if len(differences) < 2:
        return ""
    return f"{statistics.mean(differences):+.1f} ± {statistics.stdev(differences) / math.sqrt(len(differences)):.1f}"


def main() -> None:
    """Runs what is missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=list(SETTINGS), choices=SETTINGS, metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    for name in arguments.networks:
        Bench(name, Results.read(arguments.folder / f"saq_{name}.json")).run(arguments.seeds)
    parts = [
        "# SAQ on digits",
        "",
        "Made by `python tools/reproduce_saq.py`. lambda_max and the gap are with respect to the quantized weights, on",
        "the training images. Milliseconds are of one processor thread of a machine that did other things as well: see",
        "training.md for throughput. Moved: the share of quantized weights that case 2 takes to another level. The",
        "second pass on a part takes the first samples of the batch, or the hardest, whose losses are the largest.",
        "",
    ]
    for name, setting in SETTINGS.items():
        results = Results.read(arguments.folder / f"saq_{name}.json")
        if results.runs:
            title = f"{setting.make.__name__}, {setting.images} training images, {setting.epochs} epochs"
            parts += [f"## {title}", "", table(results), ""]
    write_whole(arguments.folder / "saq.md", "\n".join(parts).encode())


if __name__ == "__main__":
    main()
