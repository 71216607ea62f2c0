"""Scores by the clusters of the training samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_flag, check_seed, check_share
from ccl_fast.clustering import KMeans
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.ood.neighbors import largest_cosine
from ccl_fast.ops.kmeans.update import kmeans_update
from ccl_fast.ops.normalize import normalize_rows

# A feature whose standard deviation is below this share of the features' mean one counts as constant: one that is
# active in a few training images of a thousand. Of the networks measured so far the least share is 0.075.
CONSTANT = 0.05


class ClusterDetector(FeatureDetector):
    """Base of the detectors that need clusters: those they are fitted with, or spherical k-means of their own."""

    hyperparameter_space: ClassVar[dict[str, list]] = {"n_clusters": [1, 2, 5, 10, 20, 50, 100]}

    def __init__(self, model: Callable[[Tensor], Tensor] | None = None, n_clusters: int = 1, *, seed: int = 0):
        self.n_clusters, self.seed = n_clusters, seed
        super().__init__(model)

    def _check_hyperparameters(self) -> None:
        check_count("n_clusters", self.n_clusters)
        check_seed("seed", self.seed)

    def _clusters(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, int]:
        """Ids [N] and their number."""
        ids = self._found(x) if y is None else y
        return ids, int(ids.max()) + 1

    def _found(self, x: Tensor) -> Tensor:
        ids = KMeans(self.n_clusters, metric="cosine", random_state=self.seed).fit_predict(x)
        return ids.unique(return_inverse=True)[1]  # copies of a row can leave a cluster empty


class NearestCenter(ClusterDetector):
    r"""Cosine distance to the nearest cluster centre.

    .. math::
        s(x) = 1 - \max_c \cos(x, \mu_c), \qquad \mu_c = \sum_{i: y_i = c} x_i / |x_i|

    Args:
        model: see :class:`FeatureDetector`.
        n_clusters: number of spherical k-means clusters made when fitted without labels.
        seed: seed of that k-means.
    """

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        y, n_clusters = self._clusters(x, y)
        self.centers = normalize_rows(kmeans_update(normalize_rows(x), y, n_clusters)[0]).to(x.dtype)

    def _score(self, x: Tensor) -> Tensor:
        return (1 - largest_cosine(x, self.centers)).clamp_(min=0)


class Mahalanobis(ClusterDetector):
    r"""SSD's score: the squared distance to the nearest cluster, in units of that cluster's spread.

    .. math::
        s(x) = \min_c (z - \mu_c)^T C_c^{-1} (z - \mu_c)

    z is x made unit length, if that is wanted, then standardised by the training features; mu_c and C_c are mean and
    covariance of cluster c. A feature that is all but constant in training is standardised by the features' mean
    standard deviation. Small clusters have singular covariances, so ``C_c = (1 - s) cov_c + s (tr cov_c / D) I``.

    Args:
        model: see :class:`FeatureDetector`.
        n_clusters: number of spherical k-means clusters made when fitted without labels.
        shrinkage: s, in (0, 1].
        normalize: False: the length of x counts.
        seed: seed of that k-means.

    Paper: Sehwag, Chiang, Mittal, "SSD: a unified framework for self-supervised outlier detection", 2021 (s = 0 there).
    """

    hyperparameter_space: ClassVar[dict[str, list]] = {
        **ClusterDetector.hyperparameter_space,
        "shrinkage": [0.01, 0.1, 0.5],
    }

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        n_clusters: int = 1,
        *,
        shrinkage: float = 0.1,
        normalize: bool = True,
        seed: int = 0,
    ):
        self.shrinkage, self.normalize = shrinkage, normalize
        super().__init__(model, n_clusters, seed=seed)

    def _check_hyperparameters(self) -> None:
        super()._check_hyperparameters()
        check_share("shrinkage", self.shrinkage)
        check_flag("normalize", self.normalize)

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        y, n_clusters = self._clusters(x, y)
        x = self._placed(x)
        self.mean, std = x.mean(0), x.std(0, correction=0)
        # A feature that hardly ever changed in training (a channel that is never active) gets the typical spread: by
        # its own, the first sample in which it does change would outweigh all others.
        typical = std.mean().clamp(min=1e-6)
        self.std = torch.where(std > CONSTANT * typical, std, typical)
        z = (x - self.mean) / self.std
        fitted = [self._gaussian(z[y == c].double()) for c in range(n_clusters)]
        self.means, self.factors = (torch.stack(part).to(x.dtype) for part in zip(*fitted, strict=True))

    def _placed(self, x: Tensor) -> Tensor:
        return normalize_rows(x) if self.normalize else x

    def _gaussian(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Cholesky factor of the covariance of the rows of one cluster."""
        mean = z.mean(0)
        covariance = (z - mean).T @ (z - mean) / len(z)
        spread = covariance.diagonal().mean().clamp(min=1e-6)  # one sample, or copies of one, have none
        shrunk = (1 - self.shrinkage) * covariance
        shrunk.diagonal().add_(self.shrinkage * spread)
        return mean, torch.linalg.cholesky(shrunk)

    def _score(self, x: Tensor) -> Tensor:
        z = (self._placed(x) - self.mean) / self.std
        best = z.new_full((len(z),), torch.inf)
        for mean, factor in zip(self.means, self.factors, strict=True):
            whitened = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)
            best = torch.minimum(best, whitened.square().sum(0))
        return best
