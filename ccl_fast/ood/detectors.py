"""OOD scores of features, higher = more outlying (pytorch-ood's convention and method names)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ccl_fast.clustering import KMeans

# Largest number of entries of one block of a query x training matrix.
BLOCK_ENTRIES = 1 << 22


class NearestNeighbor:
    """``score(x) = 1 - cos(x, x_(k))``, x_(k) the k-th most similar training sample.

    Args:
        k: which neighbour.

    Paper: Sun, Ming, Zhu, Li, "Out-of-distribution detection with deep nearest neighbors", 2022.
    """

    def __init__(self, k: int = 1):
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k: expected a positive integer, got {k!r}")
        self.k = k

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor | None = None) -> NearestNeighbor:
        """Keep the training features x, floating point [N, D], N >= k; y is not used. Returns self."""
        _check(x, y)
        if len(x) < self.k:
            raise ValueError(f"x: expected at least k={self.k} rows, got {len(x)}")
        self.features = F.normalize(x, dim=1)
        return self

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Scores [M] of the features x, [M, D]."""
        _check(x)
        blocks = F.normalize(x, dim=1).split(max(1, BLOCK_ENTRIES // len(self.features)))
        return 1 - torch.cat([(block @ self.features.T).topk(self.k).values[:, -1] for block in blocks])


class NearestCenter:
    """``score(x) = 1 - max_c cos(x, mu_c)``, mu_c the mean direction of cluster c.

    Args:
        n_clusters: number of spherical k-means clusters made when ``fit_features`` gets no labels.
        seed: seed of that k-means.
    """

    def __init__(self, n_clusters: int = 1, *, seed: int = 0):
        self.n_clusters = n_clusters
        self.seed = seed

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor | None = None) -> NearestCenter:
        """Centres of the training features x, floating point [N, D], per cluster y, int64 [N]. Returns self."""
        _check(x, y)
        x = F.normalize(x, dim=1)
        y = _labels(x, y, self.n_clusters, self.seed)
        self.centers = F.normalize(torch.stack([x[y == c].mean(0) for c in y.unique()]), dim=1)
        return self

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Scores [M] of the features x, [M, D]."""
        _check(x)
        return 1 - (F.normalize(x, dim=1) @ self.centers.T).amax(1)


class Mahalanobis:
    """``score(x) = min_c (z - mu_c)^T C_c^-1 (z - mu_c)``: the SSD score, a distance in units of each cluster's spread.

    z is x made unit length, then standardised by the training features; mu_c and C_c are mean and covariance of
    cluster c. Small clusters have singular covariances, so ``C_c = (1 - s) cov_c + s (tr cov_c / D) I``.

    Args:
        n_clusters: number of spherical k-means clusters made when ``fit_features`` gets no labels.
        shrinkage: s, in (0, 1].
        seed: seed of that k-means.

    Paper: Sehwag, Chiang, Mittal, "SSD: a unified framework for self-supervised outlier detection", 2021 (s = 0 there).
    """

    def __init__(self, n_clusters: int = 1, *, shrinkage: float = 0.1, seed: int = 0):
        if not 0 < shrinkage <= 1:
            raise ValueError(f"shrinkage: expected a number in (0, 1], got {shrinkage!r}")
        self.n_clusters = n_clusters
        self.shrinkage = shrinkage
        self.seed = seed

    @torch.no_grad()
    def fit_features(self, x: Tensor, y: Tensor | None = None) -> Mahalanobis:
        """Means and covariances of the training features x, floating point [N, D], per cluster y, int64 [N]."""
        _check(x, y)
        x = F.normalize(x, dim=1)
        y = _labels(x, y, self.n_clusters, self.seed)
        self.mean, self.std = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        z = (x - self.mean) / self.std
        self.means, self.factors = [], []
        for c in y.unique():
            cluster = z[y == c]
            covariance = cluster.T.cov(correction=0).reshape(z.shape[1], z.shape[1])
            spread = covariance.diagonal().mean().clamp(min=1e-6)  # one sample, or copies of one, have none
            identity = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
            shrunk = (1 - self.shrinkage) * covariance + self.shrinkage * spread * identity
            self.means.append(cluster.mean(0))
            self.factors.append(torch.linalg.cholesky(shrunk))
        return self

    @torch.no_grad()
    def predict_features(self, x: Tensor) -> Tensor:
        """Scores [M] of the features x, [M, D]."""
        _check(x)
        z = (F.normalize(x, dim=1) - self.mean) / self.std
        whitened = [
            torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)
            for mean, factor in zip(self.means, self.factors, strict=True)
        ]
        return torch.stack([w.square().sum(0) for w in whitened]).amin(0)


def _labels(x: Tensor, y: Tensor | None, n_clusters: int, seed: int) -> Tensor:
    return KMeans(n_clusters, metric="cosine", seed=seed).fit_predict(x) if y is None else y


def _check(x: Tensor, y: Tensor | None = None) -> None:
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x: expected a floating-point tensor [rows, features], got {x.dtype} {list(x.shape)}")
    if y is not None and (y.shape != x.shape[:1] or y.is_floating_point()):
        raise ValueError(f"y: expected integer labels [{len(x)}], got {y.dtype} {list(y.shape)}")
