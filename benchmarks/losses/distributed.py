"""The loss over the batch of several processes: time, and bytes sent, of a forward and backward at the embeddings.

N is the number of rows of all processes. The processes share this machine's cores, as many threads each as there are
for it; "ours alone" is one process with all of them. With several GPUs each process has one.
"""

import datetime
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks.harness.contender import Contender, Size
from benchmarks.harness.measure import compare_with_ours, record
from benchmarks.harness.results import ResultsFile, Row, table
from benchmarks.harness.timing import host_clock, interleave, latency_clock
from benchmarks.losses.cases import TEMPERATURE
from benchmarks.losses.contenders import CONTENDERS as ALONE
from ccl_fast import CCLLoss

CPU = torch.device("cpu")
CASE = "nt-xent distributed"
SIZES, QUICK_SIZES = (Size(2048, 128), Size(8192, 128), Size(32_768, 128)), (Size(512, 128),)
GPU_SIZES = tuple(Size(n, 128, torch.bfloat16) for n in (8192, 65_536, 262_144))
SECONDS, QUICK_SECONDS = 12.0, 1.0
PROCESSES = 2  # on a CPU
PATIENCE = datetime.timedelta(seconds=120)
# Largest relative difference of value and gradient from float64 with which a contender is admitted.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
ADMISSION_ROWS = 256


@dataclass
class DistributedRow(Row):
    processes: int = 1
    sent: int | None = None  # bytes on the loopback interface, by each process (on a CPU)


def _ours(exchange: str, backend: str = "auto") -> Callable[[Tensor], Tensor]:
    return CCLLoss(TEMPERATURE, process_group="world", exchange=exchange, backend=backend)


def _lightly() -> Callable[[Tensor], Tensor]:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(TEMPERATURE, gather_distributed=True)
    return lambda embeddings: loss(*embeddings.unbind(1))


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("ours", lambda _: _ours("all-gather"), "CCLLoss(process_group=...) without ids: NT-Xent"),
        Contender("ours ring", lambda _: _ours("ring"), 'the same with exchange="ring"'),
        Contender(
            "plain",
            lambda _: _ours("all-gather", "reference"),
            "our dense reference: an all-gather that autograd goes through, and the whole matrix on every process",
            arrays=lambda size: PROCESSES * ALONE["dense"].arrays(size),
        ),
        Contender(
            "lightly",
            lambda _: _lightly(),
            "its NTXentLoss with gather_distributed: the rows of a process against those of all",
            package="lightly",
            arrays=ALONE["lightly"].arrays,
        ),
    )
}
ALONE_NAME = "ours alone"


def run_cpu(quick: bool, directory: Path) -> str:
    sizes, seconds = (QUICK_SIZES, QUICK_SECONDS) if quick else (SIZES, SECONDS)
    return _run(CPU, PROCESSES, sizes, seconds, directory)


def run_gpu(dry_run: bool, directory: Path) -> str:
    if dry_run:
        return _run(CPU, PROCESSES, (Size(64, 16),), 0.0, directory)
    gpus = torch.cuda.device_count()
    if gpus < 2:
        return f"the loss over several processes needs two GPUs or more, here are {gpus}: nothing was measured"
    return _run(torch.device("cuda"), gpus, GPU_SIZES, SECONDS, directory)


def _run(device: torch.device, processes: int, sizes: tuple[Size, ...], seconds: float, directory: Path) -> str:
    file, all_rows = ResultsFile(f"{device.type}-distributed".replace("cuda", "gpu"), device, directory), []
    for size in sizes:
        names = [name for name, contender in CONTENDERS.items() if not contender.obstacle(size, device)]
        with tempfile.TemporaryDirectory() as folder:
            store, out = Path(folder, "store"), Path(folder, "out.pt")
            threads = torch.get_num_threads()
            mp.spawn(_process, (processes, device.type, threads, size, names, seconds, str(store), out), processes)
            errors, times, sent = torch.load(out)
        rows = {}
        for name in (*CONTENDERS, ALONE_NAME):
            row = rows[name] = DistributedRow(CASE, name, size.n, size.d, str(size.dtype).removeprefix("torch."))
            row.processes = 1 if name == ALONE_NAME else processes
            row.note = CONTENDERS[name].obstacle(size, device) or "" if name in CONTENDERS else ""
            row.error, row.sent = errors.get(name), sent.get(name)
            if row.error is not None and row.error > TOLERANCE[size.dtype]:
                row.note = f"wrong: relative error {row.error:.1e} against float64"
                times.pop(name, None)
            elif name in times:
                record(row, times[name])
        compare_with_ours(rows, times)
        file.add(list(rows.values()))
        all_rows += rows.values()
    columns = {"processes": lambda row: str(row.processes), "sent": lambda row: _mebibytes(row.sent)}
    return f"{table(all_rows, columns)}\n\n{file.path}"


