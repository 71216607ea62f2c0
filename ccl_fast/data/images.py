"""Images of one shape, in memory or loaded on demand, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.data.loading import Batch, load_images
from ccl_fast.data.pixels import shape_of

if TYPE_CHECKING:
    from ccl_fast.data.source import Source

TRIES = 100  # images that are looked at for one that can be read


class Images(ABC):
    """Images of one shape, and their classes where known.

    ``images[rows]`` are those images, rows int64 [b], as float32 [b, c, h, w] in [0, 1] on ``device``.

    Always as many as there are rows: where files that cannot be read are skipped and one turns out to be so only when
    it is needed, another image of the same batch stands in its place.

    Attributes:
        shape: (c, h, w), c = 1 or 3.
        classes: int64 [n] on the CPU, or None; for splits and logs, and nothing else.
        device: where batches come from.
    """

    shape: tuple[int, int, int]
    classes: Tensor | None
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def __getitem__(self, rows: Tensor) -> Tensor:
        """Images [b, c, h, w] of rows [b].

        Raises:
            ArgumentError: an item is no image.
            OSError: a file cannot be read, and is not replaced.
        """

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Tensor]:
        """All images, or those of ``order``, in batches; the last one may be smaller.

        Args:
            batch_size: at least 1.
            order: rows, int64 [m]; None: 0, 1, ...

        Returns:
            An iterator over float32 [b, c, h, w] in [0, 1]; it draws nothing from any global generator.
        """
        order = torch.arange(len(self), device="cpu") if order is None else order
        return self.in_batches(order.split(batch_size))

    def in_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """The images of each batch of rows, int64 [b]; as `batches`."""
        return (self[rows] for rows in batches)

    @property
    def epoch(self) -> Tensor:
        """The rows that an epoch has, int64 on the CPU, each as often as it has them: here once, in their order."""
        return torch.arange(len(self), device="cpu")

    @abstractmethod
    def subset(self, rows: Tensor) -> Images:
        """The images of some rows, int64 [m], in that order."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Images:
        """The same images, with their batches on a device."""


class InMemory(Images):
    """Decoded images.

    Args:
        pixels: uint8 [n, c, h, w]; 255 is 1.
        classes: int64 [n] or None.
    """

    def __init__(self, pixels: Tensor, classes: Tensor | None = None):
        self.pixels = pixels
        self.classes = classes
        self.shape = shape_of(pixels)
        self.device = pixels.device

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.pixels[rows.to(self.device)].float() / 255

    def subset(self, rows: Tensor) -> InMemory:
        return InMemory(self.pixels[rows.to(self.device)], _of(self.classes, rows))

    def to(self, device: torch.device | str) -> InMemory:
        return InMemory(self.pixels.to(device), self.classes)


class OnDemand(Images):
    """Images that are read when they are needed, by ``workers`` processes ahead of it in ``batches``.

    An image that cannot be read is replaced, if ``replace`` and the source is a folder that is not strict: by the next
    one of its batch that can be read, after the last one by the first; if there is none, by the next one of this set,
    of which 100 are tried. The number of images of a batch stays the same, the same batch gets the same images, and
    ``classes`` is what it was. The first time that a file is met a line on stderr names it.

    Args:
        source: where they are.
        rows: which of its images, int64 [n] on the CPU.
        shape: what they are brought to.
        classes: int64 [n] or None.
        workers: 0: the calling process reads them.
        device: where batches go.
        replace: False: what cannot be read is an error, whatever the source is.
    """

    def __init__(
        self,
        source: Source,
        rows: Tensor,
        shape: tuple[int, int, int],
        classes: Tensor | None = None,
        *,
        workers: int = 0,
        device: torch.device | str = "cpu",
        replace: bool = True,
    ):
        self.source = source
        self.rows = rows
        self.shape = shape
        self.classes = classes
        self.workers = workers
        self.device = torch.device(device)
        self.replace = replace

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return next(self._loaded([rows.cpu()], workers=0))

    def in_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return self._loaded([rows.cpu() for rows in batches], self.workers)

    def subset(self, rows: Tensor) -> OnDemand:
        rows = rows.cpu()
        return self._like(self.rows[rows], _of(self.classes, rows), self.device)

    def to(self, device: torch.device | str) -> OnDemand:
        return self._like(self.rows, self.classes, device)

    def _like(self, rows: Tensor, classes: Tensor | None, device: torch.device | str) -> OnDemand:
        return OnDemand(
            self.source, rows, self.shape, classes, workers=self.workers, device=device, replace=self.replace
        )

    def _loaded(self, batches: Sequence[Tensor], workers: int) -> Iterator[Tensor]:
        pinned = self.device.type == "cuda" and workers > 0
        of_source = [self.rows[rows] for rows in batches]
        # No variable holds the loader: the traceback of an error would keep it, and its processes, alive.
        for rows, batch in zip(
            batches,
            load_images(self.source, of_source, self.shape, workers=workers, pin_memory=pinned),
            strict=True,
        ):
            pixels = self._completed(batch, rows) if batch.errors else batch.pixels
            yield pixels.to(self.device, non_blocking=pinned).float() / 255

    def _completed(self, batch: Batch, rows: Tensor) -> Tensor:
        """Pixels of all rows of a batch, of which some could not be read."""
        positions = torch.arange(len(rows), device="cpu")
        read = torch.tensor(batch.positions, dtype=torch.int64, device="cpu")
        missing = positions[~torch.isin(positions, read)]
        for i, error in zip(self.rows[rows[missing]].tolist(), batch.errors, strict=True):
            if not self.replace:
                raise error
            self.source.missed(i, error)
        if not len(read):
            return self._after(int(rows[0]), batch.errors[0]).expand(len(rows), -1, -1, -1)
        return batch.pixels[torch.searchsorted(read, positions) % len(read)]

    def _after(self, row: int, error: Exception) -> Tensor:
        """Pixels [1, c, h, w] of the first image after a row that can be read."""
        following = self.rows[(row + 1 + torch.arange(min(len(self) - 1, TRIES), device="cpu")) % len(self)]
        for i, batch in zip(following.tolist(), load_images(self.source, following.split(1), self.shape), strict=False):
            if not batch.errors:
                return batch.pixels
            self.source.missed(i, batch.errors[0])
        raise error


def _of(classes: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if classes is None else classes[rows.cpu()]
