"""`saq-fx train`: from names of a model and of data to a trained, quantized model in a folder."""

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from saq_fx.checkpoint import save
from saq_fx.data import accuracy, load_data
from saq_fx.errors import CheckpointError, SaqError
from saq_fx.models import build
from saq_fx.pass_base import Pipeline
from saq_fx.passes.train_saq import TrainSaq
from saq_fx.precision import Policy, write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.report import precision_report
from saq_fx.training_recipe import TrainingRecipe, paper_recipe

_CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Run:
    """What the command line asks for; the fields are its options."""

    model: str
    data: str
    folder: Path
    precision: str
    policy: Path | None
    weights: Path | None
    recipe: TrainingRecipe
    batch: int
    offsets: bool
    mixed_precision: str | None
    workers: int
    seed: int


def recipe_of(paper: str, **changes: Any) -> TrainingRecipe:
    """The default settings, or those of the paper for "NETWORK:BITS", with the changes that are not None.

    Raises:
        SaqError: no such network and bits.
    """
    network, _, bits = paper.partition(":")
    if paper and not bits.isdigit():
        raise SaqError(f"--paper {paper!r} is not NETWORK:BITS, like resnet18:4")
    recipe = paper_recipe(network, int(bits)) if paper else TrainingRecipe()
    return replace(recipe, **{name: value for name, value in changes.items() if value is not None})


def train(run: Run) -> None:
    """Trains and writes `model.safetensors` and `report.txt` to the folder; prints the test accuracy."""
    torch.manual_seed(run.seed)
    model = _model(run)
    training, test = load_data(run.data)
    loading: dict[str, Any] = {"batch_size": run.batch, "num_workers": run.workers}
    order = torch.Generator().manual_seed(run.seed)
    batches: DataLoader[Any] = DataLoader(training, shuffle=True, drop_last=True, generator=order, **loading)
    gm = prepare_saq(
        model,
        example_inputs=_images(DataLoader(training, **loading), _CALIBRATION_IMAGES),
        precision=run.precision if run.policy is None else Policy.load(run.policy),
        recipe=Recipe(activation_offsets=run.offsets),
    )
    teacher = copy.deepcopy(model) if run.recipe.distillation else None
    passes = TrainSaq(
        batches, recipe=run.recipe, teacher=teacher, folder=run.folder, mixed_precision=run.mixed_precision
    )
    Pipeline((passes,)).run(gm)
    if int(os.environ.get("RANK", 0)) == 0:
        save(gm, run.folder / "model.safetensors")
        write_whole(run.folder / "report.txt", f"{precision_report(gm)}\n".encode())
        print(f"\ntest accuracy: {accuracy(gm, DataLoader(test, **loading)):.1f} %")
        print(f"model.safetensors, report.txt, checkpoint.pt and tensorboard/ are in {run.folder}/")


def _model(run: Run) -> nn.Module:
    model = build(run.model)
    if run.weights is not None:
        try:
            model.load_state_dict(torch.load(run.weights, map_location="cpu", weights_only=True))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{run.weights} does not hold the weights of {run.model}: {error}") from error
    return model


def _images(batches: Iterable[tuple[Tensor, Any]], count: int) -> Tensor:
    """The first `count` images, or all there are."""
    images: list[Tensor] = []
    for x, _ in batches:
        images.append(x)
        if sum(map(len, images)) >= count:
            break
    return torch.cat(images)[:count]
