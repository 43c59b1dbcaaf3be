"""Data sets, read from small files in the layout of the real ones."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image

from saq_fx.data import digits, load_data
from saq_fx.errors import SaqError


def colours(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def checksum(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, label: str, made: Any) -> None:
    """Pickled batches of flat pixels, with the checksums that torchvision compares."""
    base = folder / made.base_folder
    base.mkdir()
    for attribute, files in (("train_list", made.train_list), ("test_list", made.test_list)):
        written = []
        for index, (file, _) in enumerate(files):
            pixels = numpy.random.default_rng(index).integers(0, 256, (3, 3072), dtype=numpy.uint8)
            (base / file).write_bytes(pickle.dumps({"data": pixels, label: [0, 1, 2]}))
            written.append([file, checksum(base / file)])
        monkeypatch.setattr(made, attribute, written)
    meta = base / made.meta["filename"]
    meta.write_bytes(pickle.dumps({made.meta["key"]: ["a", "b", "c"]}))
    monkeypatch.setattr(made, "meta", {**made.meta, "md5": checksum(meta)})


@pytest.mark.parametrize(
    ("name", "label", "made", "count"),
    [
        ("cifar10", "labels", torchvision.datasets.CIFAR10, 15),
        ("cifar100", "fine_labels", torchvision.datasets.CIFAR100, 3),
    ],
)
def test_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, label: str, made: Any, count: int) -> None:
    write_cifar(tmp_path, monkeypatch, name, label, made)
    training, test = load_data(f"{name}:{tmp_path}")
    assert (len(training), len(test)) == (count, 3)  # type: ignore[arg-type]
    image, target = test[1]
    assert target == 1
    pixels = numpy.random.default_rng(0).integers(0, 256, (3, 3072), dtype=numpy.uint8)[1].reshape(3, 32, 32)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(image, (torch.from_numpy(pixels) / 255 - mean) / deviation)
    assert training[0][0].shape == (3, 32, 32)


def test_image_folders(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2)):
        for target in ("n01440764", "n01443537"):
            (tmp_path / split / target).mkdir(parents=True)
            for index in range(count):
                colours(index, (300, 280)).save(tmp_path / split / target / f"{index}.JPEG")
    training, test = load_data(f"imagenet:{tmp_path}")
    assert (len(training), len(test)) == (6, 4)  # type: ignore[arg-type]
    assert [target for _, target in test] == [0, 0, 1, 1]  # type: ignore[attr-defined]
    assert training[0][0].shape == test[0][0].shape == (3, 224, 224)
    torch.manual_seed(0)
    first = training[0][0]
    assert not torch.equal(first, training[0][0]), "training images are cropped at random"
    assert torch.equal(test[0][0], test[0][0])


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    for name in ("train/a", "train/b", "val/b", "val/c"):
        (tmp_path / name).mkdir(parents=True)
        colours(0).save(tmp_path / name / "0.png")
    with pytest.raises(SaqError, match=r"train and .*/val differ in the classes a, c"):
        load_data(f"imagenet:{tmp_path}")


def test_flowers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "flowers-102"
    (base / "jpg").mkdir(parents=True)
    for index in range(1, 7):
        colours(index).save(base / "jpg" / f"image_{index:05d}.jpg")
    scipy.io.savemat(base / "imagelabels.mat", {"labels": numpy.array([[1, 2, 3, 1, 2, 102]])})
    scipy.io.savemat(base / "setid.mat", {"trnid": [[1, 2]], "valid": [[3]], "tstid": [[4, 5, 6]]})
    made = torchvision.datasets.Flowers102
    files = {key: (file, checksum(base / file)) for key, (file, _) in made._file_dict.items() if key != "image"}
    monkeypatch.setattr(made, "_file_dict", files)
    training, test = load_data(f"flowers102:{tmp_path}")
    assert [training[index][1] for index in range(2)] == [0, 1]
    assert [test[index][1] for index in range(3)] == [0, 1, 101]
    assert test[0][0].shape == (3, 224, 224)


def test_pets(tmp_path: Path) -> None:
    base = tmp_path / "oxford-iiit-pet"
    (base / "images").mkdir(parents=True)
    (base / "annotations").mkdir()
    names = {"trainval": [("Abyssinian_1", 1), ("beagle_2", 5)], "test": [("pug_3", 37)]}
    for split, rows in names.items():
        lines = [f"{name} {target} 1 1" for name, target in rows]
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines) + "\n")
        for index, (name, _) in enumerate(rows):
            colours(index).save(base / "images" / f"{name}.jpg")
    training, test = load_data(f"pets:{tmp_path}")
    assert [training[index][1] for index in range(2)] == [0, 4]
    assert test[0][1] == 36
    assert training[0][0].shape == (3, 224, 224)


def test_digits_are_there() -> None:
    training, test = load_data("digits")
    assert (len(training), len(test)) == (1000, 797)  # type: ignore[arg-type]
    assert torch.equal(training[3][0], digits()[0].x[3])


@pytest.mark.parametrize("name", ["mnist:there", "cifar10", "voc"])
def test_unknown_data_is_named(name: str) -> None:
    with pytest.raises(SaqError, match=f"unknown data '{name}': use digits, or NAME:FOLDER"):
        load_data(name)


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "flowers102", "pets"])
def test_missing_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SaqError, match=f"{name} is not whole in "):
        load_data(f"{name}:{tmp_path}")
