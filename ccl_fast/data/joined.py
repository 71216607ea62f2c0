"""Images of several sets as one, some of them several times an epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ccl_fast.data.images import Images


class Joined(Images):
    """Images of one shape from several sets, one after the other; nobody knows the classes of all.

    Args:
        parts: the sets, on one device.
        times: by set, how often an epoch has each of its images.
        rows: which of all images, int64 [n] on the CPU; None: all.
    """

    def __init__(self, parts: Sequence[Images], times: Sequence[int], rows: Tensor | None = None):
        self.parts, self.times = list(parts), list(times)
        self.shape, self.device, self.classes = parts[0].shape, parts[0].device, None
        self._starts = [sum(map(len, self.parts[:number])) for number in range(len(parts) + 1)]
        self.rows = torch.arange(self._starts[-1], device="cpu") if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self._together(self.rows[rows.cpu()], [lambda own, part=part: part[own] for part in self.parts])

    def in_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        of_batches = [self.rows[rows.cpu()] for rows in batches]
        # Each set reads ahead by itself, the batches that have some of its images.
        loaded = [
            part.in_batches([own for rows in of_batches if len(own := self._own(rows, number)[1])])
            for number, part in enumerate(self.parts)
        ]
        for rows in of_batches:
            yield self._together(rows, [lambda _, of_part=of_part: next(of_part) for of_part in loaded])

    @property
    def epoch(self) -> Tensor:
        counts = torch.zeros(len(self.rows), dtype=torch.int64, device="cpu")
        for number, times in enumerate(self.times):
            counts[self._own(self.rows, number)[0]] = times
        return torch.arange(len(self.rows), device="cpu").repeat_interleave(counts)

    def subset(self, rows: Tensor) -> Joined:
        return Joined(self.parts, self.times, self.rows[rows.cpu()])

    def to(self, device: torch.device | str) -> Joined:
        return Joined([part.to(device) for part in self.parts], self.times, self.rows)

    def _own(self, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Where in rows of all images those of a set are, and which of its own they are."""
        start, end = self._starts[number : number + 2]
        places = ((rows >= start) & (rows < end)).nonzero()[:, 0]
        return places, rows[places] - start

    def _together(self, rows: Tensor, readers: Sequence) -> Tensor:
        images = torch.empty(len(rows), *self.shape, dtype=torch.float32, device=self.device)
        for number, read in enumerate(readers):
            places, own = self._own(rows, number)
            if len(places):
                images[places.to(self.device)] = read(own)
        return images
