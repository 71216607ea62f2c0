"""Images of one shape, in memory or loaded on demand, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ccl_fast.data.loading import load_images
from ccl_fast.data.source import Source


class Images(ABC):
    """Images of one shape, and their classes where known.

    ``images[rows]`` are those images, rows int64 [b], as float32 [b, c, h, w] in [0, 1] on ``device``.

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
        """Images [b, c, h, w] of rows [b]. Raises OSError: a file cannot be read; ArgumentError: no image."""

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Tensor]:
        """All images, or those of ``order``, in batches; the last one may be smaller.

        Args:
            batch_size: at least 1.
            order: rows, int64 [m]; None: 0, 1, ...

        Returns:
            An iterator over float32 [b, c, h, w] in [0, 1]; it draws nothing from any global generator.
        """
        order = torch.arange(len(self)) if order is None else order
        return (self[rows] for rows in order.split(batch_size))

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
        self.shape = tuple(pixels.shape[1:])
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

    Args:
        source: where they are.
        rows: which of its images, int64 [n] on the CPU.
        shape: what they are brought to.
        classes: int64 [n] or None.
        workers: 0: the calling process reads them.
        device: where batches go.
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
    ):
        self.source = source
        self.rows = rows
        self.shape = shape
        self.classes = classes
        self.workers = workers
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return next(self._loaded([self.rows[rows.cpu()]], workers=0))

    def batches(self, batch_size: int, order: Tensor | None = None) -> Iterator[Tensor]:
        rows = self.rows if order is None else self.rows[order.cpu()]
        return self._loaded(rows.split(batch_size), self.workers)

    def subset(self, rows: Tensor) -> OnDemand:
        rows = rows.cpu()
        return OnDemand(
            self.source, self.rows[rows], self.shape, _of(self.classes, rows), workers=self.workers, device=self.device
        )

    def to(self, device: torch.device | str) -> OnDemand:
        return OnDemand(self.source, self.rows, self.shape, self.classes, workers=self.workers, device=device)

    def _loaded(self, batches: list[Tensor] | tuple[Tensor, ...], workers: int) -> Iterator[Tensor]:
        pinned = self.device.type == "cuda" and workers > 0
        for batch in load_images(self.source, batches, self.shape, workers=workers, pin_memory=pinned):
            for error in batch.errors:
                raise error
            yield batch.pixels.to(self.device, non_blocking=pinned).float() / 255


def _of(classes: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if classes is None else classes[rows.cpu()]
