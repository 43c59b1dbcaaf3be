"""Searched, uniform, random and sensitivity policies at equal BitOps on handwritten digits, and their transfer.

The test bed is a `SmallMobileNet` so narrow that bits matter (bottlenecks of four channels), searched and trained for a
few epochs from a network trained in float; how much random policies of equal BitOps differ on it, and how much seeds
do, is in the table.
Every run is written to the JSON file as soon as it is done, and is not done again: an interrupted run goes on.

`python tools/reproduce_asga.py [--out FILE] [--table FILE] [--seeds 5] [--parts policies transfer]`
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.baselines import draw_random, measure_sensitivity
from saq_fx.cost import cost_table
from saq_fx.data import Images, accuracy, digits
from saq_fx.demo import train_float, train_quantized
from saq_fx.graph import SaqGraphModule
from saq_fx.networks import SmallMobileNet
from saq_fx.passes.insert_perturbations import perturbed_weights, zero_deltas
from saq_fx.passes.reestimate_batchnorm import ReestimateBatchNorm
from saq_fx.passes.search_asga import ABLATIONS
from saq_fx.precision import Budget, Policy, Precision, write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.search import search_precision
from saq_fx.search_result import SearchResult
from saq_fx.sharpness import curvature, surrogate_gap

BATCH = 50
WIDTH, IMAGES = 4, 1000
FLOAT_EPOCHS, EPOCHS = 30, 8
RADIUS = 0.3  # of h and sigma, with respect to the quantized weights
UNIFORM = {"low": ("W2A3", "W3A2"), "middle": ("W3A3",), "high": ("W3A4", "W4A3")}
"""Budgets: the BitOps of these policies."""
FULL = list(ABLATIONS)[-1]
RANDOM_POLICIES, RANDOM_SEEDS = 10, 2
TRANSFER_POLICIES, TRANSFER_SEEDS = 20, 3
BOOTSTRAPS = 2000

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Images to train and to test on, and how many classes a network for them tells apart."""

    training: Images
    test: Images
    classes: int = 10

    def float_model(self, seed: int) -> nn.Module:
        """A network trained in float."""
        torch.manual_seed(seed)
        model = SmallMobileNet(WIDTH, self.classes)
        train_float(model, self.training, FLOAT_EPOCHS, seed)
        return model

    def prepared(self, model: nn.Module) -> SaqGraphModule:
        """The network with quantizers, calibrated."""
        return prepare_saq(model, example_inputs=self.training.x[:128])

    def batches(self, seed: int) -> list[tuple[Tensor, Tensor]]:
        """One round through the training images."""
        return list(self.training.batches(BATCH, torch.Generator().manual_seed(seed)))

    def search(self, model: nn.Module, seed: int, budget: Budget, **settings: Any) -> tuple[SearchResult, float]:
        """What a search finds, and the seconds that it takes."""
        batches = self.batches(seed)
        torch.manual_seed(seed)
        start = time.perf_counter()
        found = search_precision(
            self.prepared(model), batches, F.cross_entropy, budget=budget, steps=EPOCHS * len(batches), **settings
        )
        return found, time.perf_counter() - start

    def trained(self, model: nn.Module, policy: Policy, seed: int) -> Row:
        """Accuracy in percent after SAQ training, BitOps, and sharpness on the training images."""
        gm = prepare_saq(model, example_inputs=self.training.x[:128], precision=policy)
        torch.manual_seed(seed)
        train_quantized(gm, self.training, EPOCHS, seed, "")
        # Weights that go on changing levels leave the running statistics behind, by several points at this width.
        ReestimateBatchNorm(x for x, _ in self.batches(0)).run(gm)
        costs = cost_table(gm)
        row = {"accuracy": accuracy(gm, self.test.batches(256)), "bitops": costs.total_bitops(costs.assigned)}
        with zero_deltas(perturbed_weights(gm)) as leaves:
            deltas = [delta for _, delta in leaves]
            gap = surrogate_gap(lambda b: F.cross_entropy(gm(b[0]), b[1]), self.batches(0), deltas, RADIUS)
        return {**row, "gap": gap, "sigma": curvature(gap, RADIUS), "policy": json.loads(policy.to_json())["layers"]}


