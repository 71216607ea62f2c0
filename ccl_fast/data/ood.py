"""OOD sets: held-out classes, synthetic images, other data sets, folders."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ccl_fast.checks import check_count
from ccl_fast.data.catalog import folded, names
from ccl_fast.data.checks import check_loading
from ccl_fast.data.folder import report_skipped
from ccl_fast.data.opening import is_folder, open_test
from ccl_fast.data.options import MAX_PIXELS
from ccl_fast.data.reading import limited, read
from ccl_fast.data.synthetic import make, synthetic_names
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from ccl_fast.data.images import Images
    from ccl_fast.data.split import Split

HELD_OUT = "held-out"


def load_ood(
    sets: Sequence[str | Path] | Mapping[str, str | Path | Dataset],
    split: Split,
    *,
    argument: str = "ood",
    root: str | Path = "data",
    limit: int | None = None,
    seed: int = 0,
    download: bool = False,
    strict: bool = False,
    workers: int | None = 0,
    memory: float = 4.0,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Images]:
    """OOD images for a split, brought to the shape of its images.

    Args:
        sets: "held-out", the split's held-out classes; names of synthetic sets (``synthetic_names``); names of data
            sets, whose test part is taken, or all of it if it has none; folders, of which all images are taken. Or any
            of these, or data sets, by a name of their own.
        split: what the images are OOD to.
        argument: how errors call ``sets``.
        root: the folder that torchvision's data sets are in.
        limit: at most that many images of each set, drawn at random.
        seed: of the synthetic sets and of the limit.
        download: fetch what is missing, if torchvision can.
        strict: a file of a folder that cannot be read is an error; else it is skipped, or, of images on demand,
            replaced, as in ``load_split``.
        workers: processes that read; 0: this one does; None: as `load_split` says.
        memory: GiB that the decoded images of a set may take; if they take more, they are read on demand.
        max_pixels: a file of more pixels than that counts as one that cannot be read: a small file can hold gigabytes.

    Returns:
        The sets, in the order of ``sets``, by their names as they were given. Those kept in memory are on the CPU,
        but for the held-out classes, which are where the split is.

    Raises:
        ArgumentError: naming the argument, what was expected and what came.
        FileNotFoundError: a set is not there.
        OSError: a file cannot be read, or a download failed.
    """
    check_loading(seed=seed, workers=workers, memory=memory, limit=limit, strict=strict, download=download)
    check_count("max_pixels", max_pixels)
    loaded = {}
    for name, data in _by_name(sets, argument).items():
        given = canonical(data) if isinstance(data, str) else None
        if given == HELD_OUT:
            images = _held_out(split, argument)
            rows = torch.arange(len(images), device="cpu")
            loaded[name] = images if limit is None else images.subset(limited(rows, limit, seed))
        elif given in synthetic_names:
            loaded[name] = make(given, split, argument, seed=seed, limit=limit)
        else:
            source = open_test(
                data,
                argument,
                root=root,
                download=download,
                strict=strict,
                workers=workers or 0,
                max_pixels=max_pixels,
                also=(HELD_OUT, *synthetic_names),
            )
            rows = limited(torch.arange(len(source), device="cpu"), limit, seed)
            loaded[name], _ = read(source, rows, split.train.shape, workers=workers, memory=memory)
            report_skipped(source)
            if not len(loaded[name]):
                raise ArgumentError(f"{argument}: expected images in {name}, got none that can be read")
    return loaded


def canonical(name: str | Path) -> str:
    """The name of an OOD set as it is compared: two names of one set have the same.

    "held-out", and the names of synthetic sets and of data sets, in any spelling that ``load_ood`` takes, as it looks
    them up; folders by their resolved path; another name as it is.
    """
    if isinstance(name, str):
        known = {folded(HELD_OUT): HELD_OUT} | {known: known for known in (*synthetic_names, *names())}
        if folded(name) in known:
            return known[folded(name)]
        if not is_folder(name):
            return name
    return os.path.realpath(os.path.expanduser(name))


def located(data: Any, *, is_ood: bool) -> Any:
    """The same in every working directory: of what is a folder the whole path, all else as it is.

    Args:
        data: as for ``load_ood``, or as for ``load_split``.
        is_ood: it is an OOD set, which may be held-out or a synthetic one.
    """
    known = {folded(HELD_OUT), *synthetic_names, *names()} if is_ood else set(names())
    if not isinstance(data, str | Path) or (isinstance(data, str) and (folded(data) in known or not is_folder(data))):
        return data
    return os.path.abspath(os.path.expanduser(data))


def _by_name(sets: Sequence[str | Path] | Mapping[str, str | Path | Dataset], argument: str) -> dict:
    if isinstance(sets, Mapping):
        _check_different([data for data in sets.values() if isinstance(data, str | Path)], argument)
        return dict(sets)
    if isinstance(sets, str) or not isinstance(sets, Sequence) or not all(isinstance(s, str | Path) for s in sets):
        raise ArgumentError(f"{argument}: expected a list of names and folders, or data sets by name, got {sets!r}")
    _check_different(sets, argument)
    return {str(s): s for s in sets}


def _check_different(sets: Sequence[str | Path], argument: str) -> None:
    spelt, by_canonical = set(), {}
    for data in sets:
        name = str(data)
        first = by_canonical.setdefault(canonical(data), name)
        if first != name:
            raise ArgumentError(f"{argument}: expected different sets, got {first!r} and {name!r}, which are the same")
        if name in spelt:
            raise ArgumentError(f"{argument}: expected different sets, got {name!r} twice")
        spelt.add(name)


def _held_out(split: Split, argument: str) -> Images:
    if split.held_out is None:
        raise ArgumentError(f"{argument}: expected no {HELD_OUT!r}, for no class of {split.name} is held out")
    return split.held_out
