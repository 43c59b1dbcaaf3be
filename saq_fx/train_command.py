"""`saq-fx train`: from names of a model and of data to a trained, quantized model in a folder."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saq_fx.checkpoint import save
from saq_fx.data import accuracy
from saq_fx.errors import SaqError
from saq_fx.image_task import ImageTask
from saq_fx.passes.train_saq import TrainSaq
from saq_fx.precision import Policy, write_whole
from saq_fx.prepare import prepare_saq
from saq_fx.recipe import Recipe
from saq_fx.report import precision_report
from saq_fx.training_recipe import WITH_OFFSETS, TrainingRecipe, paper_recipe


@dataclass(frozen=True)
class TrainOptions:
    """How the command line asks for it; the fields are its options."""

    folder: Path
    precision: str | None
    policy: Path | None
    paper: str
    changes: dict[str, Any]
    offsets: bool
    mixed_precision: str | None


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


def train(task: ImageTask, options: TrainOptions) -> None:
    """Trains and writes `model.safetensors` and `report.txt` to the folder; prints the test accuracy."""
    settings, folder = settings_of(options.paper), options.folder
    recipe = replace(settings.recipe, **{name: value for name, value in options.changes.items() if value is not None})
    if recipe.distillation and task.weights is None:
        raise SaqError(
            f"--paper {options.paper} distils from the float model, whose weights are missing: give --weights"
        )
    torch.manual_seed(task.seed)
    model = task.network()
    batches = task.batches(recipe.batch_size)
    gm = prepare_saq(
        model,
        example_inputs=task.examples(model),
        precision=Policy.load(options.policy) if options.policy else options.precision or settings.precision,
        recipe=Recipe(activation_offsets=options.offsets or settings.offsets),
    )
    teacher = model if recipe.distillation else None
    TrainSaq(batches, recipe=recipe, teacher=teacher, folder=folder, mixed_precision=options.mixed_precision).run(gm)
    if int(os.environ.get("RANK", 0)) == 0:
        save(gm, folder / "model.safetensors")
        write_whole(folder / "report.txt", f"{precision_report(gm)}\n".encode())
        print(f"\ntest accuracy: {accuracy(gm, task.test_batches()):.1f} %")
        print(f"model.safetensors, report.txt, checkpoint.pt and tensorboard/ are in {folder}/")