class Runs:
    """The rows that are done, by name, in a JSON file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[str, Row] = json.loads(path.read_text()) if path.exists() else {}

    def row(self, name: str, compute: Callable[..., Row], *args: Any) -> Row:
        """The row of that name; computed and written where it is not there."""
        if name not in self.rows:
            self.rows[name] = compute(*args)
            write_whole(self.path, json.dumps(self.rows, indent=1).encode())
            print(f"{name}: {self.rows[name]['accuracy']:.2f}", flush=True)
        return self.rows[name]

    def of(self, level: str, method: str) -> dict[int, Row]:
        """The rows of a method at a budget, by seed."""
        start = f"{level}/{method}/"
        return {int(key.removeprefix(start)): row for key, row in self.rows.items() if key.startswith(start)}


class Lazy:
    """Float networks by seed, trained when first asked for."""

    def __init__(self, task: Task) -> None:
        self.task, self.models = task, dict[int, nn.Module]()

    def __getitem__(self, seed: int) -> nn.Module:
        if seed not in self.models:
            self.models[seed] = self.task.float_model(seed)
        return self.models[seed]


def random_policies(task: Task, model: nn.Module, budget: Budget, count: int) -> list[Policy]:
    """Allocations under the budget; the same ones at every call."""
    gm = task.prepared(model)
    return [draw_random(gm, budget=budget, seed=seed).policy for seed in range(count)]


def bitops(task: Task, model: nn.Module, precision: str) -> Budget:
    """What a uniform policy costs."""
    costs = cost_table(task.prepared(model))
    return Budget.bitops(costs.total_bitops(costs.uniform(Precision.parse(precision))))


def compare_policies(runs: Runs, task: Task, seeds: int) -> None:
    """Every kind of policy, at every budget, for every seed."""
    models = Lazy(task)
    for seed in range(seeds):
        runs.row(f"float/{seed}", lambda model: {"accuracy": accuracy(model, task.test.batches(256))}, models[seed])
        for level, precisions in UNIFORM.items():
            model, budget = models[seed], bitops(task, models[seed], precisions[0])
            for each in precisions:
                runs.row(f"{level}/uniform {each}/{seed}", task.trained, model, Policy.uniform(each), seed)
            runs.row(f"{level}/sensitivity/{seed}", by_sensitivity, task, model, seed, budget)
            for name, settings in ABLATIONS.items():
                runs.row(f"{level}/{name}/{seed}", by_search, task, model, seed, budget, settings)
            if seed < RANDOM_SEEDS:
                for index, policy in enumerate(random_policies(task, model, budget, RANDOM_POLICIES)):
                    runs.row(f"{level}/random {index}/{seed}", task.trained, model, policy, seed)


def by_sensitivity(task: Task, model: nn.Module, seed: int, budget: Budget) -> Row:
    """Trained with the policy that the loss of each width by itself makes."""
    found = measure_sensitivity(task.prepared(model), task.batches(seed), F.cross_entropy, budget=budget)
    return task.trained(model, found.policy, seed)


def by_search(task: Task, model: nn.Module, seed: int, budget: Budget, settings: Any) -> Row:
    """Trained with the policy of a search, with what the search saw at its end."""
    found, seconds = task.search(model, seed, budget, **settings)
    end = found.history[-len(task.batches(seed)) :]
    gap, rho = (statistics.fmean(getattr(step, name) for step in end) for name in ("gap", "rho"))
    return {
        **task.trained(model, found.policy, seed),
        "search_seconds": seconds,
        "search_gap": gap,
        "search_sigma": curvature(gap, rho) if rho else None,
        "expected_cost": found.history[-1].cost,
    }


def proxy_and_target() -> tuple[Task, Task]:
    """Digits 0 to 4 as they are; digits 5 to 9 at twice the size, for a network with another head."""
    training, test = digits(IMAGES)
    low, high = (tuple(of_digits(each, wanted) for each in (training, test)) for wanted in (range(5), range(5, 10)))
    larger = tuple(Images(F.interpolate(each.x, scale_factor=2, mode="bilinear"), each.y) for each in high)
    return Task(*low, classes=5), Task(*larger)


def of_digits(images: Images, wanted: range) -> Images:
    """Those that show one of some digits."""
    chosen = (images.y >= wanted.start) & (images.y < wanted.stop)
    return Images(images.x[chosen], images.y[chosen])


def transfer(runs: Runs, proxy: Task, target: Task, seeds: int) -> None:
    """Policies searched on the proxy and solved again for the target's costs, against a search on the target."""
    of_proxy, of_target = Lazy(proxy), Lazy(target)
    precision = UNIFORM["low"][0]
    for seed in range(seeds):
        runs.row(f"transfer/proxy/{seed}", carried, proxy, target, of_proxy, of_target[seed], seed)
        budget = bitops(target, of_target[seed], precision)
        runs.row(f"transfer/target/{seed}", by_search, target, of_target[seed], seed, budget, {})
        runs.row(f"transfer/uniform/{seed}", target.trained, of_target[seed], Policy.uniform(precision), seed)
    budget = bitops(target, of_target[0], precision)
    for index, policy in enumerate(random_policies(target, of_target[0], budget, TRANSFER_POLICIES)):
        for seed in range(TRANSFER_SEEDS):
            runs.row(f"sharpness/proxy {index}/{seed}", proxy.trained, of_proxy[seed], policy, seed)
            runs.row(f"sharpness/target {index}/{seed}", target.trained, of_target[seed], policy, seed)


