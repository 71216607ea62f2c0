"""K-means step by step: every function of the CUDA extension by itself, and how many rows were in doubt."""

import contextlib
import statistics
import time
from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from benchmarks.clustering.cases import CASES
from benchmarks.harness.contender import Size
from benchmarks.harvest import plan
from benchmarks.harvest.build import use_emulation
from benchmarks.harvest.plan import Clustering
from benchmarks.harvest.run import Harvest
from ccl_fast.kernels import extension
from ccl_fast.ops.kmeans.assign import prepare_rows
from ccl_fast.ops.kmeans.update import sum_by_cluster

EMULATED_D, EMULATED_K = 130, 20  # at most, in a dry run
REPETITIONS = 3
DOUBTS = ("doubtful", "rechecked")  # rows that the certificate left open; of them, those that met all centres again
BUSY = 1.0  # seconds after which no repetition more is begun


def run(harvest: Harvest) -> None:
    use_emulation(harvest)
    for clustering in plan.CLUSTERINGS:
        iterate(harvest, clustering)


def iterate(harvest: Harvest, clustering: Clustering) -> None:
    """A line for the first iteration and one for the last."""
    lloyd = Lloyd(harvest, clustering)
    n, d, k, dtype = clustering
    for number in range(1, plan.ITERATIONS + 1):
        key = {"case": "k-means", "n": n, "d": d, "clusters": k, "dtype": dtype, "iteration": number}
        if number in (1, plan.ITERATIONS):
            harvest.record(key, partial(lloyd.next, timed=True))
        elif harvest.left > 2:
            with contextlib.suppress(Exception):  # the next line will tell
                lloyd.next(timed=False)


class Lloyd:
    """The iterations of one clustering, from some of its rows as centres."""

    def __init__(self, harvest: Harvest, clustering: Clustering):
        self.harvest, self.clustering, self.centers = harvest, clustering, None

    def next(self, timed: bool) -> dict:
        if self.centers is None:
            n, d, k, dtype = self.clustering
            if self.harvest.dry_run:
                n, d, k = self.harvest.rows(n), min(d, EMULATED_D), EMULATED_K
            self.x, centers = CASES["k-means iteration"].inputs(
                Size(n, d, getattr(torch, dtype), k), self.harvest.device
            )
            self.centers = centers.float()
        self.centers, found = iteration(self.harvest, self.x, self.centers, timed)
        return found


def iteration(harvest: Harvest, x: Tensor, centers: Tensor, timed: bool) -> tuple[Tensor, dict]:
    """The next centres; where it is timed, median seconds of each function and of all, and the rows in doubt."""
    backend = "cuda" if extension.module is not None else "blocked"
    times, begin = defaultdict(list), time.monotonic()
    while True:
        with stopwatch(harvest) as watch:
            prepared = prepare_rows(x[None], metric="euclidean", backend=backend)
            watch.mark("prepare")  # what comes once for all iterations: the rows packed, and their mean and range
            nearest = prepared.nearest(centers[None])
            watch.mark("nearest")
            sums, sizes = sum_by_cluster(x[None], nearest[0], len(centers), None, backend)
            watch.mark("means")
        for name, seconds in watch.seconds().items():
            times[name].append(seconds)
        if not timed or len(times["means"]) == REPETITIONS or time.monotonic() - begin > BUSY:
            break
    means = torch.where(sizes[0, :, None] > 0, sums[0] / sizes[0, :, None], centers.double()).float()
    found = {"backend": backend, "note": "" if backend == "cuda" else extension.missing}
    return means, found | doubts(nearest) | {f"{name} p50": statistics.median(t) for name, t in times.items()}


def doubts(nearest: tuple[Tensor, Tensor]) -> dict[str, int]:
    """What `nearest` tells besides the labels."""
    counts = nearest[1].reshape(-1).tolist()
    return dict(zip(DOUBTS[-len(counts) :], counts, strict=True))


class Watch:
    """Seconds by name: between marks, and of every call of the extension. On a GPU by events, without waiting."""

    def __init__(self, on_gpu: bool):
        self.on_gpu, self.spans = on_gpu, []
        self.last = self.now()

    def now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def mark(self, name: str) -> None:
        now = self.now()
        self.spans.append((name, self.last, now))
        self.last = now

    def seconds(self) -> dict[str, float]:
        if self.on_gpu:
            torch.cuda.synchronize()
        total = defaultdict(float)
        for name, start, end in self.spans:
            total[name] += start.elapsed_time(end) / 1e3 if self.on_gpu else end - start
        return total


class TimedExtension:
    """The extension, whose functions are timed."""

    def __init__(self, module, watch: Watch):
        self._module, self._watch = module, watch

    def __getattr__(self, name: str):
        found, watch = getattr(self._module, name), self._watch
        if not name.startswith("kmeans_"):
            return found

        def timed(*arguments):
            start, what = watch.now(), name.removeprefix("kmeans_")
            if what == "pack" and not any(span == "prepare" for span, *_ in watch.spans):
                what = "pack rows"  # the centres come later
            found(*arguments)
            watch.spans.append((what, start, watch.now()))

        return timed


@contextlib.contextmanager
def stopwatch(harvest: Harvest):
    module, watch = extension.module, Watch(not harvest.dry_run)
    if module is not None:
        extension.module = TimedExtension(module, watch)
    try:
        yield watch
    finally:
        extension.module = module
