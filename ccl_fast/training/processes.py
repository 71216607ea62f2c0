"""The processes of a run: what they tell each other, who writes, and what becomes of one's error."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ccl_fast.errors import ArgumentError, PeerError, first_sentence

if TYPE_CHECKING:
    from ccl_fast.training.config import Precision

# How long the others wait for one that reads, or downloads, data: nobody knows how long that takes. A process that ends
# is noticed at once all the same.
PATIENCE = timedelta(days=7)

# DistributedDataParallel need not send buffers before every step: they are averaged after it. (Torch has renamed this.)
_BUFFERS = "forward_sync_buffers", "broadcast_buffers"
_UNSENT: dict[str, Any] = {
    next(name for name in _BUFFERS if name in inspect.signature(DistributedDataParallel).parameters): False
}

# Whether this process has met the others here: once they have left, they cannot meet again at the same address.
_met = False

T = TypeVar("T")


class Processes:
    """The processes that share a run; this class is one alone, which tells nobody and waits for nobody.

    All of them call the same methods in the same order.

    Attributes:
        rank, size: number of this process, and of processes.
        group: the ``process_group`` of losses and clustering.
        keys: what the random numbers of a step depend on besides seed and step.
    """

    rank, size = 0, 1
    group: str | None = None
    keys: tuple[int, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def part(self, n: int) -> slice:
        """Return which of n rows are this process's own. The parts follow each other by rank, and cover all rows."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        return [value]

    def largest(self, number: int) -> int:
        """Return the largest of the numbers of all processes: 1 if something is so on any, say."""
        return number

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows of all processes, one process's after the other's."""
        return rows

    def average_buffers(self, model: nn.Module) -> None:
        """Set running statistics to their mean over the processes; what is no floating-point number to the first's."""

    def together(self, *, patient: bool = False) -> contextlib.AbstractContextManager:
        """Wait at the end of ``with`` until all are done; an error that one meets in it is raised on all.

        Args:
            patient: wait as long as it takes, not for the run's timeout only.
        """
        return contextlib.nullcontext()

    def first(self, function: Callable[[], T], *, patient: bool = False) -> T:
        """Call the function on the first process alone, and return its result on all; so is its error raised."""
        return function()

    def waiting(self) -> contextlib.AbstractContextManager:
        """Turn what torch.distributed says of a lost process within ``with`` into a PeerError."""
        return contextlib.nullcontext()


ALONE = Processes()


class _Several(Processes):
    """The processes of torch.distributed's default group."""

    group = "world"

    def __init__(self, timeout: timedelta):
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.keys = (self.rank,)
        # Python objects travel on the host, whatever the device.
        self._groups: dict[bool, Any] = {
            patient: dist.new_group(backend="gloo", timeout=PATIENCE if patient else timeout)
            for patient in (False, True)
        }

    def everyone(self, value: T) -> list[T]:
        return self._everyone(value, patient=False)

    def _everyone(self, value: T, *, patient: bool) -> list[T]:
        values: list[Any] = [None] * self.size
        with self.waiting():
            dist.all_gather_object(values, value, group=self._groups[patient])
        return values

    def largest(self, number: int) -> int:
        return self._largest(number, patient=False)

    def _largest(self, number: int, *, patient: bool) -> int:
        largest = torch.tensor(int(number))
        with self.waiting():
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._groups[patient])
        return int(largest)

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self.everyone(rows.cpu())).to(rows.device)

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        if not buffers:
            return
        numbers = [buffer for buffer in buffers if buffer.is_floating_point()]
        others = [buffer for buffer in buffers if not buffer.is_floating_point()]
        # One message for all; float64 holds the whole numbers that occur, such as counts of batches.
        parts = [_flat(numbers, buffers) / self.size, _flat(others, buffers) * self.is_first]
        with self.waiting():
            dist.all_reduce(total := torch.cat(parts))
        ordered = [*numbers, *others]
        found = total.split([buffer.numel() for buffer in ordered])
        for buffer, values in zip(ordered, found, strict=True):
            buffer.copy_(values.view_as(buffer))

    @contextlib.contextmanager
    def together(self, *, patient: bool = False) -> Iterator[None]:
        own = None
        try:
            yield
        except PeerError:  # there is somebody who cannot be told
            raise
        except Exception as error:
            own = error
        if not self._largest(own is not None, patient=patient):
            return
        errors = self._everyone(None if own is None else _portable(own), patient=patient)
        raise own or next(error for error in errors if error is not None)

    def first(self, function: Callable[[], T], *, patient: bool = False) -> T:
        result: list[Any] = [None]
        with self.together(patient=patient):
            if self.is_first:
                result = [function()]
        with self.waiting():
            dist.broadcast_object_list(result, src=0, group=self._groups[patient])
        return result[0]

    def leave(self, *, everything: bool) -> None:
        """Leave the others, all at the same time; with ``everything`` also the default group."""
        for group in [None] if everything else self._groups.values():
            dist.destroy_process_group(group)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # The errors of gloo's own are plain ones.
            if isinstance(error, PeerError) or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                raise
            raise PeerError.of(error, self.rank, self.size) from error