def carried(proxy: Task, target: Task, models: Lazy, model: nn.Module, seed: int) -> Row:
    """Trained on the target with the policy of a search on the proxy."""
    precision = UNIFORM["low"][0]
    found, seconds = proxy.search(models[seed], seed, bitops(proxy, models[seed], precision))
    policy = found.policy_for(bitops(target, model, precision), costs=cost_table(target.prepared(model)))
    return {**target.trained(model, policy, seed), "search_seconds": seconds}


def mean_and_deviation(values: Iterable[float]) -> str:
    """As text, with the number of values."""
    found = list(values)
    deviation = f" ± {statistics.stdev(found):.2f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.2f}{deviation} ({len(found)})" if found else "-"


def comparison(runs: Runs, level: str, budget: float) -> str:
    """The methods at one budget."""
    methods = [f"uniform {each}" for each in UNIFORM[level]] + ["sensitivity", *ABLATIONS]
    rows = [
        (
            method,
            mean_and_deviation(row["accuracy"] for row in found.values()),
            *(f"{statistics.fmean(row[name] for row in found.values()):.3g}" for name in ("sigma", "gap")),
            f"{statistics.fmean(row['bitops'] for row in found.values()) / budget:.1%}",
            mean_and_deviation(paired(runs, level, method, FULL)),
        )
        for method in methods
        if (found := runs.of(level, method))
    ]
    drawn = [found for index in range(RANDOM_POLICIES) if (found := runs.of(level, f"random {index}"))]
    if drawn:
        every = [row for found in drawn for row in found.values()]
        of_policy = [statistics.fmean(row["accuracy"] for row in found.values()) for found in drawn]
        numbers = (f"{statistics.fmean(row[name] for row in every):.3g}" for name in ("sigma", "gap"))
        used = f"{statistics.fmean(row['bitops'] for row in every) / budget:.1%}"
        rows.append((f"random, mean of {len(drawn)}", mean_and_deviation(of_policy), *numbers, used, ""))
        rows.append((f"random, best of {len(drawn)}", f"{max(of_policy):.2f}", "", "", "", ""))
    heads = ("", "accuracy, % (runs)", "sigma", "h", "budget used", "ASGA less this, same seeds")
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def paired(runs: Runs, level: str, method: str, other: str) -> list[float]:
    """By how much the other method's accuracy is higher, for each seed that both have."""
    first, second = runs.of(level, method), runs.of(level, other)
    return [second[seed]["accuracy"] - row["accuracy"] for seed, row in first.items() if seed in second]


