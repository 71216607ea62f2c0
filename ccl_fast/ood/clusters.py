"""Scores by the clusters of the training samples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_count, check_flag, check_seed, check_share
from ccl_fast.clustering import KMeans
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.ood.neighbors import largest_cosine
from ccl_fast.ops import kmeans_assign, segment_gram
from ccl_fast.ops.kmeans.update import kmeans_update
from ccl_fast.ops.normalize import normalize_rows

# A feature whose standard deviation is below this share of the features' mean one counts as constant: one that is
# active in a few training images of a thousand. Of the networks measured so far the least share is 0.075.
CONSTANT = 0.05
# Numbers in the covariances of all clusters, K D^2, up to which each has its own: 256 MiB in float32.
MOST_COVARIANCES = 2**26
# Rows of which a covariance is summed at a time, in float64.
ROWS = 65_536

Covariance = Literal["auto", "each", "shared"]


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

    _tensors = ("centers",)

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

    K covariances take K D^2 numbers, and every score K triangular solves. A shared one takes D^2, and one solve: for
    all clusters cov_c is then the mean over the samples of ``(z - mu_y) (z - mu_y)^T``.

    Args:
        model: see :class:`FeatureDetector`.
        n_clusters: number of spherical k-means clusters made when fitted without labels.
        shrinkage: s, in (0, 1].
        normalize: False: the length of x counts.
        covariance: "each" cluster's own, or one that all clusters have "shared"; "auto": each, unless the covariances
            would be more than 2^26 numbers (256 MiB in float32).
        seed: seed of that k-means.

    Attributes:
        is_shared: once fitted, whether several clusters share a covariance.

    Papers: Sehwag, Chiang, Mittal, "SSD: a unified framework for self-supervised outlier detection", 2021 (s = 0
    there); with a shared covariance, Lee, Lee, Lee, Shin, "A simple unified framework for detecting out-of-distribution
    samples and adversarial attacks", 2018.

    Example:
        >>> import torch
        >>> from ccl_fast.ood import Mahalanobis
        >>> features = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
        >>> detector = Mahalanobis(n_clusters=3).fit_features(features)
        >>> detector.factors.shape, detector.is_shared
        (torch.Size([3, 16, 16]), False)
        >>> Mahalanobis(n_clusters=3, covariance="shared").fit_features(features).factors.shape
        torch.Size([1, 16, 16])
    """

    hyperparameter_space: ClassVar[dict[str, list]] = {
        **ClusterDetector.hyperparameter_space,
        "shrinkage": [0.01, 0.1, 0.5],
    }
    _tensors = ("mean", "std", "means", "factors")

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        n_clusters: int = 1,
        *,
        shrinkage: float = 0.1,
        normalize: bool = True,
        covariance: Covariance = "auto",
        seed: int = 0,
    ):
        self.shrinkage, self.normalize, self.covariance = shrinkage, normalize, covariance
        super().__init__(model, n_clusters, seed=seed)

    def _check_hyperparameters(self) -> None:
        super()._check_hyperparameters()
        check_share("shrinkage", self.shrinkage)
        check_flag("normalize", self.normalize)
        check_choice("covariance", self.covariance, get_args(Covariance))

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        y, n_clusters = self._clusters(x, y)
        x = self._placed(x)
        self.mean, std = x.mean(0), x.std(0, correction=0)
        # A feature that hardly ever changed in training (a channel that is never active) gets the typical spread: by
        # its own, the first sample in which it does change would outweigh all others.
        typical = std.mean().clamp(min=1e-6)
        self.std = torch.where(std > CONSTANT * typical, std, typical)
        z = (x - self.mean) / self.std
        self.means, self.factors = self._gaussians(z, y, n_clusters)

    def _shares(self, n_clusters: int, width: int) -> bool:
        if self.covariance == "auto":
            return n_clusters * width**2 > MOST_COVARIANCES
        return self.covariance == "shared"

    @property
    def is_shared(self) -> bool:
        return len(self.factors) < len(self.means)

    def _placed(self, x: Tensor) -> Tensor:
        return normalize_rows(x) if self.normalize else x

    def _gaussians(self, z: Tensor, y: Tensor, n_clusters: int) -> tuple[Tensor, Tensor]:
        """Means [K, D], and Cholesky factors of the covariances about them: [K, D, D], or [1, D, D] of a shared one."""
        sums, counts = kmeans_update(z, y, n_clusters)
        means = sums / counts[:, None]
        if self._shares(n_clusters, z.shape[1]):
            of, counts = torch.zeros_like(y), counts.sum(0, keepdim=True)
        else:
            of = y
        blocks = zip(z.split(ROWS), y.split(ROWS), of.split(ROWS), strict=True)
        grams = (segment_gram(rows.double() - means[ids], own, len(counts)) for rows, ids, own in blocks)
        covariances = zip(functools.reduce(Tensor.add_, grams), counts, strict=True)
        factors = [self._factor(gram / count).to(z.dtype) for gram, count in covariances]
        return means.to(z.dtype), torch.stack(factors)

    def _factor(self, covariance: Tensor) -> Tensor:
        """Cholesky factor of the covariance once it is shrunk."""
        spread = covariance.diagonal().mean().clamp(min=1e-6)  # one sample, or copies of one, have none
        shrunk = (1 - self.shrinkage) * covariance
        shrunk.diagonal().add_(self.shrinkage * spread)
        return torch.linalg.cholesky(shrunk)

    def _score(self, x: Tensor) -> Tensor:
        z = (self._placed(x) - self.mean) / self.std
        if self.is_shared:
            return self._score_by_one(z)
        best = z.new_full((len(z),), torch.inf)
        for mean, factor in zip(self.means, self.factors, strict=True):
            whitened = torch.linalg.solve_triangular(factor, (z - mean).T, upper=False)
            best = torch.minimum(best, whitened.square().sum(0))
        return best

    def _score_by_one(self, z: Tensor) -> Tensor:
        """By the one covariance: whitened by it, the nearest cluster is the one whose mean is nearest."""
        rows, means = (torch.linalg.solve_triangular(self.factors[0], of.T, upper=False).T for of in (z, self.means))
        nearest = kmeans_assign(rows, means)[0]
        return (rows - means[nearest]).square().sum(1)
