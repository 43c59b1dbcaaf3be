"""What every test stands on: one thread, seeded random numbers, hypothesis without chance or deadlines."""

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)

hypothesis.settings.register_profile("saq_fx", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("saq_fx")


class TorchRandom:
    """Torch's generator as hypothesis wants it: seeded before each example, restored after the last."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # hypothesis keeps a weak reference only
hypothesis.register_random(TORCH_RANDOM)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Start every test from the same torch generator, whichever tests ran before it."""
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--regenerate` writes the golden files anew."""
    parser.addoption("--regenerate", action="store_true", help="write tests/golden anew instead of comparing with it")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compares a text with the golden file of a name; with `--regenerate` it writes the file."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--regenerate"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text(), f"{path.name} differs; if that is meant, run pytest with --regenerate"

    return check


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