def _mebibytes(x: int | None) -> str:
    return "" if x is None else f"{x / 2**20:.2f} MiB"


def _process(
    rank: int, processes: int, device: str, threads: int, size: Size, names: list[str], seconds: float, store: str, out
) -> None:
    """One of the processes. The first writes what was measured: errors, times and bytes by contender."""
    here = torch.device(device, rank) if device == "cuda" else CPU
    if device == "cuda":
        torch.cuda.set_device(here)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        torch.set_num_threads(max(1, threads // processes))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, f"file://{store}", PATIENCE, processes, rank)
    clock = latency_clock if device == "cuda" else host_clock

    losses = {name: CONTENDERS[name].build(None) for name in names}
    errors = {name: _error(loss, size, here, rank, processes) for name, loss in losses.items()}
    own = _rows(size, here).tensor_split(processes)[rank].clone().requires_grad_()

    def step_of(loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def step() -> None:
            torch.autograd.grad(loss(own), own)

        return step

    steps = {name: step_of(loss) for name, loss in losses.items()}
    sent = {}
    for name, step in steps.items():
        step()  # allocates
        if device == "cpu":
            dist.barrier()
            before = _loopback()
            step()
            dist.barrier()
            sent[name] = (_loopback() - before) // processes

    if rank == 0:  # alone, with all threads, while the others wait
        whole, alone = _rows(size, here).requires_grad_(), CCLLoss(TEMPERATURE)

        def with_all_threads() -> None:
            torch.set_num_threads(threads)
            torch.autograd.grad(alone(whole), whole)
            torch.set_num_threads(max(1, threads // processes))

        with_all_threads()
    steps[ALONE_NAME] = with_all_threads if rank == 0 else lambda: None

    def in_step(step: Callable[[], None]) -> float:
        dist.barrier()
        return clock(step)

    times = _together(steps, in_step, seconds, rank)
    if rank == 0:
        torch.save((errors, times, sent), out)
    dist.barrier()
    os._exit(0)  # gloo's threads sometimes abort where a process takes them down while others do


def _together(steps: dict, clock, seconds: float, rank: int) -> dict[str, list[float]]:
    """As `interleave`, with as many rounds on every process as the first one finds time for."""
    rounds = torch.zeros(1, dtype=torch.int64)
    if rank == 0:
        rounds += max(3, min(50, int(seconds / max(1e-9, sum(_one_round(steps, clock))))))
    else:
        _one_round(steps, clock)
    rounds = rounds.cuda() if not dist.get_backend_config().startswith("cpu") else rounds
    dist.broadcast(rounds, 0)
    return interleave(steps, clock, 0.0, least=int(rounds), most=int(rounds))


def _one_round(steps: dict, clock) -> list[float]:
    return [clock(step) for step in steps.values()]


def _rows(size: Size, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(size.n // 2, 2, size.d, generator=random).to(device, size.dtype)


def _error(loss: Callable[[Tensor], Tensor], size: Size, device: torch.device, rank: int, processes: int) -> float:
    """Relative, of value and gradient, on a small batch."""
    whole = _rows(Size(min(size.n, ADMISSION_ROWS), size.d, size.dtype), device)
    exact = whole.double().requires_grad_()
    value = CCLLoss(TEMPERATURE, backend="reference")(exact)
    (gradient,) = torch.autograd.grad(value, exact)
    own = whole.tensor_split(processes)[rank].clone().requires_grad_()
    found = loss(own)
    (of_own,) = torch.autograd.grad(found, own)
    # Not everyone returns the loss of the whole batch on every process; the mean over them is.
    mean = found.detach().double().reshape(1)
    dist.all_reduce(mean)
    expected = processes * gradient.tensor_split(processes)[rank]
    errors = torch.stack(
        [(mean / processes - value).abs()[0] / value.abs(), (of_own.double() - expected).norm() / expected.norm()]
    )
    worst = errors.max().detach().reshape(1)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def _loopback() -> int:
    """Bytes that the loopback interface has sent."""
    found = re.search(r"^\s*lo:\s*(.+)$", Path("/proc/net/dev").read_text(), re.MULTILINE)
    return int(found[1].split()[8]) if found else 0
