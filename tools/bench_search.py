"""What a search step costs against a float training step of the same network, in one run.

ResNet-18 on 32 x 32 images, four candidates each for weights and activations. Writes JSON and prints a table.
`python tools/bench_search.py [--device cpu] [--batch 32] [--stem cifar] [--rounds 9] [--threads 1] [--out FILE]`
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from bench_training import STEMS, resnet18
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

from saq_fx.passes.relax_precision import RelaxPrecision
from saq_fx.passes.search_asga import SearchAsga
from saq_fx.precision import Budget, write_whole
from saq_fx.prepare import prepare_saq

BUDGET = (Budget.ratio(0.14),)


def float_step(stem: str, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One step of SGD with momentum."""
    x, y = batch
    model = resnet18(stem, 10).to(x.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def search_steps(stem: str, batch: tuple[Tensor, Tensor], count: int, **settings: Any) -> list[float]:
    """Seconds of each step of a search."""
    gm = prepare_saq(resnet18(stem, 10).to(batch[0].device), example_inputs=batch[0])
    RelaxPrecision().run(gm)
    times = [time.perf_counter()]

    def after_step(_: object) -> None:
        synchronize(batch[0].device)
        times.append(time.perf_counter())

    SearchAsga([batch], F.cross_entropy, BUDGET, steps=count, after_step=after_step, **settings).run(gm)
    return [after - before for before, after in pairwise(times)]


def seconds(step: Callable[[], None], count: int, device: torch.device) -> list[float]:
    """Of each of so many steps."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    """Waits for what the device still does."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(device: torch.device, stem: str, batch_size: int, rounds: int) -> list[dict[str, Any]]:
    """Alternates a few steps of each kind, so that all see the same machine; the medians and least of all rounds."""
    torch.manual_seed(0)
    batch = torch.randn(batch_size, 3, 32, 32, device=device), torch.randint(10, (batch_size,), device=device)
    plain = float_step(stem, batch)
    times: dict[str, list[float]] = {"float": [], "search, one pass": [], "search, both passes": []}
    for _ in range(rounds):
        times["float"] += seconds(plain, 6, device)[2:]
        times["search, one pass"] += search_steps(stem, batch, 6, rho=0.0)[3:]
        times["search, both passes"] += search_steps(stem, batch, 6)[3:]
    medians = {name: statistics.median(each) for name, each in times.items()}
    return [
        {
            "step": name,
            "median_ms": 1e3 * medians[name],
            "least_ms": 1e3 * min(each),
            "ratio": medians[name] / medians["float"],
            "ratio_of_least": min(each) / min(times["float"]),
        }
        for name, each in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stem", choices=STEMS, default="cifar")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.device, options.stem, options.batch, options.rounds)
    heads = ["", "median, ms", "least, ms", "median / float", "least / float"]
    print(tabulate([list(row.values()) for row in rows], heads, floatfmt=".3g"))
    if options.out is not None:
        settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
        machine = {"torch": torch.__version__, "python": platform.python_version(), "settings": settings}
        write_whole(options.out, (json.dumps({"rows": rows, **machine}, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
