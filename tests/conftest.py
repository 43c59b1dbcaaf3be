"""What every test stands on: one thread, seeded random numbers, hypothesis without chance or deadlines."""

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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
