"""The processes of a group, on torch.distributed: who has which rows, and how rows and numbers travel.

Rows of the whole batch are numbered process by process. Every method is a collective: all processes call the same ones
in the same order.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ccl_fast.errors import ArgumentError, PeerError

# What talks to other processes, torch.compile leaves as it is: its graphs end before. (As torch.compiler.disable, which
# would import the compiler together with this package.)
outside_of_graphs = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage] - see above
ExchangeWay = Literal["all-gather", "ring"]
EXCHANGES: tuple[ExchangeWay, ...] = get_args(ExchangeWay)
WORLD = "world"


class Block(NamedTuple):
    """Rows of other processes, to be met by some of this process's own."""

    owners: list[tuple[int, slice]]  # rank, and which of its rows; in the order of the tensors' rows
    tensors: tuple[Tensor, ...]
    own_rows: slice


class Peers:
    """The processes of a group.

    Args:
        group: a process group, or "world" for the default one.

    Raises:
        ValueError: torch.distributed is not set up, or this process is not of the group.
    """

    def __init__(self, group: ProcessGroup | str):
        check_process_group(group)
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError("process_group: expected torch.distributed.init_process_group to have been called")
        found = dist.group.WORLD if isinstance(group, str) else group
        assert found is not None
        self.group: ProcessGroup = found
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ArgumentError("process_group: expected a group that this process belongs to, got another one")
        # Numbers for the host travel on the host if the group can: a GPU's queue need not run dry for them.
        backends = dist.get_backend_config(self.group)
        self._host = torch.device("cpu" if "cpu:" in backends else torch.accelerator.current_accelerator() or "cpu")

    def agree(self, rows: int, error: Exception | None = None, **alike) -> list[int]:
        """The number of rows of every process; and what is ``alike`` must be so everywhere.

        Args:
            error: one that this process is about to raise: the others will not wait for it.

        Raises:
            ValueError: on every process, naming what differs and where; on the others, the ``error`` of one.
        """
        text = json.dumps(alike if error is None else {"error": str(error)}, default=str)
        mine = torch.tensor([rows, zlib.crc32(text.encode()), len(text)], device=self._host)
        everyone = self._everyone(mine).tolist()
        if any(other[1:] != everyone[0][1:] for other in everyone):
            self._raise_difference(text, max(length for *_, length in everyone))
        return [count for count, *_ in everyone]

    def _raise_difference(self, text: str, longest: int) -> None:
        mine = torch.tensor(list(text.ljust(longest).encode()), dtype=torch.uint8, device=self._host)
        everyone = [json.loads(bytes(row)) for row in self._everyone(mine).tolist()]
        for rank, other in enumerate(everyone):
            if error := other.get("error"):  # of several the first's, but that one raises it itself
                if rank == self.rank:
                    return
                raise ArgumentError(f"on process {rank}: {error}")
        first, *others = everyone
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise ArgumentError(
                        f"{name}: expected the same on every process, got {first.get(name)} on process 0 "
                        f"and {other.get(name)} on process {rank}"
                    )

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes, the same bits everywhere; x stays as it is."""
        total = x.detach().clone()
        with self.waiting():
            dist.all_reduce(total, group=self.group)
        return total

    @outside_of_graphs
    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """`sum`; the gradient of x is that of what all processes make of it."""
        return _Sum.apply(x, self)

    def logsumexp(self, x: Tensor) -> Tensor:
        """Logarithm of the sum of exp(x) over the processes, the same bits everywhere; -inf is no term."""
        largest = x.detach().clone()
        with self.waiting():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        shift = largest.masked_fill(largest == -torch.inf, 0.0)
        return self.sum((x - shift).exp()).log() + shift

    def share_gradient(self, x: Tensor, mean: bool) -> Tensor:
        """x, a parameter of all processes; its gradient is the mean, or the sum, of those that they find."""
        return _SharedGradient.apply(x, self, mean)

    @outside_of_graphs
    def gather(self, x: Tensor, counts: list[int]) -> Tensor:
        """The rows of all processes: [rows, ...] -> [sum of counts, ...]."""
        everyone = self.start_gather(x, counts)()
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])

    def rows(self, tensors: tuple[Tensor, ...], counts: list[int], exchange: str) -> GatheredRows | RingOfRows:
        """The rows of all processes, to be visited block by block; they may be on their way when this returns.

        Args:
            tensors: ``[rows, ...]`` each, this process's part.
            counts: rows of every process.
            exchange: "all-gather" holds the rows of all processes from now on, "ring" those of three at a time, and
                they travel at every visit.
        """
        return {"all-gather": GatheredRows, "ring": RingOfRows}[exchange](self, tensors, counts)

    def return_to_owners(self, found: dict[int, Tensor], counts: list[int], like: Tensor) -> list[Tensor]:
        """What was found in a half visit for the rows of others goes to them.

        Args:
            found: ``[counts[rank], numbers]`` for every rank that was visited.
            like: ``[counts[self.rank], numbers]``: shape, dtype and device of what comes.

        Returns:
            What every process that has visited this one found for its rows, each like ``like``.
        """
        if self.size == 1:
            return []
        numbers = like.shape[1]
        visited, visitors = self.half(-1), self.half(+1)
        sent = torch.cat([found[rank].flatten() for rank in sorted(visited)] or [like.new_empty(0)])
        received = like.new_empty(like.numel() * len(visitors))
        with self.waiting():
            dist.all_to_all_single(
                received,
                sent,
                [like.numel() if rank in visitors else 0 for rank in range(self.size)],
                [counts[rank] * numbers if rank in visited else 0 for rank in range(self.size)],
                group=self.group,
            )
        return list(received.view(len(visitors), *like.shape))

    # ---- who meets whom, and what travels ----

    def half(self, direction: int) -> set[int]:
        """Whom this process visits (-1), or by whom it is visited (+1), where each pair meets once."""
        return {(self.rank + direction * step) % self.size for step in range(1, self.size // 2 + 1)}

    def share(self, rank: int, counts: list[int], half: bool) -> tuple[slice, slice]:
        """Own rows and the other's rows to bring together. Two that visit each other share the work."""
        own, theirs = slice(0, counts[self.rank]), slice(0, counts[rank])
        if half and (rank - self.rank) * 2 % (2 * self.size) == self.size:
            middle = counts[min(self.rank, rank)] // 2
            if self.rank < rank:
                own = slice(0, middle)
            else:
                theirs = slice(middle, counts[rank])
        return own, theirs

    def _everyone(self, x: Tensor) -> Tensor:
        """Equal shapes: [...] -> [processes, ...]."""
        out = x.new_empty(self.size, *x.shape)
        with self.waiting():
            dist.all_gather_into_tensor(_as_bytes(out).flatten(), _as_bytes(x).flatten(), group=self.group)
        return out

    def start_gather(self, x: Tensor, counts: list[int]) -> Callable[[], Tensor]:
        """[rows, ...] -> [processes, largest count, ...], when what is returned is called; padded with zeros."""
        most = max(counts)
        padded = x.detach().contiguous()
        if len(x) < most:
            padded = x.new_zeros(most, *x.shape[1:])
            padded[: len(x)] = x.detach()
        out = x.new_empty(self.size, *padded.shape)
        work = None
        if out.numel():
            with self.waiting():
                work = dist.all_gather_into_tensor(
                    _as_bytes(out).flatten(), _as_bytes(padded).flatten(), group=self.group, async_op=True
                )

        def finish() -> Tensor:
            if work is not None:
                with self.waiting():
                    work.wait()
            _ = padded  # it must live until then
            return out

        return finish

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "No backend type" in str(error):  # the group cannot move tensors of this device
                raise
            raise PeerError.of(error, self.rank, self.size) from error


