"""Number the rows of all processes, process by process: those of one process are its shard."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ccl_fast.distributed import Group

# Random numbers that are drawn at once, for all rows, before those of other processes are thrown away.
DRAWN = 1 << 20


def digest(x: Tensor) -> str:
    """Return dtype, shape and checksum of x, to tell whether processes have the same one."""
    entries = x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return f"{x.dtype} {list(x.shape)} with checksum {zlib.crc32(entries):08x}"


class Shards:
    """The rows of all processes; without a group all are here.

    ``local``, ``place`` and ``uniform`` return what belongs to this process's rows. The other methods are collectives,
    and return the same on every process.

    Args:
        group: the processes.
        counts: rows of each.
    """

    def __init__(self, group: Group, counts: list[int]):
        self.group, self.counts = group, counts
        self.total, self.rows, self.start = sum(counts), counts[group.rank], sum(counts[: group.rank])

    def local(self, rows: Tensor) -> Tensor:
        """Return which of the rows [m] are here, by local number."""
        return rows if self.group.is_null else (rows - self.start)[self._are_here(rows)]

    def place(self, rows: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``values(local numbers)`` of the rows [m] that are here, 0 for others: [m, ...], to be summed."""
        found = values(self.local(rows))
        if self.group.is_null:
            return found
        placed = found.new_zeros(len(rows), *found.shape[1:])
        placed[self._are_here(rows)] = found
        return placed

    def uniform(self, generator: torch.Generator) -> Tensor:
        """Draw a number in [0, 1) for every row, float64 [rows], whoever has how many of them."""
        own = []
        for start in range(0, self.total, DRAWN):
            drawn = torch.rand(min(DRAWN, self.total - start), dtype=torch.float64, generator=generator, device="cpu")
            first = self.start - start
            own.append(drawn[max(0, first) : max(0, first + self.rows)].clone())
        return torch.cat(own)

    def ends(self, cumulative: Tensor) -> Tensor:
        """Return where each process's rows end in the running sum of all rows [processes], from that of its own."""
        end = cumulative[-1:] if self.rows else cumulative.new_zeros(1)
        return self.group.gather(end, [1] * self.group.size).cumsum(0)

    def draw(self, cumulative: Tensor, ends: Tensor, share: Tensor) -> Tensor:
        """Find the rows [m] where the running sum of all rows exceeds each share of its end, in [0, 1)."""
        if self.group.is_null:
            end = cumulative[-1]
            return torch.searchsorted(cumulative, torch.minimum(share * end, end.nextafter(end - end)), right=True)
        # Below the end, also after rounding: then the process is one that has rows.
        wanted = torch.minimum(share * ends[-1], ends[-1].nextafter(torch.zeros_like(ends[-1])))
        owner = torch.searchsorted(ends, wanted, right=True)  # right=True: never a row that adds nothing
        begin = torch.cat([ends.new_zeros(1), ends])[self.group.rank]
        row = torch.searchsorted(cumulative, wanted - begin, right=True).clamp(max=self.rows - 1)
        return self.group.sum(torch.where(owner == self.group.rank, self.start + row, 0))

    def topk(self, own: Tensor, count: int, *, largest: bool) -> tuple[Tensor, Tensor]:
        """Return the extreme values, float64 [m], of all rows, the most extreme first, and their rows; m <= count.

        Of equal values the first row's, whatever the shards.
        """
        last = own.topk(min(count, self.rows), largest=largest).values[-1:]
        rows = (own >= last if largest else own <= last).nonzero()[:, 0]
        values, order = own[rows].sort(descending=largest, stable=True)
        found = torch.stack([values.double(), (self.start + rows[order]).double()], 1)[:count]
        values, rows = self.group.gather(found, [min(count, rows) for rows in self.counts]).unbind(1)
        values, order = values.sort(descending=largest, stable=True)
        return values[:count], rows[order[:count]].long()

    def _are_here(self, rows: Tensor) -> Tensor:
        return (rows >= self.start) & (rows < self.start + self.rows)
