"""The examples run as they stand, and the public names are documented."""

import inspect
import runpy
from pathlib import Path

import pytest

import saq_fx

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(path), run_name="__main__")
    assert "BitOps" in capsys.readouterr().out


@pytest.mark.parametrize("name", saq_fx.__all__)
def test_public_names_are_documented(name: str) -> None:
    public = getattr(saq_fx, name)
    assert inspect.getdoc(public)
    if inspect.isclass(public):
        methods = [each for each in vars(public).values() if inspect.isfunction(each) and each.__name__[0] != "_"]
        assert all(inspect.getdoc(method) for method in methods), name
