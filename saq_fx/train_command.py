"""`saq-fx train`: from names of a model and of data to a trained, quantized model in a folder."""

import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from saq_fx.checkpoint import save
from saq_fx.data import accuracy, load_data
from saq_fx.errors import CheckpointError, SaqError
from saq_fx.models import build
from saq_fx.passes.train_saq import TrainSaq
from saq_fx.precision import Policy, write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.report import precision_report
from saq_fx.shapes import evaluating
from saq_fx.training_recipe import WITH_OFFSETS, TrainingRecipe, paper_recipe

_CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Run:
    """What the command line asks for; the fields are its options."""

    model: str
    data: str
    folder: Path
    precision: str | None
    policy: Path | None
    weights: Path | None
    paper: str
    changes: dict[str, Any]
    offsets: bool
    mixed_precision: str | None
    workers: int
    seed: int


@dataclass(frozen=True)
class Settings:
    """How a network is quantized and trained."""

    recipe: TrainingRecipe
    precision: str
    offsets: bool


def settings_of(paper: str) -> Settings:
    """The default settings, or those of the paper for "NETWORK:BITS".

    Raises:
        SaqError: no such network and bits.
    """
    if not paper:
        return Settings(TrainingRecipe(batch_size=64), "W4A4", False)
    network, _, bits = paper.partition(":")
    if not bits.isdigit():
        raise SaqError(f"--paper {paper!r} is not NETWORK:BITS, like resnet18:4")
    return Settings(paper_recipe(network, int(bits)), f"W{bits}A{bits}", network in WITH_OFFSETS)


def train(run: Run) -> None:
    """Trains and writes `model.safetensors` and `report.txt` to the folder; prints the test accuracy."""
    settings = settings_of(run.paper)
    recipe = replace(settings.recipe, **{name: value for name, value in run.changes.items() if value is not None})
    if recipe.distillation and run.weights is None:
        raise SaqError(f"--paper {run.paper} distils from the float model, whose weights are missing: give --weights")
    torch.manual_seed(run.seed)
    model = _model(run)
    training, test = load_data(run.data)
    batches = _loader(training, recipe, run)
    images, labels = _some_images(training, run)
    _check_classes(model, images, labels, run)
    gm = prepare_saq(
        model,
        example_inputs=images,
        precision=Policy.load(run.policy) if run.policy is not None else run.precision or settings.precision,
        recipe=Recipe(activation_offsets=run.offsets or settings.offsets),
    )
    teacher = model if recipe.distillation else None
    TrainSaq(batches, recipe=recipe, teacher=teacher, folder=run.folder, mixed_precision=run.mixed_precision).run(gm)
    if int(os.environ.get("RANK", 0)) == 0:
        save(gm, run.folder / "model.safetensors")
        write_whole(run.folder / "report.txt", f"{precision_report(gm)}\n".encode())
        print(f"\ntest accuracy: {accuracy(gm, DataLoader(test, 256, num_workers=run.workers)):.1f} %")
        print(f"model.safetensors, report.txt, checkpoint.pt and tensorboard/ are in {run.folder}/")


def _loader(data: Dataset[Any], recipe: TrainingRecipe, run: Run) -> DataLoader[Any]:
    """Batches in random order, for each process its share of what a step takes."""
    size = max(1, recipe.batch_size // int(os.environ.get("WORLD_SIZE", 1)))
    order = torch.Generator().manual_seed(run.seed)
    return DataLoader(data, size, shuffle=True, drop_last=True, generator=order, num_workers=run.workers)


def _model(run: Run) -> nn.Module:
    model = build(run.model)
    if run.weights is not None:
        try:
            model.load_state_dict(torch.load(run.weights, map_location="cpu", weights_only=True))
        except (RuntimeError, OSError, EOFError, TypeError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{run.weights} does not hold the weights of {run.model}: {error}") from error
    return model


def _check_classes(model: nn.Module, images: Tensor, labels: Tensor, run: Run) -> None:
    try:
        with evaluating(model):
            outputs = model(images[:1])
    except RuntimeError as error:
        raise SaqError(
            f"{run.model} does not take the images of {run.data}, {tuple(images[:1].shape)}: {error}"
        ) from error
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] <= int(labels.max()):
        given = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise SaqError(
            f"{run.model} gives {given} for one image of {run.data}, whose labels go up to {int(labels.max())} at "
            "least: a classifier gives (1, classes); write a FACTORY that makes one with as many classes"
        )


def _some_images(data: Dataset[Any], run: Run) -> tuple[Tensor, Tensor]:
    """Training images and labels drawn at random, to set clipping levels from: data may be sorted by class."""
    order = torch.Generator().manual_seed(run.seed)
    size = min(_CALIBRATION_IMAGES, len(data))  # type: ignore[arg-type]
    images, labels = next(iter(DataLoader(data, size, shuffle=True, generator=order, num_workers=run.workers)))
    return images, labels