class GatheredRows:
    """Rows of all processes, each on every process."""

    def __init__(self, peers: Peers, tensors: tuple[Tensor, ...], counts: list[int]):
        self.peers, self.counts = peers, counts
        self._pending = [peers.start_gather(x, counts) for x in tensors]
        self._everyone: list[Tensor] = []  # [processes, largest count, ...]

    def keep(self) -> tuple[Tensor, ...]:
        """What `restored` makes visitable again."""
        self._everyone += [finish() for finish in self._pending]
        self._pending = []
        return tuple(self._everyone)

    @classmethod
    def restored(cls, peers: Peers, kept: tuple[Tensor, ...], counts: list[int]) -> GatheredRows:
        rows = cls(peers, (), counts)
        rows._everyone = list(kept)
        return rows

    def visit(self, *more: Tensor, half: bool) -> Iterator[Block]:
        """The rows of the other processes, block by block, with ``more`` of them, ``[rows, ...]`` each.

        Args:
            half: every pair of rows of different processes is met on one of the two alone.
        """
        peers, counts = self.peers, self.counts
        pending = [peers.start_gather(x, counts) for x in more]
        ranks = sorted(peers.half(-1)) if half else [rank for rank in range(peers.size) if rank != peers.rank]

        def blocks() -> Iterator[Block]:
            everyone = [*self.keep(), *(finish() for finish in pending)]
            for run in self._runs(ranks, half):
                own, theirs = peers.share(run[0], counts, half)
                if len(run) == 1:
                    found = tuple(x[run[0], theirs] for x in everyone)
                else:  # one block without a copy
                    found = tuple(x[run[0] : run[-1] + 1].flatten(0, 1) for x in everyone)
                yield Block([(rank, theirs) for rank in run], found, own)

        return blocks()

    def _runs(self, ranks: list[int], half: bool) -> list[list[int]]:
        """Ranks grouped to blocks: neighbours whose rows lie side by side, all to be met by all own rows."""
        whole = slice(0, self.counts[self.peers.rank])
        runs: list[list[int]] = []
        joins = False
        for rank in ranks:
            all_with_all = self.peers.share(rank, self.counts, half) == (whole, whole)
            if joins and all_with_all and runs[-1][-1] == rank - 1:
                runs[-1].append(rank)
            else:
                runs.append([rank])
            joins = all_with_all and len(set(self.counts)) == 1
        return runs


