"""A source's images: decoded once and kept where they fit into memory, else read on demand."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ccl_fast.data.images import Images, InMemory, OnDemand
from ccl_fast.data.loading import Batch, load, load_images

if TYPE_CHECKING:
    from ccl_fast.data.source import Source

BATCH = 64
# More than that many processes are more than most disks and training steps keep busy, and each takes memory.
MAX_WORKERS = 8
SLOW = 1.0  # seconds; from here on a terminal shows the progress


def read(
    source: Source,
    rows: Tensor,
    shape: tuple[int, int, int],
    *,
    workers: int | None,
    memory: float,
    verify: bool = False,
) -> tuple[Images, Tensor]:
    """Some images of a source.

    Args:
        source: one that is not strict notes in ``skipped`` what cannot be read.
        rows: int64 [n] on the CPU.
        shape: what the images are brought to.
        workers: processes that read; 0: this one does; None: as many as are to spare, of images that are read on
            demand from what processes can share.
        memory: GiB that the decoded images may take; if they take more, they are read on demand.
        verify: images on demand are all decoded once, to find those that cannot be read; what cannot be read later is
            an error. Else they are replaced then, if the source is not strict.

    Returns:
        The images, and which of the rows they are.

    Raises:
        ArgumentError: an item is no image.
        OSError: a file cannot be read, and the source is strict.
    """
    known = source.classes
    if len(rows) * math.prod(shape) > memory * 2**30:
        if workers is None:
            workers = spare_workers() if source.can_be_shared else 0
        if verify:
            done = [row for batch in _batches(source, rows, shape, workers, "checking") for row in batch.rows]
            rows = torch.tensor(done, dtype=torch.int64, device="cpu")
        of_rows = None if known is None else known[rows]
        return OnDemand(source, rows, shape, of_rows, workers=workers, replace=not verify), rows
    pixels = torch.empty(len(rows), *shape, dtype=torch.uint8, device="cpu")
    done, classes = [], []
    for batch in _batches(source, rows, shape, workers or 0, "reading"):
        pixels[len(done) : len(done) + len(batch.rows)] = batch.pixels
        done += batch.rows
        classes += batch.classes
    kept = torch.tensor(done, dtype=torch.int64, device="cpu")
    of_kept = None if None in classes else torch.tensor(classes, dtype=torch.int64, device="cpu")
    # A copy where images are missing: the memory of the rest is given back.
    return InMemory(pixels if len(kept) == len(pixels) else pixels[: len(kept)].clone(), of_kept), kept


def spare_workers() -> int:
    """Return how many processes can read ahead for each of torchrun's on this machine: its CPUs but one, at most 8."""
    cpus = len(os.sched_getaffinity(0))  # which it may use, of those that there are
    return min(MAX_WORKERS, max(0, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def read_classes(source: Source, *, workers: int) -> Tensor | None:
    """Classes of all items, int64 [n] on the CPU, if need be by reading every one of them; None: there are none."""
    if source.classes is not None or not source.labelled:
        return source.classes
    classes = []
    with progress_bar(len(source)) as bar:
        for batch in load(
            _Classes(source), torch.arange(len(source), device="cpu").split(BATCH), list, workers=workers
        ):
            for item in batch:
                if isinstance(item, Exception):
                    raise item
                classes.append(item)
            bar.update(len(batch))
    return None if None in classes else torch.tensor(classes, dtype=torch.int64, device="cpu")


def limited(rows: Tensor, limit: int | None, seed: int) -> Tensor:
    """At most ``limit`` of the rows, drawn at random, in their order."""
    if limit is None or len(rows) <= limit:
        return rows
    return rows[
        torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed), device="cpu")[:limit].sort().values
    ]


def progress_bar(n: int, what: str = "reading") -> tqdm:
    """A bar, where there is a terminal and it takes long."""
    return tqdm(total=n, desc=what, unit=" images", leave=False, disable=None, delay=SLOW)


def _batches(source: Source, rows: Tensor, shape: tuple[int, int, int], workers: int, what: str) -> Iterator[Batch]:
    """All rows; what cannot be read is raised, or noted."""
    with progress_bar(len(rows), what) as bar:
        for batch in load_images(source, rows.split(BATCH), shape, workers=workers):
            for error in batch.errors:
                source.skip(error)
            yield batch
            bar.update(len(batch.rows) + len(batch.errors))


class _Classes(Dataset):
    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, i: int) -> int | None:
        return self.source[i][1]
