"""Data sets: scikit-learn's bundled digits, the real data that is always there."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from saq_fx.errors import MissingExtraError, SaqError


@dataclass(frozen=True)
class Images:
    """Images and their labels, in memory.

    `x`: (images, channels, height, width), float; `y`: (images,), class indices.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Mini-batches of `size` images: shuffled, and without an incomplete last one, if a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        end = len(self) if generator is None else max(len(self) - len(self) % size, min(size, len(self)))
        for start in range(0, end, size):
            index = order[start : start + size]
            yield self.x[index], self.y[index]


def digits(training_images: int = 1000) -> tuple[Images, Images]:
    """Handwritten digits (UCI, bundled with scikit-learn): 1797 images of 1 x 8 x 8, ten classes.

    Returns:
        (training, test): a fixed split; the first `training_images` of a fixed shuffle, and all that remain after
        the first 1000. Pixels are standardised.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        SaqError: more training images asked for than the 1000 there are.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtraError("the digits need scikit-learn: pip install 'saq_fx[demo]'") from error
    if not 1 <= training_images <= 1000:
        raise SaqError(f"{training_images} training images asked for: there are 1 to 1000")
    bunch = load_digits()
    x = (torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) - 4.9) / 6.0
    y = torch.tensor(bunch.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    training, test = order[:training_images], order[1000:]
    return Images(x[training], y[training]), Images(x[test], y[test])
