"""K-means with scikit-learn's names."""

from __future__ import annotations

import contextlib
from numbers import Integral, Real
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_count, check_finite
from ccl_fast.clustering import empty_clusters
from ccl_fast.clustering.data import Data
from ccl_fast.clustering.lloyd import Solution, lloyd
from ccl_fast.clustering.seeding import k_means_plus_plus, random_rows
from ccl_fast.clustering.shards import Shards, digest
from ccl_fast.distributed import check_process_group, open_group
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import KMeansBackend, check_backend
from ccl_fast.ops.kmeans.assign import METRICS, Metric
from ccl_fast.ops.normalize import normalize_rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Init = Literal["k-means++", "random"]
SEEDINGS = {"k-means++": k_means_plus_plus, "random": random_rows}


class KMeans:
    r"""K-means clustering: minimise ``sum_i w_i d(x_i, mu_{y_i})`` over labels ``y`` and centres ``mu``.

    ``d(x, mu) = |x - mu|^2`` for ``metric="euclidean"``, the centres being the means of their clusters;
    ``d(x, mu) = 1 - <x, mu> / |x|`` for ``metric="cosine"`` (spherical k-means), the centres being unit vectors.

    Labels are exact: those of distances in float64, the lowest index on ties, whatever the dtype and the device (see
    :func:`ccl_fast.ops.kmeans_assign`), and they belong to the returned centres. Nothing is sub-sampled. The matrix of
    distances never exists: memory grows with N + K. All randomness comes from a private generator, and sums are taken
    in a fixed order: the same seed and data give the same bits on the same machine and number of threads, and torch's
    global generator is left alone. On a GPU the host reads whether the centres rest one iteration late, so that the
    device never waits.

    Args:
        n_clusters: K, the number of clusters.
        metric: "euclidean" or "cosine".
        init: "k-means++", "random" (no row is drawn twice by either), or the starting centres, a tensor ``[K, D]`` or
            ``[B, K, D]`` (a warm start).
        n_init: number of starts, of which the one with the lowest inertia is kept. A warm start runs once.
        max_iter: largest number of Lloyd iterations of one start.
        tol: stop when the centres' squared movement, summed over clusters, is at most ``tol`` times the mean
            variance of the features; 0: when no label changes.
        empty_cluster: how to treat a cluster without rows. "split": it is put beside the centre of the largest
            cluster, and shares its rows from then on; "farthest": it takes over the row farthest from its own centre,
            as in scikit-learn; "keep": its centre stays; "error": RuntimeError. "farthest" and "error" make the host
            wait for a GPU in every iteration.
        seed: seed of the private generator.
        batch_size: rows that are brought to ``device`` at a time; None: all at once. The result is that of all the
            rows, not of mini-batches, but for rounding. For data that do not fit into a GPU's memory.
        device: where to compute; None: where the data are.
        backend: "auto", "cuda" (the extension), "blocked" (plain torch) or "reference" (dense float64).
        verbose: show a progress bar (of the package tqdm); with a process group the first process's.
        process_group: over whose rows to cluster: None, those passed to ``fit``; a torch.distributed process group or
            "world" (the default group when ``fit`` is called), those that all its processes pass, see below.

    Attributes:
        cluster_centers_: ``[K, D]``, device of the data and their dtype (float32 for half precision).
        labels_: int64 ``[N]``, the nearest centre of every fitted row.
        inertia_: the minimised sum, a float.
        n_iter_: the number of Lloyd iterations run, an int.
        doubtful_: how many rows of the last assignment had to be decided in higher precision, an int.
        rechecked_: how many of these had to be compared with all centres again, an int.

    **With a process group** ``fit`` is a collective: every process passes a shard of the rows, of any size, also none,
    and gets the labels of these. Every other result is that of all the rows, to the same bits on every process.
    How many processes there are, and which of them has which rows, does not matter as long as the rows follow each
    other in the same order: random numbers belong to rows, and sums are float64 from the first row (but for those of
    the extension, whose pieces of 256 rows are float32's). An iteration exchanges ``8 B K (D + 1)`` bytes; rows do not
    travel, but for the candidates of the seeding. All arguments but ``batch_size`` and ``verbose`` must be the same on
    all processes. ``predict``, ``transform`` and ``score`` take the rows of one process, and exchange nothing.

    With data ``[B, N, D]``, B independent problems of one size are solved together, each as it would be alone; the
    attributes but ``doubtful_`` and ``rechecked_`` have B as first dimension, and ``inertia_`` and ``n_iter_`` are
    tensors ``[B]``.

    Distances are float32 (float64 for float64 data): beyond 1e19 they overflow and below 1e-20 they vanish, so scale
    such data first; labels are right all the same.

    Raises:
        ValueError: naming the argument, what was expected and what came; with a process group on every process.
        PeerError: another process has ended or does not answer.

    Papers: Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++: the advantages
    of careful seeding", 2007; Dhillon and Modha, "Concept decompositions for large sparse text data using
    clustering", 2001 (cosine).
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: Metric = "euclidean",
        init: Init | Tensor = "k-means++",
        n_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        empty_cluster: empty_clusters.Policy = "split",
        seed: int = 0,
        batch_size: int | None = None,
        device: torch.device | str | None = None,
        backend: KMeansBackend = "auto",
        verbose: bool = False,
        process_group: ProcessGroup | str | None = None,
    ):
        counts = {"n_clusters": n_clusters, "n_init": n_init, "max_iter": max_iter}
        if batch_size is not None:
            counts["batch_size"] = batch_size
        for name, value in counts.items():
            check_count(name, value)
        if not isinstance(seed, Integral) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise ArgumentError(f"seed: expected an integer >= 0 and below 2^63, got {seed!r}")
        check_choice("metric", metric, METRICS)
        check_choice("empty_cluster", empty_cluster, empty_clusters.POLICIES)
        check_backend("kmeans_assign", backend)
        if not isinstance(init, Tensor) and not (isinstance(init, str) and init in SEEDINGS):
            raise ArgumentError(f'init: expected "k-means++", "random" or a tensor of centres, got {init!r}')
        if not isinstance(tol, Real) or isinstance(tol, bool) or not tol >= 0:
            raise ArgumentError(f"tol: expected a number >= 0, got {tol!r}")
        check_process_group(process_group)
        self.n_clusters = int(n_clusters)
        self.metric: Metric = metric
        self.init: Init | Tensor = init
        self.n_init = int(n_init)
        self.max_iter = int(max_iter)
        self.tol = tol
        self.empty_cluster: empty_clusters.Policy = empty_cluster
        self.seed = int(seed)
        self.batch_size = None if batch_size is None else int(batch_size)
        self.device = device
        self.backend: KMeansBackend = backend
        self.verbose = verbose
        self.process_group = process_group

    @torch.no_grad()
    def fit(self, x: Tensor, sample_weight: Tensor | None = None) -> KMeans:
        """Find centres and labels.

        Args:
            x: floating point ``[N, D]`` or ``[B, N, D]``, finite, N >= K.
            sample_weight: w, ``[N]`` or ``[B, N]``, finite and >= 0, at least K of them positive; 1 by default.

        Returns:
            self.
        """
        group = open_group(self.process_group)
        with group.together():
            rows, weights = self._check_rows(x), self._check_weights(sample_weight, x)
        counts = group.check_everywhere(lambda: rows.shape[1], same=lambda: self._description(x, weights))
        shards = Shards(group, counts)
        self._check_size(x, shards.total)
        data = self._data(rows, weights, shards)
        if weights is not None:
            self._check_positive(weights, data)
        variance = data.variance()  # raises if a row is not finite
        with self._progress(group.is_first) as progress:
            best = None
            for start in self._starts(data):
                solution = lloyd(
                    data,
                    start,
                    max_iter=self.max_iter,
                    tol=self.tol,
                    variance=variance,
                    empty_cluster=self.empty_cluster,
                    progress=progress,
                )
                best = solution if best is None else best.or_better(solution)
        assert best is not None  # there is a start at least
        if not best.centers.isfinite().all():
            raise ArgumentError(f"x: expected values whose sums {data.dtype} can hold, got up to {data.largest():.3g}")
        self._set_attributes(best, x)
        return self

    def fit_predict(self, x: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """``fit(x, sample_weight).labels_``."""
        return self.fit(x, sample_weight).labels_

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Return the nearest centre of every row of x, ``[M, D]`` or ``[B, M, D]``: int64 ``[M]`` or ``[B, M]``."""
        data, centers = self._new_data(x)
        labels = data.nearest(centers).to(x.device)
        return labels if x.ndim == 3 else labels[0]

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """Return the distances of rows of x, ``[M, D]``, to all centres, ``[M, K]``: ``|x - mu|`` or ``1 - cosine``."""
        data, centers = self._new_data(x)
        if x.numel() == 0:
            return torch.empty(*x.shape[:-1], self.n_clusters, dtype=data.dtype, device=x.device)
        distances = [_all_distances(chunk.x, centers, self.metric).to(x.device) for chunk in data.chunks()]
        return torch.cat(distances, 1) if x.ndim == 3 else torch.cat(distances, 1)[0]

    @torch.no_grad()
    def score(self, x: Tensor, sample_weight: Tensor | None = None) -> float | Tensor:
        """Return minus the weighted sum of the distances of the rows of x to their nearest centres."""
        if not self._check_rows(x).shape[1]:
            raise ArgumentError("x: expected at least 1 row, got 0")
        weights = self._check_weights(sample_weight, x)
        data, centers = self._new_data(x, weights)
        inertia = data.inertia(centers, data.nearest(centers)).to(x.device)
        return -inertia if x.ndim == 3 else -inertia.item()

    def _description(self, x: Tensor, weights: Tensor | None) -> dict:
        """Describe what must be the same on every process, by name."""
        names = ("n_clusters", "metric", "n_init", "max_iter", "tol", "empty_cluster", "seed", "backend")
        return {
            "x": f"[{', '.join(map(str, [*x.shape[:-2], 'rows', x.shape[-1]]))}]",
            "x.dtype": str(x.dtype),
            "sample_weight": None if weights is None else "given",
            "init": digest(self.init) if isinstance(self.init, Tensor) else self.init,
            "device": self._device(x).type,
            **{name: getattr(self, name) for name in names},
        }

    def _check_rows(self, x: Tensor) -> Tensor:
        """Check the rows, and return them as [problems, rows, d], detached."""
        if not isinstance(x, Tensor) or x.ndim not in (2, 3) or not x.is_floating_point() or x.element_size() < 2:
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ArgumentError(f"x: expected a floating-point tensor [rows, d] or [problems, rows, d], got {got}")
        return x.detach() if x.ndim == 3 else x.detach()[None]

    def _check_size(self, x: Tensor, total: int) -> None:
        if total < self.n_clusters:
            raise ArgumentError(f"x: expected at least n_clusters={self.n_clusters} rows, got {total}")
        if 0 in (*x.shape[:-2], x.shape[-1]):
            raise ArgumentError(f"x: expected at least one problem and one feature, got shape {list(x.shape)}")

    def _check_weights(self, weights: Tensor | None, x: Tensor) -> Tensor | None:
        """Check the weights, and return them as [problems, rows], detached."""
        if weights is None:
            return None
        if not isinstance(weights, Tensor) or weights.shape != x.shape[:-1] or not weights.is_floating_point():
            got = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
            raise ArgumentError(f"sample_weight: expected a floating-point tensor {list(x.shape[:-1])}, got {got}")
        check_finite("sample_weight", weights)
        if (weights < 0).any():
            raise ArgumentError(f"sample_weight: expected weights >= 0, got {weights.min().item()}")
        return weights.detach() if weights.ndim == 2 else weights.detach()[None]

    def _check_positive(self, weights: Tensor, data: Data) -> None:
        positive = data.group.sum((weights > 0).sum(1).to(data.device)).min().item()
        if positive < self.n_clusters:
            least = f"n_clusters={self.n_clusters} positive weights"
            raise ArgumentError(f"sample_weight: expected at least {least}, got {positive}")

    def _device(self, x: Tensor) -> torch.device:
        return x.device if self.device is None else torch.empty(0, device=self.device).device

    def _data(self, rows: Tensor, weights: Tensor | None, shards: Shards | None = None) -> Data:
        return Data(rows, weights, self.metric, self.batch_size, self._device(rows), self.backend, shards)

    def _new_data(self, x: Tensor, weights: Tensor | None = None) -> tuple[Data, Tensor]:
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans has no centres yet: call fit first")
        rows, centers = self._check_rows(x), self.cluster_centers_
        if x.shape[-1] != centers.shape[-1]:
            raise ArgumentError(f"x: expected {centers.shape[-1]} features as in fit, got {x.shape[-1]}")
        if x.shape[:-2] != centers.shape[:-2]:
            problems = f"[{len(centers)}, rows, features]" if centers.ndim == 3 else "[rows, features]"
            raise ArgumentError(f"x: expected shape {problems} as in fit, got {list(x.shape)}")
        check_finite("x", x)
        data = self._data(rows, weights)
        return data, (centers if centers.ndim == 3 else centers[None]).to(device=data.device, dtype=data.dtype)

    def _starts(self, data: Data):
        if isinstance(self.init, Tensor):
            yield self._given_centers(data, self.init)
            return
        generators = [torch.Generator().manual_seed(self.seed) for _ in range(data.problems)]
        for _ in range(self.n_init):
            yield SEEDINGS[self.init](data, self.n_clusters, generators)

    def _given_centers(self, data: Data, init: Tensor) -> Tensor:
        expected = (data.problems, self.n_clusters, data.d)
        centers = init.detach()[None] if init.ndim == 2 else init.detach()
        if centers.shape != expected or not centers.is_floating_point():
            wanted = list(expected[1:]) if data.problems == 1 else list(expected)
            got = f"{init.dtype} {list(init.shape)}"
            raise ArgumentError(f"init: expected floating-point centres {wanted}, got {got}")
        check_finite("init", centers)
        centers = centers.to(device=data.device, dtype=data.dtype)
        return normalize_rows(centers) if self.metric == "cosine" else centers

    def _set_attributes(self, best: Solution, x: Tensor) -> None:
        centers, labels, inertia, n_iter = (value.to(x.device) for value in best[:4])
        if x.ndim == 2:
            centers, labels, inertia, n_iter = centers[0], labels[0], inertia.item(), n_iter.item()
        self.cluster_centers_, self.labels_, self.inertia_, self.n_iter_ = centers, labels, inertia, n_iter
        self.doubtful_, self.rechecked_ = best.rechecked.tolist()

    @contextlib.contextmanager
    def _progress(self, is_first: bool):
        if not (self.verbose and is_first):
            yield lambda changed: None
            return
        from tqdm import tqdm

        with tqdm(desc=f"k-means, K={self.n_clusters}", unit=" iterations") as bar:

            def advance(changed: Tensor) -> None:
                bar.set_postfix(labels_changed=int(changed.sum()), refresh=False)
                bar.update()

            yield advance


@torch.autocast("cuda", enabled=False)
@torch.autocast("cpu", enabled=False)
def _all_distances(x: Tensor, centers: Tensor, metric: str) -> Tensor:
    x = x.to(centers.dtype)
    if metric == "cosine":
        return (1 - normalize_rows(x) @ normalize_rows(centers).mT).clamp_(min=0)
    # |x|^2 - 2<x,c> + |c|^2 cancels badly far from the origin, so the origin moves to the centres.
    origin = centers.mean(1, keepdim=True)
    x, centers = x - origin, centers - origin
    square = x.square().sum(2)[:, :, None] + centers.square().sum(2)[:, None]
    return torch.baddbmm(square, x, centers.mT, alpha=-2).clamp_(min=0).sqrt_()
