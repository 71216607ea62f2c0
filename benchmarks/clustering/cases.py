"""The registry of k-means cases: how far a run goes, from which starting centres, on which rows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.contender import Size
from benchmarks.harness.timing import Step

ITERATIONS = 10
# Standard deviation of the blobs' centres; that of a blob is 1. They overlap, so that no run rests within ITERATIONS.
SPREAD = 0.3


class Rows(NamedTuple):
    x: Tensor  # [n, d]
    centers: Tensor  # [clusters, d]: different rows, with which a run starts unless its case says otherwise


class Outcome(NamedTuple):
    centers: Tensor  # [clusters, d]
    iterations: int  # that were run
    rechecked: int | None = None  # rows of the last assignment that were compared with all centres again


Run = Callable[[Rows], Outcome]


@dataclass(frozen=True)
class KMeansCase:
    """Lloyd's iterations, as many for everyone; `contenders` are names in `contenders.CONTENDERS`. None: `predict`."""

    name: str
    contenders: tuple[str, ...]
    iterations: int = ITERATIONS
    final_labels: bool = True  # those of the returned centres: one assignment more
    seeding: str | None = None  # as our KMeans calls it; None: the centres are given
    starts: int = 1  # of which the best is kept; several for few rows only

    @property
    def assignments(self) -> int:
        """N x K x D products that the iterations cannot do without; seeding comes on top."""
        return self.starts * self.iterations + self.final_labels

    def inputs(self, size: Size, device: torch.device, seed: int = 0) -> Rows:
        """As many overlapping Gaussian blobs as there are clusters."""
        random = torch.Generator(device).manual_seed(seed)
        blobs = SPREAD * torch.randn(size.clusters, size.d, generator=random, device=device)
        of_blob = torch.randint(size.clusters, (size.n,), generator=random, device=device)
        x = torch.randn(size.n, size.d, generator=random, device=device).add_(blobs[of_blob]).to(size.dtype)
        chosen = torch.randperm(size.n, generator=random, device=device)[: size.clusters]
        return Rows(x, x[chosen])

    def step(self, run: Run, inputs: Rows) -> Step:
        return lambda: run(inputs)


ON_CPU, ON_GPU, ON_BOTH = ("faiss", "scikit-learn"), ("flash-kmeans", "faiss-gpu"), ("fast-pytorch-kmeans",)
CASES = {
    case.name: case
    for case in (
        KMeansCase(
            "k-means iteration", ("ours", *ON_CPU, *ON_GPU, *ON_BOTH, "torch"), iterations=1, final_labels=False
        ),
        KMeansCase("k-means fit", ("ours", *ON_CPU, *ON_GPU, *ON_BOTH, "torch")),
        KMeansCase("k-means predict", ("ours", *ON_CPU), iterations=0),
        KMeansCase("k-means ten random starts", ("ours", *ON_CPU), seeding="random", starts=10),
        KMeansCase("k-means random start", ("ours", *ON_CPU, *ON_GPU, *ON_BOTH), seeding="random"),
        KMeansCase("k-means++ start", ("ours", "faiss"), seeding="plain-k-means++"),
        KMeansCase("greedy k-means++ start", ("ours", "scikit-learn"), seeding="k-means++"),
    )
}
