"""What the commands that train work on: a classifier and a data set of images, by their names."""

import os
import pickle
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from saq_fx.data import load_data
from saq_fx.errors import CheckpointError, SaqError
from saq_fx.models import build
from saq_fx.shapes import evaluating

_CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class ImageTask:
    """A model and data as the command line names them; the fields are its options."""

    model: str
    data: str
    weights: Path | None
    workers: int
    seed: int

    @cached_property
    def splits(self) -> tuple[Dataset[Any], Dataset[Any]]:
        """Training and test images."""
        return load_data(self.data)

    def network(self) -> nn.Module:
        """The model, with the weights of its file.

        Raises:
            CheckpointError: the file does not hold them.
        """
        model = build(self.model)
        if self.weights is not None:
            try:
                model.load_state_dict(torch.load(self.weights, map_location="cpu", weights_only=True))
            except (RuntimeError, OSError, EOFError, TypeError, pickle.UnpicklingError) as error:
                raise CheckpointError(f"{self.weights} does not hold the weights of {self.model}: {error}") from error
        return model

    def batches(self, size: int) -> DataLoader[Any]:
        """Batches in random order, for each process its share of the `size` images of a step."""
        size = max(1, size // int(os.environ.get("WORLD_SIZE", 1)))
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self.splits[0], size, shuffle=True, drop_last=True, generator=order, num_workers=self.workers)

    def test_batches(self) -> DataLoader[Any]:
        """The test images."""
        return DataLoader(self.splits[1], 256, num_workers=self.workers)

    def examples(self, model: nn.Module) -> Tensor:
        """Training images drawn at random, to set clipping levels from: data may be sorted by class.

        Raises:
            SaqError: the model does not take them, or does not tell as many classes apart.
        """
        order = torch.Generator().manual_seed(self.seed)
        size = min(_CALIBRATION_IMAGES, len(self.splits[0]))  # type: ignore[arg-type]
        loader = DataLoader(self.splits[0], size, shuffle=True, generator=order, num_workers=self.workers)
        images, labels = next(iter(loader))
        self._check_classes(model, images[:1], int(labels.max()))
        found: Tensor = images
        return found

    def _check_classes(self, model: nn.Module, image: Tensor, last_class: int) -> None:
        try:
            with evaluating(model):
                outputs = model(image)
        except RuntimeError as error:
            raise SaqError(
                f"{self.model} does not take the images of {self.data}, {tuple(image.shape)}: {error}"
            ) from error
        if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] <= last_class:
            given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise SaqError(
                f"{self.model} gives {given} for one image of {self.data}, whose labels go up to {last_class} at "
                "least: a classifier gives (1, classes); write a FACTORY that makes one with as many classes"
            )
