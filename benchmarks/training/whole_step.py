"""A whole training step, on a CPU and on a GPU: what a loss costs beside the network that it trains.

A step is forward and backward of encoder, head and CCL loss, with cluster ids and centres, and the optimiser's step.
The two views of every image are given: loading, augmentation and clustering are not measured. N is the number of
images; the network and the loss see twice as many rows.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.budget import Run
from benchmarks.harness.contender import Contender, Size
from benchmarks.harness.measure import compare_with_ours, failure_noted, record
from benchmarks.harness.memory import forget_peak, peak_on_gpu, status
from benchmarks.harness.results import ResultsFile, Row, table
from benchmarks.harness.timing import Clock, Step, host_clock, interleave, paired_ratio, percentiles
from benchmarks.losses.cases import CASES, Inputs
from benchmarks.losses.contenders import CONTENDERS as LOSSES
from ccl_fast.models import Model

CPU = torch.device("cpu")
CASE = CASES["ccl"]
VIEWS = 2
WARM_UP_IMAGES = 64  # of a process whose memory is measured
# Where a contender is admitted.
AGREEMENT_IMAGES, AGREEMENT_MICRO_BATCH = 64, 16
# Of the gradient of the encoder's weights. In bfloat16 the dense loss itself errs by up to 0.027: twice that.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}

SIZES, QUICK_SIZES, DRY_SIZES = (256, 1024, 4096, 16_384), (256,), (8, 16, 64)
GPU_SIZES = (256, 1024, 4096, 16_384, 65_536)
CPU_SECONDS, QUICK_SECONDS = 40.0, 0.0
GPU_SECONDS, GPU_SECONDS_PER_SIZE = 120.0, 3.0
CALLS = 6  # of a step at least: warm-up, three rounds, memory, one to spare


class Batch(NamedTuple):
    views: Tensor  # [views of all images, c, h, w]; an image's views follow one another
    inputs: Inputs  # of the loss; the embeddings are random ones, for the loss alone


@dataclass(frozen=True)
class Workload:
    """The network, and how it is trained."""

    backbone: str
    shape: tuple[int, int, int]
    d: int
    dtype: torch.dtype  # bfloat16: under autocast, and the loss gets the embeddings as they come out of it
    micro_batch: int  # images
    # That autograd keeps for the backward pass of a view, as counted by saved_tensors_hooks. With what lives for a
    # moment the peak was up to 1.5 times as much on a CPU, which MEMORY_SHARE leaves room for.
    activation_bytes: int
    clusters: int = 128

    def batch(self, n: int, device: torch.device) -> Batch:
        """Normal random numbers (never zeros: they run faster than data), ids uniform over the clusters."""
        random = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random, device=device)

        views = normal(VIEWS * n, *self.shape).contiguous(memory_format=_memory_format(device))
        embeddings = normal(n, VIEWS, self.d).to(self.dtype).requires_grad_()
        ids = torch.randint(self.clusters, (n,), generator=random, device=device)
        return Batch(views, Inputs(embeddings, ids, normal(self.clusters, self.d)))

    def model(self, device: torch.device) -> Model:
        """With the same weights every time."""
        model = Model(self.backbone, self.shape, self.d).to(device, memory_format=_memory_format(device))
        if self.dtype != torch.float32:
            # Around the network alone, and left after every call: casts of the weights that autocast made under
            # no_grad, where gradients are cached, must not be taken for those of the next call.
            model.forward = torch.autocast(device.type, dtype=self.dtype)(model.forward)
        return model

    def arrays(self, contender: "TrainingContender", n: int) -> int:
        """Bytes of a step's activations and of the N x N arrays of its loss, which are there at the same time."""
        at_a_time = min(n, self.micro_batch) if contender.cached else n
        return contender.arrays(Size(VIEWS * n, self.d)) + VIEWS * at_a_time * self.activation_bytes


ON_CPU = Workload("small", (1, 28, 28), 64, torch.float32, micro_batch=128, activation_bytes=90 * 2**10)
ON_GPU = Workload("resnet18", (3, 32, 32), 128, torch.bfloat16, micro_batch=1024, activation_bytes=2300 * 2**10)
DRY = Workload("small", (3, 8, 8), 16, torch.bfloat16, micro_batch=8, activation_bytes=5 * 2**10, clusters=8)


@dataclass(frozen=True, kw_only=True)
class TrainingContender(Contender):
    loss: str  # the contender of the losses' benchmark that it trains with
    cached: bool  # gradients: the network sees a micro-batch at a time, twice


def _contender(name: str, loss: str, cached: bool) -> TrainingContender:
    how = "ccl_fast.training.cached_backward, BatchNorm by micro-batch" if cached else "the whole batch at once"
    backend = LOSSES[loss]
    return TrainingContender(
        name, backend.build, f"{backend.fairness}; {how}", arrays=backend.arrays, loss=loss, cached=cached
    )


# Ours first: should the other leave the device in a bad state, our figures are on disk.
CONTENDERS = {
    name: _contender(name, loss, cached)
    for name, loss, cached in (
        ("ours", "ours", False),
        ("ours cached", "ours", True),
        ("dense", "dense", False),
        ("dense cached", "dense", True),
    )
}


