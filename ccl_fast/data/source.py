"""Where images come from: a map-style data set of anything, as pixels and classes, with errors that say where."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from ccl_fast.data.pixels import shape_of, to_pixels
from ccl_fast.errors import ArgumentError

ITEMS = "PIL images, numpy arrays HWC or tensors CHW (uint8, or floating point in [0, 1]), alone or before a class"
# Under these names torchvision's data sets keep the class of every item, alone or behind its path.
ATTRIBUTES = ("targets", "labels", "_labels", "y", "samples", "_samples")
N_SAMPLED = 100


class Sampled(NamedTuple):
    """What is known of item ``i``: its own shape and its class."""

    i: int
    shape: tuple[int, int, int]
    c: int | None


class Source(Dataset):
    """Item i as ``(pixels, class)``: uint8 [1 or 3, h, w] at its own size, and int or None.

    Args:
        items: map-style; an item is an image that ``to_pixels`` takes, or a tuple of it, its class and whatever.
        argument: how errors call it.

    Attributes:
        can_be_shared: processes may read it unasked; of anybody's data set nobody knows, as it may hold an open file.
        skipped: why images were left out; only a folder's are.
    """

    can_be_shared = False

    def __init__(self, items: Dataset, argument: str):
        if isinstance(items, IterableDataset) or not (hasattr(items, "__getitem__") and hasattr(items, "__len__")):
            raise ArgumentError(
                f"{argument}: expected a map-style data set, with __getitem__ and __len__, got {type(items).__name__}"
            )
        self.items: Any = items  # anybody's
        if not len(self.items):
            raise ArgumentError(f"{argument}: expected a data set with images, got an empty one")
        self.argument = argument
        self.skipped: list[Exception] = []

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> tuple[Tensor, int | None]:
        try:
            item = self.items[i]
            image, *rest = item if isinstance(item, tuple | list) else (item,)
            return to_pixels(image), class_of(rest[0]) if rest else None
        except Exception as error:  # the data set may be anybody's
            raise self.failure(i, reason(error)) from error

    def failure(self, i: int, reason: str) -> Exception:
        """What is raised when item i is no image. It goes from process to process: its text is all it has."""
        return ArgumentError(f"{self.argument}: expected items that are {ITEMS}; got, as item {i}, {reason}")

    def skip(self, error: Exception) -> None:
        """An image could not be read: raise that, or note it."""
        raise error

    def missed(self, i: int, error: Exception) -> None:
        """Item i could not be read when it was needed: raise that, or say so, for another image takes its place."""
        raise error

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(1 or 3, h, w) of the sampled items, the first item's first."""
        return [item.shape for item in self.sample]

    @property
    def labelled(self) -> bool:
        """Whether all sampled items have a class."""
        return all(item.c is not None for item in self.sample)

    @property
    def class_names(self) -> list[str] | None:
        """What classes 0, 1, ... are called, where the data set tells as torchvision's do; of synonyms the first."""
        names = getattr(self.items, "classes", None)
        if not isinstance(names, Sequence) or isinstance(names, str):
            return None
        firsts = [name[0] if isinstance(name, tuple) and name else name for name in names]
        found = [name for name in firsts if isinstance(name, str)]
        return found if len(found) == len(names) else None

    @functools.cached_property
    def classes(self) -> Tensor | None:
        """int64 [n], if an attribute of the data set tells them and is right about the sampled items."""
        for name in ATTRIBUTES:
            classes = _classes(getattr(self.items, name, None), len(self))
            if classes is not None and all(classes[item.i] == item.c for item in self.sample):
                return classes
        return None

    @functools.cached_property
    def sample(self) -> list[Sampled]:
        """Items spread over the whole set, the first one among them."""
        rows = torch.linspace(0, len(self) - 1, min(len(self), N_SAMPLED), dtype=torch.float64, device="cpu").long()
        return [Sampled(i, shape_of(pixels), c) for i, (pixels, c) in ((i, self[i]) for i in rows.tolist())]


def class_of(label) -> int | None:
    """The class index in an integer of any kind; None: the label is something else."""
    if isinstance(label, Tensor | np.ndarray) and len(label.reshape(-1)) == 1:
        label = label.item()
    return int(label) if isinstance(label, Integral) else None


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    line = (str(error).splitlines() or [""])[0]
    return line if type(error) is ValueError and line else f"{type(error).__name__}: {line}".removesuffix(": ")


def _classes(values, n: int) -> Tensor | None:
    if not isinstance(values, Tensor | np.ndarray | Sequence) or len(values) != n:
        return None
    if isinstance(values, Tensor | np.ndarray):
        values = values.tolist()
    classes = [class_of(v[1] if isinstance(v, tuple) and len(v) == 2 else v) for v in values]
    return None if None in classes else torch.tensor(classes, dtype=torch.int64, device="cpu")