class RingOfRows:
    """Rows that travel from process to process at every visit; each holds its own, those at hand, those arriving."""

    def __init__(self, peers: Peers, tensors: tuple[Tensor, ...], counts: list[int]):
        self.peers, self.tensors, self.counts = peers, tensors, counts

    def keep(self) -> tuple[Tensor, ...]:
        """As `GatheredRows.keep`."""
        return self.tensors

    @classmethod
    def restored(cls, peers: Peers, kept: tuple[Tensor, ...], counts: list[int]) -> RingOfRows:
        return cls(peers, kept, counts)

    def visit(self, *more: Tensor, half: bool) -> Iterator[Block]:
        """As `GatheredRows.visit`."""
        peers, counts = self.peers, self.counts
        held = tuple(x.detach().contiguous() for x in (*self.tensors, *more))
        steps = peers.size // 2 if half else peers.size - 1
        pending = self._pass_on(held, 1) if steps else None

        def blocks() -> Iterator[Block]:
            finish = pending
            for step in range(1, steps + 1):
                assert finish is not None
                passed = finish()
                if step < steps:
                    finish = self._pass_on(passed, step + 1)
                rank = (peers.rank - step) % peers.size
                own, theirs = peers.share(rank, counts, half)
                yield Block([(rank, theirs)], tuple(x[theirs] for x in passed), own)

        return blocks()

    def _pass_on(self, held: tuple[Tensor, ...], step: int) -> Callable[[], tuple[Tensor, ...]]:
        """Send what is held to the next process; what is returned waits for what the one before holds."""
        peers = self.peers
        arriving = self.counts[(peers.rank - step) % peers.size]
        received = tuple(x.new_empty(arriving, *x.shape[1:]) for x in held)
        after, before = (dist.get_global_rank(peers.group, (peers.rank + i) % peers.size) for i in (1, -1))
        # Nothing is a message too: NCCL wants all processes in the first call of a group.
        messages = [[_as_bytes(x) if x.numel() else _dummy(x) for x in batch] for batch in (held, received)]
        operations = [
            dist.P2POp(operation, message, peer, peers.group, tag)
            for operation, peer, batch in zip((dist.isend, dist.irecv), (after, before), messages, strict=True)
            for tag, message in enumerate(batch)
        ]
        with peers.waiting():
            works = dist.batch_isend_irecv(operations)

        def finish() -> tuple[Tensor, ...]:
            with peers.waiting():
                for work in works:
                    work.wait()
            _ = messages  # they must live until then
            return received

        return finish


def check_process_group(group) -> None:
    """Check that a group is one of torch.distributed, or "world"."""
    if not (group == WORLD or isinstance(group, ProcessGroup)):
        got = repr(group) if isinstance(group, str) else type(group).__name__
        raise ArgumentError(f'process_group: expected a torch.distributed process group, "world" or None, got {got}')


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, peers):
        ctx.peers = peers
        return peers.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.peers.sum(grad), None


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, peers, mean):
        ctx.peers, ctx.mean = peers, mean
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = ctx.peers.sum(grad)
        return total / ctx.peers.size if ctx.mean else total, None, None


def _as_bytes(x: Tensor) -> Tensor:
    """Not every backend moves every dtype."""
    return x.view(-1).view(torch.uint8) if x.dtype != torch.uint8 else x


def _dummy(like: Tensor) -> Tensor:
    return torch.zeros(1, dtype=torch.uint8, device=like.device)