@dataclass
class TrainingRow(Row):
    """`n` counts images, `to_ours` compares with ours on the whole batch, `error` is of the encoder's gradient."""

    network: str = ""
    setting: str = ""  # of the contender: what makes the comparison fair
    centers: int = 0
    micro_batch: int | None = None  # images that pass the network at a time; None: all
    images_per_second: float | None = None
    loss_p50: float | None = None  # seconds of forward and backward of the loss alone
    loss_share: float | None = None  # of the step's time, median over the rounds
    loss_peak_bytes: int | None = None  # of the loss alone, above its inputs


class Training:
    """A contender with a model and an optimiser of its own."""

    def __init__(self, workload: Workload, contender: TrainingContender, batch: Batch):
        device = batch.views.device
        self.workload, self.contender, self.batch = workload, contender, batch
        self.model = workload.model(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True if device.type == "cuda" else None)
        self.loss = contender.build(CASE)

    def backward(self) -> None:
        if self.contender.cached:
            from ccl_fast.training import cached_backward  # needs the extra "train"

            cached_backward(self.model, self.batch.views, self._loss_of, VIEWS * self.workload.micro_batch)
        else:
            self._loss_of(self.model(self.batch.views)).backward()

    def step(self) -> None:
        self.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # last, so that no gradients lie in memory between steps

    def loss_alone(self) -> None:
        CASE.step(self.loss, self.batch.inputs)()

    def _loss_of(self, embeddings: Tensor) -> Tensor:
        return self.loss(self.batch.inputs._replace(embeddings=embeddings.unflatten(0, (-1, VIEWS))))


@functools.cache
def relative_error(contender: TrainingContender, workload: Workload, device: torch.device) -> float:
    """Of the gradient of the encoder's weights, in the 2-norm, against the dense float64 loss behind the same network.

    That network has the workload's precision, for its own rounding is the same for all contenders and would hide what
    the loss does: in float32 it flips a ReLU now and then (1e-3), in bfloat16 it is a third of a ResNet-18's gradient.
    Where gradients are cached it normalises every micro-batch by itself, in one graph.
    """
    workload = replace(workload, micro_batch=AGREEMENT_MICRO_BATCH)
    batch = workload.batch(AGREEMENT_IMAGES, device)
    training = Training(workload, contender, batch)
    training.backward()
    network = workload.model(device)
    at_a_time = AGREEMENT_MICRO_BATCH if contender.cached else AGREEMENT_IMAGES
    embeddings = torch.cat([network(block) for block in batch.views.split(VIEWS * at_a_time)]).double()
    ids, centers = batch.inputs.cluster_ids, batch.inputs.centers.double()
    CASE.loss("reference")(embeddings.unflatten(0, (-1, VIEWS)), ids, centers).backward()
    truth, found = _encoder_gradient(network), _encoder_gradient(training.model)
    return ((found - truth).norm() / truth.norm()).nan_to_num(nan=torch.inf).item()


def measure(
    workload: Workload,
    n: int,
    device: torch.device,
    clock: Clock,
    seconds: float,
    skip: dict[str, str],
    peak: Callable[[Training, str], int | None] | None = None,
) -> list[TrainingRow]:
    """A row for every contender. `peak` measures the memory of a training's "step" or "loss_alone"."""
    batch = workload.batch(n, device)
    rows = {name: _row(workload, contender, n) for name, contender in CONTENDERS.items()}
    trainings: dict[str, Training] = {}
    for name, row in rows.items():
        contender = CONTENDERS[name]
        row.note = skip.get(name) or _obstacle(workload, contender, n, device) or ""
        if row.note:
            continue
        with failure_noted(row):
            row.error = relative_error(contender, workload, device)
            if not row.error <= TOLERANCE[workload.dtype]:
                row.note = f"wrong: relative error {row.error:.1e} against float64"
                continue
            training = Training(workload, contender, batch)
            clock(training.step)  # compiles and allocates
            clock(training.loss_alone)
            trainings[name] = training

    steps: dict[str, Step] = {name: training.step for name, training in trainings.items()}
    # One for each loss, whoever trains with it.
    losses = {_alone(training.contender.loss): training for training in trainings.values()}
    times = interleave(steps | {name: training.loss_alone for name, training in losses.items()}, clock, seconds)
    loss_peaks = {name: peak(training, "loss_alone") for name, training in losses.items()} if peak else {}
    for name, training in trainings.items():
        row, loss = rows[name], _alone(training.contender.loss)
        record(row, times[name])
        row.images_per_second = n / row.p50
        row.loss_p50, row.loss_share = percentiles(times[loss])[1], paired_ratio(times[loss], times[name])
        if peak:
            row.peak_bytes, row.loss_peak_bytes = peak(training, "step"), loss_peaks[loss]
    compare_with_ours(rows, {name: times[name] for name in steps})
    return list(rows.values())


