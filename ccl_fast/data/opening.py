"""What an argument for data means: the name of a data set, a folder of images, or a data set itself."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ccl_fast.data.catalog import DIGITS, folded, names, open_by_name
from ccl_fast.data.folder import open_folders, split_folders
from ccl_fast.data.source import Source
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

# Of the digits some are held out unless it is said otherwise: without a download there is nothing else so near.
DIGITS_IN_CLASSES = (0, 1, 2, 3, 4, 5)


class Opened(NamedTuple):
    """Data that can be read.

    Attributes:
        name: what to call it.
        train: the part to train on.
        test: the part to test on; None: it has none, and ``train`` is all of it.
        in_classes: what is trained on by default; None: all classes.
    """

    name: str
    train: Source
    test: Source | None
    in_classes: tuple[int, ...] | None = None


def open_parts(
    data: str | Path | Dataset | tuple[Dataset, Dataset],
    argument: str,
    *,
    root: str | Path,
    download: bool,
    strict: bool,
    workers: int,
    max_pixels: int,
) -> Opened:
    """Data in its parts; as ``load_split`` says."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise ArgumentError(f"{argument}: expected a pair (to train on, to test on), got {len(data)} data sets")
        train, test = (Source(part, argument) for part in data)
        return Opened(type(data[0]).__name__, train, test)
    place = _place(data, argument)
    if isinstance(place, str):
        train, test = (open_by_name(place, p, argument, root=root, download=download) for p in ("train", "test"))
        assert train is not None  # every set has a part to train on
        return Opened(place, train, test, DIGITS_IN_CLASSES if place == DIGITS else None)
    if isinstance(place, Path):
        train, *test = open_folders(
            split_folders(place), argument, strict=strict, workers=workers, max_pixels=max_pixels
        )
        return Opened(place.absolute().name, train, test[0] if test else None)
    return Opened(type(place).__name__, Source(place, argument), None)


def open_test(
    data: str | Path | Dataset,
    argument: str,
    *,
    root: str | Path,
    download: bool,
    strict: bool,
    workers: int,
    max_pixels: int,
    also: Sequence[str] = (),
) -> Source:
    """The part to test on of a named data set that has one; else all of the data. ``also``: names to suggest."""
    place = _place(data, argument, also)
    if isinstance(place, str):
        parts = (open_by_name(place, part, argument, root=root, download=download) for part in ("test", "train"))
        return next(part for part in parts if part is not None)
    if isinstance(place, Path):
        return open_folders([place], argument, strict=strict, workers=workers, max_pixels=max_pixels)[0]
    return Source(place, argument)


def is_folder(data: str) -> bool:
    """Whether what is no name of a data set is a folder: it is spelt like a path, or is there."""
    return bool({os.sep, os.altsep} & set(data)) or os.path.isdir(os.path.expanduser(data))


def _place(data: str | Path | Dataset, argument: str, also: Sequence[str] = ()) -> str | Path | Dataset:
    """The canonical name of a data set, the path of a folder, or the data set that it is."""
    if not isinstance(data, str):
        return data
    if folded(data) in names():
        return folded(data)
    if is_folder(data):
        return Path(data)
    known = [*also, *names()]
    folders = [entry.name for entry in os.scandir(".") if entry.is_dir()]
    close = difflib.get_close_matches(data, [*known, *folders]) or difflib.get_close_matches(data.lower(), known)
    raise ArgumentError(
        f"{argument}: expected the name of a data set ("
        + (f"did you mean {' or '.join(close)}?" if close else ", ".join(known))
        + f") or a folder that is there (in {os.getcwd()}), got {data!r}"
    )