def launched_size() -> int:
    """Return how many processes torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_alone(command: str) -> None:
    """Check that a command that runs on one process does.

    Raises:
        ArgumentError: torchrun has started several.
    """
    if launched_size() > 1:
        raise ArgumentError(f"{command}: expected one process, as only train runs on several, got {launched_size()}")


def find_device(name: str) -> torch.device:
    """Return the device of a name, or of "auto" the best of this machine.

    Raises:
        ArgumentError: there is no such device, or training does not run on it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(0, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("training runs on a CPU or a CUDA device")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f'device: expected "auto" or a device of this machine, got {name!r} ({reason})') from error


def alone(device: torch.device, precision: Precision) -> Fabric:
    """Make device and precision for one process, whoever else there is."""
    return Fabric(
        accelerator=device.type, devices=[device.index or 0] if device.type == "cuda" else 1, precision=precision
    )


@contextlib.contextmanager
def launched(device: str, precision: Precision, timeout: float) -> Iterator[tuple[Fabric, Processes]]:
    """Join, within ``with``, the processes that torchrun has started, if it has started several.

    Args:
        device: as for ``train``; of several processes each takes the GPU of its number on the machine.
        precision: as for ``train``.
        timeout: seconds after which a process that does not answer counts as lost.

    Raises:
        ArgumentError: there is no such device, or not enough of them.
        PeerError: another process has ended, or did not answer in time.
    """
    where = find_device(device)
    if launched_size() == 1:
        yield alone(where, precision), ALONE
        return
    here = _processes_of_machine()
    if where.type == "cuda" and (":" in device or torch.cuda.device_count() < here):
        expected = f'"cpu", or "cuda" (or "auto") and a GPU for each of the {here} processes of this machine'
        raise ArgumentError(f"device: expected {expected}, got {device!r} and {torch.cuda.device_count()} GPUs")
    strategy = DDPStrategy(
        cluster_environment=TorchElasticEnvironment(),
        process_group_backend="cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo",
        timeout=timedelta(seconds=timeout),
        **_UNSENT,
    )
    fabric = Fabric(
        accelerator=where.type,
        devices=here,
        num_nodes=launched_size() // here,
        strategy=strategy,
        precision=precision,
    )
    global _met
    ours = not dist.is_initialized()
    if ours and _met:
        expected = "one run in each process, or torch.distributed.init_process_group before the first"
        raise ArgumentError(f"torchrun: expected {expected}, got another run")
    _met = _met or ours
    with _quiet():  # Fabric greets at length
        try:
            fabric.launch()
        except dist.DistError as error:
            raise PeerError(
                f"the {launched_size()} processes have not found each other ({first_sentence(error)})"
            ) from error
    processes = _Several(timedelta(seconds=timeout))
    with processes.waiting():
        yield fabric, processes
    processes.leave(everything=ours)  # not after an error: it takes all of them, and one may be lost


def _processes_of_machine() -> int:
    """Return how many of torchrun's processes are on this machine, once the environment has what torchrun sets."""
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ]
    if missing:
        expected = f"RANK and LOCAL_RANK beside WORLD_SIZE={launched_size()} in the environment, as torchrun sets them"
        raise ArgumentError(f"torchrun: expected {expected}, got no {' and no '.join(missing)}")
    return int(os.environ.get("LOCAL_WORLD_SIZE", launched_size()))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave out logs that are no warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)


def _flat(tensors: list[Tensor], like: list[Tensor]) -> Tensor:
    """Return all their values, in float64, where ``like`` is."""
    return torch.cat([x.flatten() for x in tensors] or [like[0].new_empty(0)]).double()


def _portable(error: Exception) -> Exception:
    """Return the error, or one with its words if it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an error of anybody's makes pickle say
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