def run_cpu(quick: bool, directory: Path) -> str:
    """Time (and, unless quick, memory) of all contenders and batch sizes; the table."""
    file, all_rows = ResultsFile("cpu-training", CPU, directory), []
    seconds, peak = (QUICK_SECONDS, None) if quick else (CPU_SECONDS, _peak_on_cpu)
    for n in QUICK_SIZES if quick else SIZES:
        rows = measure(ON_CPU, n, CPU, host_clock, seconds, {}, peak)
        file.add(rows)
        all_rows += rows
    return f"{table(all_rows, COLUMNS)}\n\n{file.path}"


def run_gpu(dry_run: bool, directory: Path) -> str:
    """All rows, written as soon as they are measured; the table. A dry run adds what a GPU would do."""
    report = _GpuRun("gpu-training", torch.device("cpu" if dry_run else "cuda"), directory).table()
    return f"{report}\n\nOn a GPU:\n{_plan()}" if dry_run else report


class _GpuRun(Run):
    def table(self) -> str:
        self.deadline = time.monotonic() + GPU_SECONDS
        sizes, workload = (GPU_SIZES, ON_GPU) if self.on_gpu else (DRY_SIZES, DRY)
        seconds = GPU_SECONDS_PER_SIZE if self.on_gpu else 0.0
        for n in sizes:
            skip = self.skip({name: (name, n) for name in CONTENDERS}, CALLS)
            rows = measure(workload, n, self.device, self.clock, seconds, skip, _peak_on_gpu if self.on_gpu else None)
            self.add(rows)
            for row in rows:
                if row.p50 is not None:
                    self._foresee(row, sizes)
        return f"{table(self.rows, COLUMNS)}\n\n{self.file.path}"

    def _foresee(self, row: TrainingRow, sizes: tuple[int, ...]) -> None:
        """The pace of the sizes to come: the network's time grows with N, that of the loss with its square."""
        for n in sizes:
            growth = n / row.n
            of_network = max(0.0, row.p50 - row.loss_p50)
            self.pace[row.contender, n] = of_network * growth + row.loss_p50 * growth**2


def _row(workload: Workload, contender: TrainingContender, n: int) -> TrainingRow:
    row = TrainingRow("training step", contender.name, n, workload.d, str(workload.dtype).removeprefix("torch."))
    shape = "x".join(map(str, workload.shape))
    row.network = f"{workload.backbone} and a head, {VIEWS} given views of {shape}, AdamW"
    row.setting, row.centers = contender.fairness, workload.clusters
    row.micro_batch = workload.micro_batch if contender.cached else None
    return row


def _obstacle(workload: Workload, contender: TrainingContender, n: int, device: torch.device) -> str | None:
    if _is_whole(workload, contender, n):
        return "a micro-batch holds the whole batch"
    needed = workload.arrays(contender, n)
    return replace(contender, arrays=lambda _: needed).obstacle(Size(n, workload.d), device)


def _alone(loss: str) -> str:
    return f"{loss}: loss alone"


def _encoder_gradient(model: Model) -> Tensor:
    return torch.cat([parameter.grad.double().flatten() for parameter in model.encoder.parameters()])


def _memory_format(device: torch.device) -> torch.memory_format:
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def _peak_on_gpu(training: Training, what: str) -> int:
    return peak_on_gpu(getattr(training, what))


def _peak_on_cpu(training: Training, what: str) -> int | None:
    """Of the same in a process of its own, with the network `ON_CPU`; None if that process died."""
    arguments = (training.contender.name, str(len(training.batch.inputs.cluster_ids)), what)
    command = [sys.executable, "-m", "benchmarks.training.whole_step", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def _peak_of_this_process(contender: TrainingContender, n: int, what: str) -> int:
    """The growth of the resident size above weights, optimiser and batch."""
    training = Training(ON_CPU, contender, ON_CPU.batch(min(n, WARM_UP_IMAGES), CPU))
    getattr(training, what)()  # libraries load, threads start, the optimiser makes its state
    training.batch = ON_CPU.batch(n, CPU)
    before = forget_peak()
    getattr(training, what)()
    return max(0, status("VmHWM") - before)


def _plan() -> str:
    return "\n".join(
        f"{ON_GPU.backbone}, {n:,} images: {name}, arrays of {ON_GPU.arrays(contender, n) / 2**30:,.1f} GiB"
        for n in GPU_SIZES
        for name, contender in CONTENDERS.items()
        if not _is_whole(ON_GPU, contender, n)
    )


def _is_whole(workload: Workload, contender: TrainingContender, n: int) -> bool:
    """Gradient caching with nothing to cache."""
    return contender.cached and n <= workload.micro_batch


# Of the printed table, instead of those of the losses.
COLUMNS = {
    "images/s": lambda row: "" if row.images_per_second is None else f"{row.images_per_second:,.0f}",
    "loss": lambda row: "" if row.loss_share is None else f"{row.loss_share:.1%}",
    "loss's peak": lambda row: "" if row.loss_peak_bytes is None else f"{row.loss_peak_bytes / 2**20:,.1f} MiB",
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("n", type=int)
    parser.add_argument("what", choices=("step", "loss_alone"))
    a = parser.parse_args()
    print(_peak_of_this_process(CONTENDERS[a.contender], a.n, a.what))
