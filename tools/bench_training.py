"""Training throughput of SAQ against plain quantization-aware training, ResNet-18 on small images, in one run.

Prints a table, and writes it with JSON beside it:
`python tools/bench_training.py [--device cuda] [--batch 32] [--stem cifar] [--rounds 5] [--out FILE.json]`
The settings take turns, a few steps each, and ratios are medians over the rounds: what else the machine does then
hits all alike. On a CPU, processor time of one thread is measured.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from saq_fx.parameters import parameter_groups
from saq_fx.precision import write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.training import SAQ

STEPS = 8  # per turn: two periods
SETTINGS: dict[str, dict[str, Any]] = {
    "plain QAT": {"losses": "vanilla"},
    "period 4": {"period": 4},
    "period 4, second pass on the hardest half": {"period": 4, "second_pass_fraction": 0.5},
    "period 4, second pass on the hardest third": {"period": 4, "second_pass_fraction": 1 / 3},
    "period 4, second pass on the hardest quarter": {"period": 4, "second_pass_fraction": 0.25},
    "every step": {"period": 1},
}


STEMS = ("cifar", "imagenet")


def resnet18(stem: str, classes: int = 1000) -> nn.Module:
    """torchvision's, as for large images, or with the stem for small ones: 3 x 3, stride 1, no pooling (He et al.)."""
    model = torchvision.models.resnet18(num_classes=classes)
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    return model


def stopwatch(device: torch.device) -> Callable[[], float]:
    """Seconds so far: of the processor on a CPU, of the clock, with all work done, on a GPU."""

    def seconds() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return seconds


def measure(
    device: torch.device, stem: str, batch: int, size: int, rounds: int, lower: bool, compiled: bool
) -> list[dict[str, Any]]:
    """Milliseconds per step, throughput relative to plain QAT in the same round, and on GPUs peak memory."""
    torch.manual_seed(0)
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(1000, (batch,), device=device)
    gm = prepare_saq(resnet18(stem), example_inputs=x.cpu()).to(device).train()
    seconds = stopwatch(device)
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, options in SETTINGS.items():
        module = copy.deepcopy(gm)
        optimizer = SAQ(module, torch.optim.SGD(parameter_groups(module, 1e-4), 0.02, momentum=0.9), **options)
        forward = torch.compile(module) if compiled else module
        context = torch.autocast(device.type, torch.bfloat16) if lower else nullcontext()

        def loss(x: Tensor, y: Tensor, forward: Any = forward, context: Any = context) -> Tensor:
            with context:
                return F.cross_entropy(forward(x), y, reduction="none")

        steps[name] = lambda optimizer=optimizer, loss=loss: optimizer.step(loss, x, y)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in SETTINGS}
    peaks = {}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = seconds()
            for _ in range(STEPS):
                step()
            if turn:  # the first warms up
                times[name].append((seconds() - start) / STEPS)
            peaks[name] = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return [
        {
            "setting": name,
            "ms": 1e3 * statistics.median(each),
            "throughput": statistics.median(a / b for a, b in zip(times["plain QAT"], each, strict=True)),
            "peak_mib": peaks[name],
        }
        for name, each in times.items()
    ]


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--stem", choices=STEMS, default="cifar")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(arguments.device)
    options = arguments.stem, arguments.batch, arguments.size, arguments.rounds, arguments.bf16, arguments.compile
    rows = measure(device, *options)
    table = [(row["setting"], row["ms"], row["throughput"], row["peak_mib"]) for row in rows]
    headers = (f"ResNet-18, {arguments.stem} stem, W4A4", "ms per step", "throughput, plain QAT = 1", "peak MiB")
    floats = ("", ".1f", ".3f", ".0f")
    print(tabulate(table, headers, floatfmt=floats))
    if arguments.out is not None:
        of_gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
        made = {"date": str(date.today()), "torch": torch.__version__, "machine": platform.machine(), "gpu": of_gpu}
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        text = json.dumps({"made": made, "settings": settings, "rows": rows}, indent=1)
        write_whole(arguments.out, f"{text}\n".encode())
        command = f"python tools/bench_training.py {' '.join(sys.argv[1:])}"
        page = tabulate(table, headers, floatfmt=floats, tablefmt="github")
        made_by = f"`{command}` on {made['date']}, torch {made['torch']}, {of_gpu or 'one CPU thread'}."
        write_whole(arguments.out.with_suffix(".md"), f"# Training throughput\n\n{made_by}\n\n{page}\n".encode())


if __name__ == "__main__":
    main()
