"""What the perturbations of SAQ's cases 2 and 3 do to the quantized weights of a trained network.

`python tools/compare_cases.py [--networks resnet mobilenet] [--seeds 5] [--folder benchmarks]`

The networks are those of `reproduce_saq.py`, trained by case 2 at the radius that it chose. Then, batch by batch: how
far `Q(w + eps(w)) - Q(w)` is and how much the loss rises there, beside `eps(Q(w))`, whose length is the radius.
"""

import argparse
import statistics
from pathlib import Path

import torch
from reproduce_saq import BATCH, METHODS, SETTINGS, Bench, Results, mean_and_deviation
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from saq_fx.data import Images
from saq_fx.graph import SaqGraphModule
from saq_fx.pass_base import Pipeline
from saq_fx.passes.insert_perturbations import InsertPerturbations, perturbed_weights, zero_deltas
from saq_fx.precision import write_whole

HEADERS = ("network", "bits", "rho", "distance / rho", "cosine", "loss rises, case 2", "case 3")


def length(tensors: list[Tensor]) -> float:
    """One norm over all."""
    return float(torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt())


def perturb(gm: SaqGraphModule, case: int, batch: tuple[Tensor, Tensor], rho: float) -> tuple[list[Tensor], float]:
    """How a case moves the quantized weights, and by how much the loss rises."""
    x, y = batch

    def loss() -> Tensor:
        return F.cross_entropy(gm(x), y)

    Pipeline((InsertPerturbations(case),)).run(gm)
    weights = perturbed_weights(gm)
    with zero_deltas(weights) as leaves:
        before = loss()
        before.backward()  # type: ignore[no-untyped-call]
        values = [weight.quantized() for weight in weights]
        gradients = [delta.grad.clone() for _, delta in leaves if delta.grad is not None]
        with torch.no_grad():
            for (_, delta), gradient in zip(leaves, gradients, strict=True):
                delta.copy_(rho * gradient / length(gradients))
            rise = float(loss() - before)
        moved = [delta.detach().clone() for _, delta in leaves]
        if case == 2:
            moved = [weight.quantized() - value for weight, value in zip(weights, values, strict=True)]
    return moved, rise


def compare(gm: SaqGraphModule, training: Images, rho: float) -> dict[str, float]:
    """Means over the batches, in training mode."""
    gm.train()
    found = []
    for batch in training.batches(BATCH):
        second, rise = perturb(gm, 2, batch, rho)
        third, other_rise = perturb(gm, 3, batch, rho)
        inner = float(torch.stack([(a * b).sum() for a, b in zip(second, third, strict=True)]).sum())
        cosine = inner / (length(second) * length(third))
        found.append({"distance": length(second) / rho, "cosine": cosine, "rise": rise, "rise of case 3": other_rise})
    return {name: statistics.mean(each[name] for each in found) for name in found[0]}


def rows(name: str, folder: Path, seeds: int) -> list[tuple[str, ...]]:
    """A row for each bit-width: mean and standard deviation over the seeds."""
    bench = Bench(name, Results.read(folder / f"saq_{name}.json"))
    training, chosen = bench.images()[0], bench.chosen()
    table = []
    for bits, (lr, rho) in chosen.items():
        runs = []
        for seed in range(seeds):
            gm, _ = bench.quantized(bits, lr, rho, seed, METHODS["case 2"])
            runs.append(compare(gm, training, rho))
            print(name, bits, seed, runs[-1], flush=True)
        values = [mean_and_deviation((run[key] for run in runs), 3) for key in runs[0]]
        table.append((SETTINGS[name].make.__name__, bits, str(rho), *values))
    return table


def main() -> None:
    """Trains, compares, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet", "mobilenet"], choices=SETTINGS, metavar="NETWORK")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("benchmarks"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = [row for name in arguments.networks for row in rows(name, arguments.folder, arguments.seeds)]
    parts = [
        "# How far the perturbation of case 2 moves quantized weights",
        "",
        f"Made by `python tools/compare_cases.py`, {arguments.seeds} seeds. Distance: that of Q(w + eps(w)) from Q(w).",
        "Cosine: with the perturbation of case 3, whose length is rho. In training mode, over the training images.",
        "",
        tabulate(table, HEADERS, tablefmt="github", disable_numparse=True),
        "",
    ]
    write_whole(arguments.folder / "saq_cases.md", "\n".join(parts).encode())


if __name__ == "__main__":
    main()
