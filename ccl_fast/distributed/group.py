"""The processes that share work, and what they tell each other; "no group" is one process, which tells nobody."""

from __future__ import annotations

import contextlib
import json
import pickle
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from ccl_fast.errors import ArgumentError, PeerError

# What talks to other processes, torch.compile leaves as it is: its graphs end before. (As torch.compiler.disable, which
# would import the compiler together with this package.)
outside_of_graphs = torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage] - see above
WORLD = "world"
# Its name in torch 2.14; where there are both, the older one warns.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
# In place of a checksum: the process has an error to raise.
FAILED = -1

T = TypeVar("T")


class Group:
    """No group: one process, for which every collective returns its own value, and sends nothing.

    `open_group` makes this, or a `TorchGroup`, which has the same methods. All processes of a group call the same ones
    in the same order, so no condition that only some processes know may decide whether one is called.

    Attributes:
        rank, size: number of this process, and of processes.
        process_group: what the group was opened with; None: no group.

    Example:
        >>> import torch
        >>> from ccl_fast.distributed import open_group
        >>> group = open_group(None)  # or "world"
        >>> group.size, group.is_null, group.gather_int(3), group.sum(torch.ones(2))
        (1, True, [3], tensor([1., 1.]))
    """

    rank, size = 0, 1
    process_group: ProcessGroup | str | None = None

    @property
    def is_null(self) -> bool:
        """Whether this is no group."""
        return self.process_group is None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def patient(self) -> Group:
        """The same processes; there they wait for each other as long as it takes."""
        return self

    def part(self, n: int) -> slice:
        """Return which of n rows are this process's own. The parts follow each other by rank, and cover all rows."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    # ---- checks and errors ----

    def check_everywhere(self, check: Callable[[], int], same: Callable[[], dict] = dict) -> list[int]:
        """Call ``check`` on every process and return the integers that it returns, by rank.

        Args:
            same: called after the check; returns, by name, what must be equal on every process (as JSON has it).

        Raises:
            Exception: one that check or ``same`` raises on a process is raised on all of them.
            ArgumentError: a value is not the same everywhere; names it, and a process where it differs.
        """
        return [check()]

    def gather_int(self, value: int) -> list[int]:
        """Return the integers of all processes, by rank."""
        return self.check_everywhere(lambda: value)

    def together(self) -> contextlib.AbstractContextManager:
        """Wait at the end of ``with`` until all processes are there; raise an error of one on all of them."""
        return contextlib.nullcontext()

    def first(self, function: Callable[[], T]) -> T:
        """Call the function on the first process alone; return its result, or raise its error, on all."""
        return function()

    def waiting(self) -> contextlib.AbstractContextManager:
        """Turn errors of torch.distributed about a lost process within ``with`` into a PeerError."""
        return contextlib.nullcontext()

    # ---- collectives: the same bits on every process ----

    def gather_objects(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def gather(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        """Return the rows of all processes by rank: ``[rows, ...]`` -> ``[sum of counts, ...]``.

        Args:
            counts: rows of every process; None: they are asked first.
        """
        return x

    def gather_with_gradient(self, x: Tensor, counts: list[int]) -> Tensor:
        """`gather`; the gradient of a row is the sum of those that all processes find for it."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the processes."""
        return x

    def sums(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`sum` of several tensors in one message, of float64."""
        return tensors

    def sum_with_gradient(self, x: Tensor) -> Tensor:
        """`sum`; the gradient of x is the sum of those that all processes find for the result."""
        return x

    def max(self, x: Tensor) -> Tensor:
        """Largest of all processes, entry by entry."""
        return x

    def logsumexp(self, x: Tensor) -> Tensor:
        """Logarithm of the sum of exp(x) over the processes; -inf is no term."""
        return x

    def share_gradient(self, x: Tensor, mean: bool) -> Tensor:
        """Return x, a parameter of all processes; its gradient is the mean, or the sum, of those that they find."""
        return x


NO_GROUP = Group()


def open_group(process_group: ProcessGroup | str | None) -> Group:
    """Return the processes of a torch.distributed group, of the default one for "world", or no group for None.

    Raises:
        ArgumentError: torch.distributed is not set up, or this process is not of the group.
    """
    return NO_GROUP if process_group is None else TorchGroup(process_group)


def check_process_group(group: object) -> None:
    """Check that a value is None, "world" or a process group; raises ArgumentError."""
    if not (group is None or group == WORLD or isinstance(group, ProcessGroup)):
        got = repr(group) if isinstance(group, str) else type(group).__name__
        raise ArgumentError(f'process_group: expected a torch.distributed process group, "world" or None, got {got}')


class TorchGroup(Group):
    """The processes of a torch.distributed group; ``patient`` is a group of the same with another timeout.

    Raises:
        PeerError: by every method, when another process has ended or does not answer.
    """

    def __init__(self, process_group: ProcessGroup | str, patient: ProcessGroup | None = None):
        check_process_group(process_group)
        if not (dist.is_available() and dist.is_initialized()):
            raise ArgumentError("process_group: expected torch.distributed.init_process_group to have been called")
        self.process_group = process_group
        found = dist.group.WORLD if isinstance(process_group, str) else process_group
        assert found is not None
        self.group: ProcessGroup = found
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ArgumentError("process_group: expected a group that this process belongs to, got another one")
        # Integers for the host travel on the host if the group can: a GPU's queue need not run dry for them.
        backends = dist.get_backend_config(self.group)
        self._host = torch.device("cpu" if "cpu:" in backends else torch.accelerator.current_accelerator() or "cpu")
        self._patient = None if patient is None else TorchGroup(patient)

    @property
    def patient(self) -> Group:
        return self._patient or self

    def check_everywhere(self, check: Callable[[], int], same: Callable[[], dict] = dict) -> list[int]:
        try:
            number, text = check(), json.dumps(same(), default=str)
        except PeerError:  # there is somebody who cannot be told
            raise
        except Exception as error:
            return self._compare(0, "", error)
        return self._compare(number, text)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        own = None
        try:
            yield
        except PeerError:
            raise
        except Exception as error:
            own = error
        self._compare(0, "", own)

    def _compare(self, number: int, text: str, error: Exception | None = None) -> list[int]:
        """Return the numbers of all processes, if all have the same text and none an error."""
        checksum = zlib.crc32(text.encode()) if error is None else FAILED
        own = torch.tensor([number, checksum], device=self._host)
        everyone = own.new_empty(self.size, 2)
        with self.waiting():
            getattr(dist, ALL_GATHER)(everyone.flatten(), own, group=self.group)
        numbers, checksums = everyone.T.tolist()
        if FAILED in checksums:
            self._raise_error(error)
        if len(set(checksums)) > 1:
            self._raise_difference(text)
        return numbers

    def _raise_error(self, own: Exception | None) -> None:
        errors = self.gather_objects(None if own is None else _portable(own))
        if own is not None:
            raise own
        rank, error = next((rank, error) for rank, error in enumerate(errors) if error is not None)
        if error.args == (str(error),):
            error.args = (f"on process {rank}: {error}",)
        raise error

    def _raise_difference(self, text: str) -> None:
        first, *others = (json.loads(text) for text in self.gather_objects(text))
        for rank, other in enumerate(others, start=1):
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    raise ArgumentError(
                        f"{name}: expected the same on every process, got {first.get(name)} on process 0 "
                        f"and {other.get(name)} on process {rank}"
                    )

    def first(self, function: Callable[[], T]) -> T:
        result: list[Any] = [None]
        with self.together():
            if self.is_first:
                result = [function()]
        with self.waiting():
            dist.broadcast_object_list(result, group=self.group, group_src=0)
        return result[0]

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # The errors of gloo's own are plain ones.
            if isinstance(error, PeerError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise PeerError.of(error, self.rank, self.size) from error

    def gather_objects(self, value: T) -> list[T]:
        values = [value] * self.size
        with self.waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @outside_of_graphs
    def gather(self, x: Tensor, counts: list[int] | None = None) -> Tensor:
        counts = self.gather_int(len(x)) if counts is None else counts
        everyone = self.start_gather(x, counts)()
        return torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])

    @outside_of_graphs
    def gather_with_gradient(self, x: Tensor, counts: list[int]) -> Tensor:
        return _Gather.apply(x, self, counts)

    def start_gather(self, x: Tensor, counts: list[int]) -> Callable[[], Tensor]:
        """Send the rows; return a function that waits: [processes, largest count, ...], padded with zeros."""
        most = max(counts)
        padded = x.detach().contiguous()
        if len(x) < most:
            padded = x.new_zeros(most, *x.shape[1:])
            padded[: len(x)] = x.detach()
        out = x.new_empty(self.size, *padded.shape)
        work = None
        if out.numel():
            with self.waiting():
                work = getattr(dist, ALL_GATHER)(
                    as_bytes(out).flatten(), as_bytes(padded).flatten(), group=self.group, async_op=True
                )

        def finish() -> Tensor:
            if work is not None:
                with self.waiting():
                    work.wait()
            _ = padded  # it must live until then
            return out

        return finish

    def sum(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.SUM)

    def sums(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        flat = torch.cat([x.flatten().double() for x in tensors])  # counts of rows are exact in float64 too
        parts = (self.sum(flat) if len(flat) else flat).split([x.numel() for x in tensors])
        return tuple(part.view(x.shape).to(x.dtype) for part, x in zip(parts, tensors, strict=True))

    @outside_of_graphs
    def sum_with_gradient(self, x: Tensor) -> Tensor:
        return _Sum.apply(x, self)

    def max(self, x: Tensor) -> Tensor:
        return self._reduced(x, dist.ReduceOp.MAX)

    def logsumexp(self, x: Tensor) -> Tensor:
        largest = self.max(x)
        shift = largest.masked_fill(largest == -torch.inf, 0.0)
        return self.sum((x - shift).exp()).log() + shift

    @outside_of_graphs
    def share_gradient(self, x: Tensor, mean: bool) -> Tensor:
        return _SharedGradient.apply(x, self, mean)

    def _reduced(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        total = x.detach().clone()
        with self.waiting():
            dist.all_reduce(total, operation, group=self.group)
        return total


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, counts):
        ctx.group, ctx.counts = group, counts
        return group.gather(x, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.group.sum(grad).split(ctx.counts)[ctx.group.rank], None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.group.sum(grad), None


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group, mean):
        ctx.group, ctx.mean = group, mean
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        total = ctx.group.sum(grad)
        return total / ctx.group.size if ctx.mean else total, None, None


def as_bytes(x: Tensor) -> Tensor:
    """View x as bytes: not every backend moves every dtype."""
    return x.view(-1).view(torch.uint8) if x.dtype != torch.uint8 else x


def _portable(error: Exception) -> Exception:
    """Return the error, or one with its words if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error of anybody's makes pickle say
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
