"""Data sets of images: those of torchvision, from files at hand, and scikit-learn's digits, which are always there."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from saq_fx.errors import MissingExtraError, SaqError

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours


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


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images classified rightly, in percent; leaves the model in evaluation mode."""
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), None)
    hits, images = 0, 0
    with torch.no_grad():
        for x, y in batches:
            hits += int((model(x.to(device)).argmax(1).cpu() == y).sum())
            images += len(y)
    return 100.0 * hits / images


def load_data(name: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """A data set for classification, by name: "digits", or "NAME:FOLDER" of files that lie in FOLDER.

    Names are cifar10, cifar100, flowers102 and pets, in the layout that torchvision expects, and imagenet for any
    FOLDER/train and FOLDER/val with a folder of images per class. Nothing is downloaded. Training images are cropped
    and flipped at random, without stronger augmentation (SAQ, Appendix A).

    Returns:
        (training, test): of (image, class); images are 3 x 224 x 224, of CIFAR 3 x 32 x 32, of digits 1 x 8 x 8.

    Raises:
        SaqError: an unknown name, or files that are not there.
        MissingExtraError: torchvision, or for digits scikit-learn, is not installed.
    """
    kind, _, folder = name.partition(":")
    if name == "digits":
        training, test = digits()
        return TensorDataset(training.x, training.y), TensorDataset(test.x, test.y)
    loaders = {"cifar10": _cifar, "cifar100": _cifar, "imagenet": _image_folders, "flowers102": _flowers, "pets": _pets}
    if kind not in loaders or not folder:
        raise SaqError(f"unknown data {name!r}: use digits, or NAME:FOLDER with NAME one of {', '.join(loaders)}")
    try:
        import torchvision
    except ImportError as error:
        raise MissingExtraError(f"{kind} needs torchvision: pip install 'saq_fx[vision]'") from error
    try:
        return loaders[kind](torchvision, kind, Path(folder))
    except (RuntimeError, FileNotFoundError) as error:
        cause = str(error).partition(" You can use download")[0]  # which nothing here offers
        raise SaqError(f"{kind} is not whole in {folder}: {cause}") from error


Splits = tuple[Dataset[Any], Dataset[Any]]


def _cifar(torchvision: Any, kind: str, folder: Path) -> Splits:
    made, transforms = getattr(torchvision.datasets, kind.upper()), torchvision.transforms
    crop = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()]
    return (
        made(folder, train=True, transform=_pipeline(transforms, crop)),
        made(folder, train=False, transform=_pipeline(transforms, [])),
    )


def _image_folders(torchvision: Any, _: str, folder: Path) -> Splits:
    made = torchvision.datasets.ImageFolder
    training, test = _large(torchvision.transforms)
    splits = made(folder / "train", transform=training), made(folder / "val", transform=test)
    if splits[0].classes != splits[1].classes:
        other = sorted(set(splits[0].classes) ^ set(splits[1].classes))
        raise SaqError(f"{folder}/train and {folder}/val differ in the classes {', '.join(other[:5])}")
    return splits


def _flowers(torchvision: Any, _: str, folder: Path) -> Splits:
    made = torchvision.datasets.Flowers102
    training, test = _large(torchvision.transforms)
    return made(folder, split="train", transform=training), made(folder, split="test", transform=test)


def _pets(torchvision: Any, _: str, folder: Path) -> Splits:
    made = torchvision.datasets.OxfordIIITPet
    training, test = _large(torchvision.transforms)
    return made(folder, split="trainval", transform=training), made(folder, split="test", transform=test)


def _large(transforms: Any) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Of training and of test images of any size."""
    crop = [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()]
    return _pipeline(transforms, crop), _pipeline(transforms, [transforms.Resize(256), transforms.CenterCrop(224)])


def _pipeline(transforms: Any, steps: list[Any]) -> Callable[[Any], Tensor]:
    composed: Callable[[Any], Tensor] = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(_MEAN, _DEVIATION)]
    )
    return composed
