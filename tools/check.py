"""Run every gate and print each with its result and its seconds; what a failed gate printed follows it.

Usage: python tools/check.py
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = ["pytest", "-q", "--tb=short"]
GATES: dict[str, list[str]] = {
    "format": ["ruff", "format", "--check", "."],
    "lint": ["ruff", "check", "."],
    "layers": [*PYTEST, "tests/test_layers.py"],
    "wheel": [*PYTEST, "tests/test_wheel.py"],
    "types": [
        "mypy",
        f"--config-file={ROOT / 'pyproject.toml'}",
        f"--cache-dir={ROOT / '.mypy_cache'}",
        "-p",
        "saq_fx",
    ],
}


def installed_layout(folder: Path) -> Path:
    """Copy the package to `folder` as a wheel lays it out: type checkers know nothing of mapped folders."""
    shutil.copytree(ROOT / "saq_fx", folder / "saq_fx")
    shutil.copytree(ROOT / "passes", folder / "saq_fx" / "passes")
    return folder


def passed(name: str, command: list[str], folder: Path) -> bool:
    """Run one gate in `folder`, print its line, and its output if it failed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    print(f"{name:<8} {'ok' if done.returncode == 0 else 'FAILED':<6} {seconds:6.1f} s", flush=True)
    if done.returncode != 0:
        print(done.stdout + done.stderr, flush=True)
    return done.returncode == 0


def main() -> int:
    """Run all gates, also after a failure; 0 if every one passed."""
    with tempfile.TemporaryDirectory() as folder:
        layout = installed_layout(Path(folder))
        results = [passed(name, command, layout if name == "types" else ROOT) for name, command in GATES.items()]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
