"""Batches of a source's images, read by processes or by this one; what cannot be read comes as a value."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ccl_fast.data.pixels import fit
from ccl_fast.errors import ArgumentError, ReaderError, first_line

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from ccl_fast.data.source import Source

# Seconds in which a process must have read a batch.
TIMEOUT = 600


class Batch(NamedTuple):
    """What could be read of a batch, and why the rest could not, in order.

    Of what could: rows and classes, pixels uint8 [b, c, h, w], and where in the batch they were asked for.
    """

    rows: list[int]
    pixels: Tensor
    classes: list[int | None]
    positions: list[int]
    errors: list[Exception]


def load_images(
    source: Source,
    batches: Sequence[Tensor],
    shape: tuple[int, int, int],
    *,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Batches of a source's rows, int64 on the CPU, brought to a shape, by processes that read ahead."""
    dataset = _Fitted(source, shape)
    return load(dataset, batches, dataset.collate, workers=workers, pin_memory=pin_memory)


def load(
    dataset: Dataset, batches: Sequence[Tensor], collate: Callable, *, workers: int = 0, pin_memory: bool = False
) -> Iterator:
    """Yield ``collate`` of each batch's items, in order. An item that raises OSError or ArgumentError is that error.

    Raises:
        ReaderError: a process has ended, or has not read a batch in ``TIMEOUT`` seconds.
    """
    before = active_children()
    loader = DataLoader(
        _Attempts(dataset),
        batch_sampler=[rows.tolist() for rows in batches],
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # else a seed is drawn from the global one, which is the caller's
    )
    if not workers:
        return iter(loader)
    loaded = iter(loader)
    return _watched(loaded, [child for child in active_children() if child not in before])


def _watched(loaded: Iterator, readers: Sequence[BaseProcess]) -> Iterator:
    """Yield what is loaded; a reader that takes too long is killed, so that nothing waits for it."""

    def kill() -> None:
        for reader in readers:
            reader.kill()

    try:
        while True:
            alarm = threading.Timer(TIMEOUT, kill)
            alarm.start()
            try:
                batch = next(loaded)
            except StopIteration:
                return
            finally:
                alarm.cancel()
            yield batch
    except (RuntimeError, OSError, EOFError) as error:  # whatever the queue says, and the DataLoader of the queue
        if not _one_has_ended(readers):
            raise
        raise ReaderError(
            f"a process that reads images has ended, or was stopped after {TIMEOUT} seconds without a batch "
            f"({first_line(error)})"
        ) from error
    finally:
        del loaded  # the traceback of an error would keep it, and its processes, alive


def _one_has_ended(readers: Sequence[BaseProcess]) -> bool:
    try:
        return bool(wait([reader.sentinel for reader in readers], timeout=1))
    except RuntimeError:  # of the DataLoader's signal handler: one has, just now
        return True


class _Attempts(Dataset):
    """Errors as values: to one that is raised in a worker the DataLoader would add a traceback, in its message."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, i: int):
        try:
            return self.dataset[i]
        except (ArgumentError, OSError) as error:
            return error


class _Fitted(Dataset):
    def __init__(self, source: Source, shape: tuple[int, int, int]):
        self.source = source
        self.shape = shape

    def __getitem__(self, i: int) -> tuple[int, Tensor, int | None]:
        pixels, c = self.source[i]
        return i, fit(pixels, self.shape), c

    def collate(self, items: list) -> Batch:
        errors = [item for item in items if isinstance(item, Exception)]
        positions = [p for p, item in enumerate(items) if not isinstance(item, Exception)]
        if not positions:
            return Batch([], torch.empty(0, *self.shape, dtype=torch.uint8, device="cpu"), [], [], errors)
        rows, pixels, classes = zip(*(items[p] for p in positions), strict=True)
        return Batch(list(rows), torch.stack(pixels), list(classes), positions, errors)
