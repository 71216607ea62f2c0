"""Lloyd's k-means in plain torch, with scikit-learn's names."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Largest number of entries of one block of the N x K distance matrix.
BLOCK_ENTRIES = 1 << 22


class KMeans:
    r"""K-means clustering: minimise ``sum_i d(x_i, mu_{y_i})`` over labels ``y`` and centres ``mu``.

    ``d(x, mu) = |x - mu|^2`` for ``metric="euclidean"``, the centres being the means of their clusters;
    ``d(x, mu) = 1 - <x/|x|, mu>`` for ``metric="cosine"`` (spherical k-means), the centres being unit vectors.

    An empty cluster takes over the sample farthest from its own centre. The labels always belong to the returned
    centres. Rows are compared with the centres in blocks, so memory grows with N + K, not with N K. All randomness
    comes from a private generator: the same seed and data give the same result, and torch's global generator is
    left alone.

    Args:
        n_clusters: K, the number of clusters.
        metric: "euclidean" or "cosine".
        init: "k-means++" (no sample is drawn twice), or the starting centres, a tensor [K, D] (a warm start).
        n_init: number of k-means++ starts, of which the one with the lowest inertia is kept. A warm start runs once.
        max_iter: largest number of Lloyd iterations of one start.
        tol: stop when the centres' squared movement, summed over clusters, is at most ``tol`` times the mean
            variance of the features.
        seed: seed of the private generator.

    Attributes:
        cluster_centers_: [K, D], dtype and device of the data (half precision is raised to float32).
        labels_: int64 [N], the nearest centre of every fitted row.
        inertia_: the minimised sum, a float.
        n_iter_: the number of Lloyd iterations run.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Papers: Lloyd, "Least squares quantization in PCM", 1982; Arthur and Vassilvitskii, "k-means++: the advantages
    of careful seeding", 2007; Dhillon and Modha, "Concept decompositions for large sparse text data using
    clustering", 2001 (cosine).
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        metric: str = "euclidean",
        init: str | Tensor = "k-means++",
        n_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-4,
        seed: int = 0,
    ):
        for name, value in (("n_clusters", n_clusters), ("n_init", n_init), ("max_iter", max_iter)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        if metric not in ("euclidean", "cosine"):
            raise ValueError(f'metric: expected "euclidean" or "cosine", got {metric!r}')
        if not isinstance(init, Tensor) and init != "k-means++":
            raise ValueError(f'init: expected "k-means++" or a tensor of centres, got {init!r}')
        if not tol >= 0:
            raise ValueError(f"tol: expected a number >= 0, got {tol!r}")
        self.n_clusters = n_clusters
        self.metric = metric
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.seed = seed

    @torch.no_grad()
    def fit(self, x: Tensor) -> KMeans:
        """Find centres and labels of the rows of x, floating point [N, D], N >= K. Returns self."""
        x = self._prepare(x, "x")
        if len(x) < self.n_clusters:
            raise ValueError(f"x: expected at least n_clusters={self.n_clusters} rows, got {len(x)}")
        if isinstance(self.init, Tensor):
            runs = [self._lloyd(x, self._given_centers(x))]
        else:
            generator = torch.Generator().manual_seed(self.seed)
            runs = (self._lloyd(x, self._plus_plus(x, generator)) for _ in range(self.n_init))
        best = min(runs, key=lambda run: run[2])
        self.cluster_centers_, self.labels_, self.inertia_, self.n_iter_ = best
        return self

    def fit_predict(self, x: Tensor) -> Tensor:
        """``fit(x).labels_``."""
        return self.fit(x).labels_

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Nearest centre of every row of x, floating point [M, D]: int64 [M]."""
        return self._assign(*self._prepare_new(x))[0]

    @torch.no_grad()
    def transform(self, x: Tensor) -> Tensor:
        """Distance of every row of x, [M, D], to every centre, [M, K]: ``|x - mu|`` or ``1 - cosine``."""
        x, centers = self._prepare_new(x)
        distance = self._distance(x, centers)
        return distance.sqrt() if self.metric == "euclidean" else distance

    def _prepare(self, x: Tensor, name: str) -> Tensor:
        """Checked, detached, at least float32, and of unit length for the cosine metric."""
        if not isinstance(x, Tensor) or x.ndim != 2 or not x.is_floating_point():
            got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"{name}: expected a floating-point tensor [rows, features], got {got}")
        if not x.isfinite().all():
            raise ValueError(f"{name}: expected finite values, got NaN or Inf")
        x = x.detach()
        if x.dtype.itemsize < 4:
            x = x.float()  # squared norms overflow in half precision
        return F.normalize(x, dim=1) if self.metric == "cosine" else x

    def _prepare_new(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not hasattr(self, "cluster_centers_"):
            raise RuntimeError("this KMeans has no centres yet: call fit first")
        x, centers = self._prepare(x, "x"), self.cluster_centers_
        if x.shape[1] != centers.shape[1]:
            raise ValueError(f"x: expected {centers.shape[1]} features as in fit, got {x.shape[1]}")
        return x, centers.to(x)

    def _given_centers(self, x: Tensor) -> Tensor:
        centers = self._prepare(self.init, "init")
        expected = (self.n_clusters, x.shape[1])
        if centers.shape != expected:
            raise ValueError(f"init: expected shape {list(expected)}, got {list(centers.shape)}")
        return centers.to(x)

    def _distance(self, x: Tensor, centers: Tensor) -> Tensor:
        if self.metric == "cosine":
            return (1 - x @ centers.T).clamp_(min=0)
        # |x|^2 - 2<x,c> + |c|^2 cancels badly far from the origin, so the origin moves to the centres.
        origin = centers.mean(0)
        x, centers = x - origin, centers - origin
        square = (x * x).sum(1, keepdim=True) + (centers * centers).sum(1)
        return torch.addmm(square, x, centers.T, alpha=-2).clamp_(min=0)

    def _assign(self, x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Label and distance of the nearest centre of every row."""
        rows = max(1, BLOCK_ENTRIES // len(centers))
        nearest = [self._distance(block, centers).min(1) for block in x.split(rows)]
        return torch.cat([n.indices for n in nearest]), torch.cat([n.values for n in nearest])

    def _update(self, x: Tensor, labels: Tensor, distance: Tensor, centers: Tensor) -> Tensor:
        """Means of the clusters, after every empty one has taken over one of the farthest samples."""
        counts = labels.bincount(minlength=len(centers))
        empty = (counts == 0).nonzero()[:, 0]
        if len(empty):
            farthest = distance.topk(len(empty))
            moved = farthest.indices[farthest.values > 0]
            labels = labels.index_copy(0, moved, empty[: len(moved)])
            counts = labels.bincount(minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, labels, x)
        if self.metric == "cosine":
            means, defined = F.normalize(sums, dim=1), (sums != 0).any(1)
        else:
            means, defined = sums / counts.clamp(min=1)[:, None], counts > 0
        # Without samples (fewer distinct rows than clusters) or direction (their sum is zero) a centre stays.
        return torch.where(defined[:, None], means, centers)

    def _lloyd(self, x: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, float, int]:
        tolerance = self.tol * x.var(0, correction=0).mean()
        labels, distance = self._assign(x, centers)
        for n_iter in range(1, self.max_iter + 1):  # noqa: B007
            previous_centers, previous_labels = centers, labels
            centers = self._update(x, labels, distance, centers)
            labels, distance = self._assign(x, centers)  # of these centres, so both can be returned
            movement = (centers - previous_centers).square().sum()
            if movement <= tolerance or labels.equal(previous_labels):
                break
        return centers, labels, distance.double().sum().item(), n_iter

    def _plus_plus(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """K different rows, each drawn with probability proportional to the distance from those before it."""
        weight = torch.ones(len(x), dtype=torch.float64, device=x.device)
        free = torch.ones(len(x), dtype=torch.bool, device=x.device)
        chosen = []
        for _ in range(self.n_clusters):
            weight = weight * free
            if not weight.any():  # only copies of chosen rows are left
                weight = free.double()
            cumulative = weight.cumsum(0)
            draw = torch.rand(1, dtype=torch.float64, generator=generator).to(x.device) * cumulative[-1]
            # right=True: never a row of weight zero
            row = torch.searchsorted(cumulative, draw, right=True).clamp(max=len(x) - 1)
            free[row] = False
            chosen.append(row)
            distance = self._assign(x, x[row])[1].double()
            weight = distance if len(chosen) == 1 else torch.minimum(weight, distance)
        return x[torch.cat(chosen)]
