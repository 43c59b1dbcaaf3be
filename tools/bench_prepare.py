"""What preparing costs against `torch.fx.symbolic_trace` on the same model, and how it grows with depth.

Prints a table, and writes it as JSON:
`python tools/bench_prepare.py [--layers 100 1000] [--models resnet50] [--rounds 5] [--device cuda] [--out FILE.json]`
The kinds take turns and the least of all rounds (two of more than 1000 layers) counts: what else the machine does then
hits all alike. On a CPU, processor time of one thread is measured. `symbolic_trace` generates its code at once, a
prepared graph when it is first called: both are in the table, without and with code.
"""

import argparse
import gc
import json
import math
import platform
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torchvision
from bench_training import stopwatch
from tabulate import tabulate
from torch import Tensor, fx, nn

from saq_fx.precision import write_whole
from saq_fx.prepare import prepare_saq

KINDS = ("forward", "trace", "float", "float with code", "W4A4", "W4A4 with code")

MODELS = ("resnet50", "densenet121", "mobilenet_v3_large", "vit_b_16")


class Tower(nn.Module):
    """Linear layers with ReLU, one after the other, each with a shortcut if `residual`."""

    def __init__(self, depth: int, residual: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y = torch.relu(layer(x))
            x = x + y if self.residual else y
        return x


def one_round(model: nn.Module, example: Tensor, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each kind, once."""
    taken: dict[str, float] = {}

    def timed(kind: str, function: Callable[[], Any]) -> Any:
        gc.collect()
        start = clock()
        result = function()
        taken[kind] = clock() - start
        return result

    with torch.no_grad():
        timed("forward", lambda: model(example))
    timed("trace", lambda: fx.symbolic_trace(model))
    for kind, precision in (("float", None), ("W4A4", "W4A4")):
        gm = timed(kind, lambda precision=precision: prepare_saq(model, example_inputs=example, precision=precision))
        timed(f"{kind} with code", gm.generate_code)
        taken[f"{kind} with code"] += taken[kind]
    return taken


def measure(name: str, model: nn.Module, example: Tensor, rounds: int) -> dict[str, Any]:
    """The least seconds of all rounds, and what they are in terms of tracing alone."""
    clock = stopwatch(example.device)
    times = defaultdict(list)
    for _ in range(rounds):
        for kind, taken in one_round(model, example, clock).items():
            times[kind].append(taken)
    least = {kind: min(times[kind]) for kind in KINDS}
    return {"model": name, "seconds": least, "ratios": {kind: least[kind] / least["trace"] for kind in KINDS}}


def exponent(sizes: list[int], times: list[float]) -> float | None:
    """Slope of log time over log size, by least squares, to three digits; None of fewer than two sizes."""
    if len(sizes) < 2:
        return None
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return round(slope, 3)


def towers(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of all depths, and the exponents with which each kind grows."""
    rows: list[dict[str, Any]] = []
    exponents = {}
    example = torch.randn(1, 4, device=options.device)
    for shape in ("chain", "residual"):
        models = {depth: Tower(depth, shape == "residual").to(options.device) for depth in options.layers}
        measured = [
            measure(f"{shape} of {depth}", model, example, options.rounds if depth <= 1000 else 2)
            for depth, model in models.items()
        ]
        rows += measured
        exponents[shape] = {kind: exponent(list(models), [row["seconds"][kind] for row in measured]) for kind in KINDS}
    return rows, exponents


def torchvision_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of a model of torchvision, on one image of 64 x 64, in evaluation mode."""
    size = {"image_size": 64} if name.startswith("vit") else {}
    model = torchvision.models.get_model(name, **size).to(options.device).eval()
    return measure(name, model, torch.randn(1, 3, 64, 64, device=options.device), options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--models", nargs="*", default=MODELS, help="of torchvision")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows, exponents = towers(options)
    rows += [torchvision_model(name, options) for name in options.models]
    ratios = [kind for kind in KINDS if kind not in ("forward", "trace")]
    table = [[row["model"], *row["seconds"].values(), *(row["ratios"][kind] for kind in ratios)] for row in rows]
    heads = ["", *(f"{kind}, s" for kind in KINDS), *(f"{kind} / trace" for kind in ratios)]
    print(tabulate(table, heads, floatfmt=".3g"))
    print("fitted exponents:", json.dumps(exponents))
    if options.out is not None:
        settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
        result = {
            "rows": rows,
            "exponents": exponents,
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
            "settings": settings,
        }
        write_whole(options.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
