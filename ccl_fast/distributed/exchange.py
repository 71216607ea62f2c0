"""Rows on their way between processes: each pair of rows on two processes is to be met, once or from both sides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from ccl_fast.distributed.group import Group, TorchGroup, as_bytes

ExchangeWay = Literal["all-gather", "ring"]
EXCHANGES: tuple[ExchangeWay, ...] = get_args(ExchangeWay)


class Block(NamedTuple):
    """Rows of other processes, to be compared with some of this process's own."""

    owners: list[tuple[int, slice]]  # rank, and which of its rows; in the order of the tensors' rows
    tensors: tuple[Tensor, ...]
    own_rows: slice


class Exchange(NamedTuple):
    """A group whose processes each have some rows of a batch, numbered process by process, and how rows travel."""

    group: Group
    counts: list[int]  # rows of every process
    way: ExchangeWay

    @property
    def several(self) -> TorchGroup:
        """The group, where rows travel: between several processes."""
        assert isinstance(self.group, TorchGroup)
        return self.group

    @property
    def first(self) -> int:
        """The number of this process's first row."""
        return sum(self.counts[: self.group.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Return the rows of all processes: ``[rows, ...]`` -> ``[all rows, ...]``."""
        return self.group.gather(x, self.counts)

    def own(self, x: Tensor) -> Tensor:
        """Return this process's part of what all have: ``[all rows, ...]`` -> ``[rows, ...]``."""
        return x.split(self.counts)[self.group.rank]

    def rows(self, tensors: tuple[Tensor, ...]) -> GatheredRows | RingOfRows:
        """Send this process's rows, ``[rows, ...]`` each, to be visited block by block; they may still be on their way.

        "all-gather" holds the rows of all processes from now on, "ring" those of three at a time, and they travel at
        every visit.
        """
        return _WAYS[self.way].sent(self, tensors)

    def restored(self, kept: tuple[Tensor, ...]) -> GatheredRows | RingOfRows:
        """Return the rows again of which `keep` has returned what is kept."""
        return _WAYS[self.way](self, kept)

    def return_to_owners(self, found: dict[int, Tensor], like: Tensor) -> list[Tensor]:
        """Send what was found for the rows of others in a half visit to these.

        Args:
            found: ``[counts[rank], values]`` for every rank that was visited.
            like: ``[own count, values]``: shape, dtype and device of what comes.

        Returns:
            What every process that has visited this one found for its rows, each like ``like``.
        """
        group = self.several
        if group.size == 1:
            return []
        values = like.shape[1]
        visited, visitors = self.half(-1), self.half(+1)
        sent = torch.cat([found[rank].flatten() for rank in sorted(visited)] or [like.new_empty(0)])
        received = like.new_empty(like.numel() * len(visitors))
        with group.waiting():
            dist.all_to_all_single(
                received,
                sent,
                [like.numel() if rank in visitors else 0 for rank in range(group.size)],
                [self.counts[rank] * values if rank in visited else 0 for rank in range(group.size)],
                group=group.group,
            )
        return list(received.view(len(visitors), *like.shape))

    # ---- who visits whom ----

    def half(self, direction: int) -> set[int]:
        """Return whom this process visits (-1), or by whom it is visited (+1), where each two visit once."""
        rank, size = self.group.rank, self.group.size
        return {(rank + direction * step) % size for step in range(1, size // 2 + 1)}

    def share(self, other: int, half: bool) -> tuple[slice, slice]:
        """Return the own rows and the other's rows to compare. Two that visit each other share the work."""
        rank, size = self.group.rank, self.group.size
        own, theirs = slice(0, self.counts[rank]), slice(0, self.counts[other])
        if half and (other - rank) * 2 % (2 * size) == size:
            middle = self.counts[min(rank, other)] // 2
            if rank < other:
                own = slice(0, middle)
            else:
                theirs = slice(middle, self.counts[other])
        return own, theirs


class GatheredRows:
    """Rows of all processes, each on every process."""

    def __init__(self, exchange: Exchange, everyone: tuple[Tensor, ...]):
        self.exchange, self._pending = exchange, []
        self._everyone = list(everyone)  # [processes, largest count, ...]

    @classmethod
    def sent(cls, exchange: Exchange, tensors: tuple[Tensor, ...]) -> GatheredRows:
        rows = cls(exchange, ())
        rows._pending = [exchange.several.start_gather(x, exchange.counts) for x in tensors]
        return rows

    def keep(self) -> tuple[Tensor, ...]:
        """Return what `Exchange.restored` makes visitable again."""
        self._everyone += [finish() for finish in self._pending]
        self._pending = []
        return tuple(self._everyone)

    def visit(self, *more: Tensor, half: bool) -> Iterator[Block]:
        """Visit the rows of the other processes, block by block, with ``more`` of them, ``[rows, ...]`` each.

        Args:
            half: compare two rows of different processes on one of the two alone.
        """
        exchange, group = self.exchange, self.exchange.several
        pending = [group.start_gather(x, exchange.counts) for x in more]
        ranks = sorted(exchange.half(-1)) if half else [rank for rank in range(group.size) if rank != group.rank]

        def blocks() -> Iterator[Block]:
            everyone = [*self.keep(), *(finish() for finish in pending)]
            for run in self._runs(ranks, half):
                own, theirs = exchange.share(run[0], half)
                if len(run) == 1:
                    found = tuple(x[run[0], theirs] for x in everyone)
                else:  # one block without a copy
                    found = tuple(x[run[0] : run[-1] + 1].flatten(0, 1) for x in everyone)
                yield Block([(rank, theirs) for rank in run], found, own)

        return blocks()

    def _runs(self, ranks: list[int], half: bool) -> list[list[int]]:
        """Group ranks to blocks: neighbours whose rows lie side by side, all to be compared with all own rows."""
        counts = self.exchange.counts
        whole = slice(0, counts[self.exchange.group.rank])
        runs: list[list[int]] = []
        joins = False
        for rank in ranks:
            all_with_all = self.exchange.share(rank, half) == (whole, whole)
            if joins and all_with_all and runs[-1][-1] == rank - 1:
                runs[-1].append(rank)
            else:
                runs.append([rank])
            joins = all_with_all and len(set(counts)) == 1
        return runs


class RingOfRows:
    """Rows that travel from process to process at every visit; each holds its own, those at hand, those arriving."""

    def __init__(self, exchange: Exchange, tensors: tuple[Tensor, ...]):
        self.exchange, self.tensors = exchange, tensors

    @classmethod
    def sent(cls, exchange: Exchange, tensors: tuple[Tensor, ...]) -> RingOfRows:
        return cls(exchange, tensors)

    def keep(self) -> tuple[Tensor, ...]:
        """As `GatheredRows.keep`."""
        return self.tensors

    def visit(self, *more: Tensor, half: bool) -> Iterator[Block]:
        """As `GatheredRows.visit`."""
        exchange, (rank, size) = self.exchange, (self.exchange.group.rank, self.exchange.group.size)
        held = tuple(x.detach().contiguous() for x in (*self.tensors, *more))
        steps = size // 2 if half else size - 1
        pending = self._pass_on(held, 1) if steps else None

        def blocks() -> Iterator[Block]:
            finish = pending
            for step in range(1, steps + 1):
                assert finish is not None
                passed = finish()
                if step < steps:
                    finish = self._pass_on(passed, step + 1)
                owner = (rank - step) % size
                own, theirs = exchange.share(owner, half)
                yield Block([(owner, theirs)], tuple(x[theirs] for x in passed), own)

        return blocks()

    def _pass_on(self, held: tuple[Tensor, ...], step: int) -> Callable[[], tuple[Tensor, ...]]:
        """Send what is held to the next process; return a function that waits for what the one before holds."""
        group = self.exchange.several
        arriving = self.exchange.counts[(group.rank - step) % group.size]
        received = tuple(x.new_empty(arriving, *x.shape[1:]) for x in held)
        after, before = (dist.get_global_rank(group.group, (group.rank + i) % group.size) for i in (1, -1))
        # Nothing is a message too: NCCL wants all processes in the first call of a group.
        messages = [[as_bytes(x) if x.numel() else _dummy(x) for x in batch] for batch in (held, received)]
        operations = [
            dist.P2POp(operation, message, peer, group.group, tag)
            for operation, peer, batch in zip((dist.isend, dist.irecv), (after, before), messages, strict=True)
            for tag, message in enumerate(batch)
        ]
        with group.waiting():
            works = dist.batch_isend_irecv(operations)

        def finish() -> tuple[Tensor, ...]:
            with group.waiting():
                for work in works:
                    work.wait()
            _ = messages  # they must live until then
            return received

        return finish


def _dummy(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device=like.device)


_WAYS: dict[ExchangeWay, type[GatheredRows] | type[RingOfRows]] = {"all-gather": GatheredRows, "ring": RingOfRows}
