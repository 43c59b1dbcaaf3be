"""How a quantized network is trained: schedule, optimizer and SAQ's settings; those of the paper by name."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any

from saq_fx.errors import TrainingError


@dataclass(frozen=True)
class TrainingRecipe:
    """Settings of a training run; the defaults are the paper's for ResNets (SAQ, arXiv 2111.12273, Sec. 5), except
    that its batches are cut into chunks of 128.

    Args:
        epochs: passes over the data; the learning rate falls from `lr` to 0 along a cosine.
        batch_size: samples per step of all processes together: for whoever makes the batches.
        optimizer: name of a class of `torch.optim`, the base optimizer; with `optimizer_options`.
        weight_decay: of weights; biases, normalization and clipping levels have none.
        rho, case, period, beta, losses, perturb, adaptive, chunk_size, second_pass_fraction, max_gradient_norm: as for
            `SAQ`.
        distillation: weight, between 0 and 1, of the divergence from the teacher's outputs against the loss.
        temperature: by which outputs are divided for distillation.
        reestimation_batches: batches from which BatchNorm statistics are estimated anew after training.

    Raises:
        TrainingError: a number that makes no sense. SAQ's own settings are checked by `SAQ`.
    """

    epochs: int = 90
    lr: float = 0.02
    batch_size: int = 512
    weight_decay: float = 1e-4
    optimizer: str = "SGD"
    optimizer_options: Mapping[str, Any] = field(default_factory=lambda: {"momentum": 0.9})
    rho: float = 0.3
    case: int = 3
    period: int = 4
    beta: float = 0.7
    losses: str = "both"
    perturb: tuple[str, ...] = ("bias", "norm")
    adaptive: bool = False
    chunk_size: int | None = None
    second_pass_fraction: float = 1.0
    max_gradient_norm: float | None = None
    distillation: float = 0.0
    temperature: float = 1.0
    reestimation_batches: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "reestimation_batches"):
            if not isinstance(getattr(self, name), int):
                raise TrainingError(f"{name} must be a whole number, not {getattr(self, name)!r}")
        for name in ("lr", "temperature", "weight_decay", "distillation"):
            if not (isinstance(getattr(self, name), Real) and math.isfinite(getattr(self, name))):
                raise TrainingError(f"{name} must be a finite number, not {getattr(self, name)!r}")
        for name in ("epochs", "batch_size", "lr", "temperature"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.weight_decay < 0 or self.reestimation_batches < 0:
            raise TrainingError("weight_decay and reestimation_batches cannot be negative")
        if not isinstance(self.optimizer, str):
            raise TrainingError(f"optimizer is the name of a class of torch.optim, not {self.optimizer!r}")
        if not isinstance(self.optimizer_options, Mapping):
            raise TrainingError(f"optimizer_options are a dictionary, not {self.optimizer_options!r}")
        if not 0 <= self.distillation <= 1:
            raise TrainingError(f"distillation is a weight between 0 and 1, not {self.distillation}")

    def saq_options(self) -> dict[str, Any]:
        """The keyword arguments of `SAQ` among the settings."""
        names = ("rho", "case", "period", "beta", "losses", "perturb", "adaptive")
        cuts = ("chunk_size", "second_pass_fraction", "max_gradient_norm")
        return {name: getattr(self, name) for name in names + cuts}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON data."""
        return {**asdict(self), "optimizer_options": dict(self.optimizer_options), "perturb": list(self.perturb)}


_M = 128  # samples per perturbation (m-sharpness), in all of the paper's runs
_RESNET = TrainingRecipe(chunk_size=_M)
# What distillation weighs, and at which temperature, the paper does not say.
_MOBILENET = replace(_RESNET, epochs=140, weight_decay=4e-5, distillation=0.5, temperature=4.0, reestimation_batches=10)
_VIT = replace(_RESNET, epochs=150, batch_size=1024, lr=2e-4, optimizer="AdamW", optimizer_options={}, rho=0.01)

PAPER_RECIPES: dict[tuple[str, int], TrainingRecipe] = {
    ("resnet18", 2): replace(_RESNET, rho=0.30, weight_decay=2.5e-5),
    ("resnet18", 4): replace(_RESNET, rho=0.65),
    ("resnet34", 2): replace(_RESNET, rho=0.65),
    ("resnet34", 4): replace(_RESNET, rho=0.90),
    ("resnet50", 2): replace(_RESNET, rho=0.65),
    ("resnet50", 4): replace(_RESNET, rho=0.95),
    ("mobilenet_v2", 4): replace(_MOBILENET, rho=0.40),
    ("vit_s_32", 4): _VIT,
    ("vit_s_16", 4): _VIT,
    ("vit_b_32", 4): _VIT,
    ("vit_b_16", 4): _VIT,
}
"""The paper's settings on ImageNet, by network and bits (Sec. 5 and Table A)."""

WITH_OFFSETS = ("mobilenet_v2",)
"""Networks that the paper prepares with `Recipe(activation_offsets=True)`."""


def paper_recipe(network: str, bits: int) -> TrainingRecipe:
    """The SAQ paper's settings for a network on ImageNet.

    Args:
        network: resnet18, resnet34, resnet50, mobilenet_v2 (prepare it with `Recipe(activation_offsets=True)`),
            vit_s_32, vit_s_16, vit_b_32 or vit_b_16.
        bits: 2 or 4, of weights and activations; MobileNetV2 and ViTs have 4 only.

    Raises:
        TrainingError: the paper has no such row.
    """
    if (network, bits) not in PAPER_RECIPES:
        known = ", ".join(f"{name} at {width}" for name, width in PAPER_RECIPES)
        raise TrainingError(f"the paper gives no settings for {network!r} at {bits} bits; it has {known}")
    return PAPER_RECIPES[network, bits]
