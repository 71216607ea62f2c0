"""The start of a run: its device and, if torchrun has started several processes, their group."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from ccl_fast.distributed import NO_GROUP, Group, TorchGroup
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
def launched(device: str, precision: Precision, timeout: float) -> Iterator[tuple[Fabric, Group]]:
    """Join, within ``with``, the processes that torchrun has started, if it has started several.

    Args:
        device: as for ``train``; of several processes each takes the GPU of its number on the machine.
        precision: as for ``train``.
        timeout: seconds after which a process that does not answer counts as lost; of a default group that is there
            already its own timeout counts.

    Raises:
        ArgumentError: there is no such device, or not enough of them.
        PeerError: another process has ended, or did not answer in time.
    """
    where = find_device(device)
    if launched_size() == 1:
        yield alone(where, precision), NO_GROUP
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
    patient: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    group = TorchGroup("world", patient)
    with group.waiting():
        yield fabric, group
    # Not after an error: it takes all of them, and one may be lost.
    dist.destroy_process_group(None if ours else patient)


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