def spreads(runs: Runs, level: str) -> tuple[float, float] | None:
    """Standard deviation between random policies (of one seed, averaged over seeds), and between seeds."""
    table = [
        [row["accuracy"] for row in runs.of(level, f"random {index}").values()] for index in range(RANDOM_POLICIES)
    ]
    if len(table[-1]) < RANDOM_SEEDS:
        return None
    values = np.array(table)
    return float(values.std(axis=0, ddof=1).mean()), float(values.std(axis=1, ddof=1).mean())


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Spearman's, with the ends of its 95 % bootstrap interval."""
    rng, pairs = np.random.default_rng(0), np.array([first, second])
    drawn = [pairs[:, rng.integers(len(first), size=len(first))] for _ in range(BOOTSTRAPS)]
    found = [spearmanr(*each).statistic for each in drawn if (each.std(axis=1) > 0).all()]
    low, high = np.quantile(found, [0.025, 0.975])
    return float(spearmanr(*pairs).statistic), float(low), float(high)


def transfer_report(runs: Runs) -> str:
    """Both claims about transfer."""
    rows = [
        (name, mean_and_deviation(row["accuracy"] for row in found.values()), seconds_of(found))
        for name, key in (
            ("searched on the proxy", "proxy"),
            ("searched on the target", "target"),
            ("uniform", "uniform"),
        )
        if (found := runs.of("transfer", key))
    ]
    parts = [tabulate(rows, ("", "accuracy on the target, % (seeds)", "search, s"), tablefmt="github")]
    accuracies = means(runs, "target", "accuracy")
    for name in ("sigma", "accuracy") if accuracies else ():
        value, low, high = rank_correlation(means(runs, "proxy", name), accuracies)
        parts.append(
            f"Rank correlation of {name} on the proxy with accuracy on the target, over {TRANSFER_POLICIES} random "
            f"policies of equal BitOps, each the mean of {TRANSFER_SEEDS} seeds: {value:.2f} (95 % bootstrap interval "
            f"{low:.2f} to {high:.2f})."
        )
    return "\n\n".join(parts)


def means(runs: Runs, task: str, name: str) -> list[float]:
    """Of each random policy over the seeds; nothing before all are trained."""
    found = [runs.of("sharpness", f"{task} {index}") for index in range(TRANSFER_POLICIES)]
    if any(len(rows) < TRANSFER_SEEDS for rows in found):
        return []
    return [statistics.fmean(row[name] for row in rows.values()) for rows in found]


def seconds_of(found: dict[int, Row]) -> str:
    """Of the searches, on average."""
    seconds = [row["search_seconds"] for row in found.values() if "search_seconds" in row]
    return f"{statistics.fmean(seconds):.1f}" if seconds else ""


def report(runs: Runs, task: Task) -> str:
    """All tables as Markdown."""
    floats = [row["accuracy"] for name, row in runs.rows.items() if name.startswith("float/")]
    parts = [
        f"Handwritten digits, {len(task.training)} training and {len(task.test)} test images, a network of width "
        f"{WIDTH}: {FLOAT_EPOCHS} epochs of training in float, {EPOCHS} of search and {EPOCHS} of SAQ training. "
        f"Float: {mean_and_deviation(floats)}."
    ]
    for level, (precision, *_) in UNIFORM.items():
        budget = bitops(task, SmallMobileNet(WIDTH), precision)
        parts += [f"## Budget: the BitOps of {precision} ({budget})", comparison(runs, level, budget.value)]
        found = spreads(runs, level)
        if found:
            parts.append(
                f"Standard deviation between random policies {found[0]:.2f}, between seeds of a policy {found[1]:.2f}."
            )
    if runs.of("transfer", "proxy"):
        parts += [
            f"## Transfer from digits 0-4 to digits 5-9 of twice the size, {UNIFORM['low'][0]}",
            transfer_report(runs),
        ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/asga.json"))
    parser.add_argument("--table", type=Path, default=Path("benchmarks/asga.md"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="*", default=["policies", "transfer"], help="none: the table alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small only lose by being shared out
    runs = Runs(options.out)
    task = Task(*digits(IMAGES))
    if "policies" in options.parts:
        compare_policies(runs, task, options.seeds)
    if "transfer" in options.parts:
        transfer(runs, *proxy_and_target(), options.seeds)
    write_whole(options.table, report(runs, task).encode())
    print(report(runs, task))


if __name__ == "__main__":
    main()
