"""Where the rows are: all here, or a shard of them with every process of a group.

Rows are numbered process by process. The rest of k-means has its own rows, by local number, and asks here for what
concerns those of others; without a group, that is nothing.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ccl_fast.distributed import Peers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Random numbers that are drawn at once, for all rows, before those of other processes are thrown away.
DRAWN = 1 << 20


def open_shards(process_group: ProcessGroup | str | None) -> Whole | Shards:
    """Return the shards of a group's processes, or for None all rows; how many there are is to be told by ``count``."""
    return Whole() if process_group is None else Shards(Peers(process_group))


def digest(x: Tensor) -> str:
    """Return in words what must be alike where x must be."""
    entries = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return f"{x.dtype} {list(x.shape)} with checksum {zlib.crc32(entries):08x}"


class Whole:
    """All rows are here."""

    wide = False  # whether sums are float64 from their first row
    shows_progress = True

    def __init__(self, total: int = 0):
        self.total = total  # rows of all processes

    def together(self) -> contextlib.AbstractContextManager:
        """Raise by all a ValueError that one process raises inside."""
        return contextlib.nullcontext()

    def count(self, rows: int, alike: Callable[[], dict]) -> None:
        """Count the rows that are here. Raises ValueError on every process if what must be ``alike`` is not."""
        self.total = rows

    def sum(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Sum over the processes, to the same bits everywhere."""
        return own

    def largest(self, own: Tensor) -> Tensor:
        """Return the largest of numbers >= 0, [problems, rows] -> [problems, 1]."""
        return own.amax(1, keepdim=True)

    def local(self, rows: Tensor) -> Tensor:
        """Return which of the rows [m] are here, by local number."""
        return rows

    def place(self, rows: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``values(local numbers)`` of the rows [m] that are here, 0 for others: [m, ...], to be summed."""
        return values(rows)

    def uniform(self, generator: torch.Generator) -> Tensor:
        """Draw a number in [0, 1) for every row, float64 [rows], whoever has how many of them."""
        return torch.rand(self.total, dtype=torch.float64, generator=generator)

    def ends(self, cumulative: Tensor) -> Tensor:
        """Return where each process's rows end in the sum over all rows [processes], from that of the own [rows]."""
        return cumulative[-1:]

    def draw(self, cumulative: Tensor, ends: Tensor, share: Tensor) -> Tensor:
        """Find the rows [m] where the running sum over all rows exceeds each share of its end, in [0, 1)."""
        # right=True: never a row that adds nothing
        return torch.searchsorted(cumulative, share * ends[-1], right=True).clamp(max=self.total - 1)

    def topk(self, own: Tensor, count: int, *, largest: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme numbers [m] of all rows, the most extreme first, and their rows; m <= count."""
        return own.topk(min(count, self.total), largest=largest)


class Shards(Whole):
    """A shard of the rows is with every process of a group; what is asked for is the same on all of them.

    Every method but ``local``, ``place`` and ``uniform`` is a collective. The group must reach the tensors' device.
    """

    wide = True  # pieces in float32 would begin and end where shards do

    def __init__(self, peers: Peers):
        self.peers = peers
        self.shows_progress = peers.rank == 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        error = None
        try:
            yield
        except ValueError as raised:
            error = raised
        self.peers.agree(0, error)
        if error is not None:
            raise error

    def count(self, rows: int, alike: Callable[[], dict]) -> None:
        self.counts = self.peers.agree(rows, **alike())
        self.total, self.start = sum(self.counts), sum(self.counts[: self.peers.rank])
        self.rows = rows

    def sum(self, *own: Tensor) -> tuple[Tensor, ...]:
        # In one message. Counts of rows are exact in float64 too.
        numbers = torch.cat([x.flatten().double() for x in own])
        parts = (self.peers.sum(numbers) if len(numbers) else numbers).split([x.numel() for x in own])
        return tuple(part.view(x.shape).to(x.dtype) for part, x in zip(parts, own, strict=True))

    def largest(self, own: Tensor) -> Tensor:
        here = own.amax(1, keepdim=True) if self.rows else own.new_zeros(len(own), 1)
        return self._gather(here[None]).amax(0)

    def local(self, rows: Tensor) -> Tensor:
        return (rows - self.start)[self._are_here(rows)]

    def place(self, rows: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
        found = values(self.local(rows))
        placed = found.new_zeros(len(rows), *found.shape[1:])
        placed[self._are_here(rows)] = found
        return placed

    def uniform(self, generator: torch.Generator) -> Tensor:
        own = []
        for start in range(0, self.total, DRAWN):
            drawn = torch.rand(min(DRAWN, self.total - start), dtype=torch.float64, generator=generator)
            first = self.start - start
            own.append(drawn[max(0, first) : max(0, first + self.rows)].clone())
        return torch.cat(own)

    def ends(self, cumulative: Tensor) -> Tensor:
        return self._gather(cumulative[-1:] if self.rows else cumulative.new_zeros(1)).cumsum(0)

    def draw(self, cumulative: Tensor, ends: Tensor, share: Tensor) -> Tensor:
        # Below the end, also after rounding: then the process is one that has rows.
        wanted = torch.minimum(share * ends[-1], ends[-1].nextafter(torch.zeros_like(ends[-1])))
        owner = torch.searchsorted(ends, wanted, right=True)
        begin = torch.cat([ends.new_zeros(1), ends])[self.peers.rank]
        row = torch.searchsorted(cumulative, wanted - begin, right=True).clamp(max=self.rows - 1)
        return self.sum(torch.where(owner == self.peers.rank, self.start + row, 0))[0]

    def topk(self, own: Tensor, count: int, *, largest: bool) -> tuple[Tensor, Tensor]:
        # Of equal numbers the first row's, which a stable sort tells whatever the shards.
        values, rows = own.sort(descending=largest, stable=True)
        own = torch.stack([values.double(), (self.start + rows).double()], 1)[:count]
        values, rows = self.peers.gather(own, [min(count, rows) for rows in self.counts]).unbind(1)
        values, order = values.sort(descending=largest, stable=True)
        return values[:count], rows[order[:count]].long()

    def _are_here(self, rows: Tensor) -> Tensor:
        return (rows >= self.start) & (rows < self.start + self.rows)

    def _gather(self, own: Tensor) -> Tensor:
        """Gather [1, ...] of every process: [processes, ...]."""
        return self.peers.gather(own, [1] * self.peers.size)
