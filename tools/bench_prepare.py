"""What preparing costs against `torch.fx.symbolic_trace` on the same model, and how it grows with depth.

Writes JSON and prints a table. `python tools/bench_prepare.py [--out FILE] [--layers 100 1000 10000]`
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from saq_fx.prepare import prepare_saq


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


def seconds(function: Callable[[], Any], repeats: int) -> float:
    """The least of several runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(name: str, model: nn.Module, example: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of tracing alone, of the float graph and of the quantized one."""
    trace = seconds(lambda: fx.symbolic_trace(model), repeats)
    as_float = seconds(lambda: prepare_saq(model, example_inputs=example, precision=None), repeats)
    quantized = seconds(lambda: prepare_saq(model, example_inputs=example), repeats)
    return {"model": name, "trace": trace, "float": as_float, "W4A4": quantized, "ratio": quantized / trace}


def exponent(sizes: list[int], times: list[float]) -> float:
    """Slope of log time over log size, by least squares."""
    x, y = [math.log(size) for size in sizes], [math.log(each) for each in times]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    rows, exponents = [], {}
    for kind in ("chain", "residual"):
        times = []
        for depth in options.layers:
            model = Tower(depth, kind == "residual").to(options.device)
            rows.append(
                measure(f"{kind} of {depth}", model, torch.randn(1, 4, device=options.device), 1 + (depth <= 1000))
            )
            times.append(rows[-1]["W4A4"])
        exponents[kind] = exponent(options.layers, times)
    table = tabulate(
        [list(row.values()) for row in rows],
        ["", "trace, s", "float, s", "W4A4, s", "W4A4 / trace"],
        floatfmt=".3g",
    )
    print(table)
    print("fitted exponents:", {kind: round(value, 3) for kind, value in exponents.items()})
    if options.out is not None:
        machine = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.processor(),
        }
        options.out.write_text(json.dumps({"rows": rows, "exponents": exponents, **machine}, indent=2) + "\n")


if __name__ == "__main__":
    main()
