"""The distributions: built as a release is, opened, and compared with the source."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {f"saq_fx/{path.name}" for path in (ROOT / "saq_fx").glob("*.py")}
PASSES = {f"saq_fx/passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the working tree and the wheel built from that sdist."""
    # From a copy: a build writes into its source, and another process of the tests may be building too.
    source, folder = tmp_path_factory.mktemp("source") / "saq_fx", tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist"))
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_wheel_holds_the_package_and_nothing_else(distributions: Path) -> None:
    (wheel,) = distributions.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == MODULES | PASSES | {"saq_fx/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def test_sdist_holds_what_a_build_and_the_tests_need(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tests = {str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py")}
    assert names >= MODULES | tests | {f"passes/{path.name}" for path in (ROOT / "passes").glob("*.py")}
    assert names >= {
        "pyproject.toml",
        "constraints.txt",
        "Makefile",
        "LICENSE",
        "README.md",
        "tools/check.py",
    }
