"""How many classes there are, of which some are labelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ccl_fast.checks import check_count, check_positive
from ccl_fast.clustering.arrays import labels_of, like, rows_of
from ccl_fast.clustering.evidence import cluster_moments, log_posterior
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.errors import ArgumentError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# Halves of as many rows or fewer are no clusters.
SMALL = 5
# Of the first k-means, and of each 2-means.
STARTS = 5


class ClassDiscovery(ClusterMixin, BaseEstimator):
    r"""Clusters of data some of whose classes are labelled, and their number: by splits and merges of k-means clusters.

    Semi-supervised k-means makes the clusters: labelled rows stay in that of their class. A cluster is split by 2-means
    (labelled rows stay together), or merged with the nearest one (never two labelled classes), where that makes the
    partition more probable:

    .. math::
        \log H = \log \Gamma(n_1) + \ell_1 + \log \Gamma(n_2) + \ell_2 - \log \Gamma(n) - \ell > 0 \quad\text{(split)}

    and < 0 for a merge, n being sizes and :math:`\ell` the evidence of a Gaussian cluster whose mean and covariance are
    integrated out under a normal-inverse-Wishart prior (strength kappa, d + 1 degrees of freedom, scale psi I, around
    the mean of the data). After each round of splits, or merges, k-means goes on from there, and the round stands if
    the sum of :math:`\log \Gamma(n_k) + \ell_k` over all clusters has grown. It ends when no round does.

    Classes 0 to L - 1 have labels, and are clusters of these numbers. A cluster is charged for a covariance of
    D (D + 1) / 2 numbers: where classes have fewer than some D^2 / 2 rows neighbours are merged, however well apart
    they are. Reduce the features (PCA) accordingly.

    Args:
        max_clusters: the largest number of clusters, labelled classes among them.
        n_clusters: their number at the start; None: twice the number of labelled classes, at least 1.
        kappa: of the prior, in rows.
        psi: of the prior, a sum of squares of a feature: the default suits rows of unit length.
        max_iter: largest number of rounds.
        random_state: seed of k-means.

    Attributes:
        labels_: int64 ``[N]``, the cluster of every row.
        cluster_centers_: ``[n_clusters_, D]``.
        n_clusters_: how many clusters there are.
        log_posterior_: the sum above.

    Cost: a round is a fit of k-means, 2-means in each cluster, and O(N D^2 + K D^3) for the evidence, float64, in
    O((N + K D) D) memory.

    Paper: Zhao, Wen, Han, "Learning semi-supervised Gaussian mixture models for generalized category discovery", 2023:
    its estimate of the number of classes, without the network that it alternates with there; docs/systems.md has what
    differs.

    Example:
        >>> import torch
        >>> from ccl_fast.clustering import ClassDiscovery
        >>> of = torch.arange(120) % 4
        >>> x = torch.eye(5)[of] + 0.03 * torch.randn(120, 5, generator=torch.Generator().manual_seed(0))
        >>> labels = torch.where((of < 2) & (torch.arange(120) < 60), of, -1)
        >>> ClassDiscovery(max_clusters=10).fit(x, labels).n_clusters_
        4
    """

    # Tensors or arrays, as the fitted rows were.
    labels_: Any
    cluster_centers_: Any
    n_clusters_: int
    log_posterior_: float

    def __init__(
        self,
        max_clusters: int,
        *,
        n_clusters: int | None = None,
        kappa: float = 1e-4,
        psi: float = 0.005,
        max_iter: int = 50,
        random_state: int = 0,
    ):
        self.max_clusters = max_clusters
        self.n_clusters = n_clusters
        self.kappa = kappa
        self.psi = psi
        self.max_iter = max_iter
        self.random_state = random_state

    @torch.no_grad()
    def fit(self, X: Tensor | ArrayLike, labels: Tensor | ArrayLike | None = None) -> ClassDiscovery:
        """Find the clusters.

        Args:
            X: floating point ``[N, D]``, finite.
            labels: ``[N]`` integers, classes 0 to L - 1, below 0 for rows without; None: no row has one.

        Returns:
            self.

        Raises:
            ValueError: an argument has the wrong type, shape or value.
        """
        data = self._checked(X, labels)
        wanted = max(2 * data.known, 1) if self.n_clusters is None else self.n_clusters
        start = min(wanted, self.max_clusters, data.known + int((data.fixed < 0).sum()))
        best = self._refit(data, KMeans(start, n_init=STARTS, random_state=self.random_state))
        for _ in range(self.max_iter):
            for change in (self._split, self._merged):
                centers = change(data, best)
                if centers is not None:
                    found = self._refit(data, KMeans(len(centers), init=centers))
                    if found.log_posterior > best.log_posterior:
                        best = found
                        break
            else:
                break
        self._kmeans = best.kmeans
        self.labels_, self.cluster_centers_ = like(best.labels, X), like(best.centers, X)
        self.n_clusters_, self.log_posterior_ = len(best.centers), best.log_posterior
        return self

    def predict(self, X: Tensor | ArrayLike) -> Any:
        """Return the nearest centre of every row of X, ``[M, D]``: int64 ``[M]``."""
        check_is_fitted(self)
        return like(self._kmeans.predict(rows_of(X, self)[0]), X)

    def _checked(self, X: Any, labels: Any) -> _Rows:
        for name in ("max_clusters", "max_iter", *(("n_clusters",) if self.n_clusters is not None else ())):
            check_count(name, getattr(self, name))
        check_positive("kappa", self.kappa)
        check_positive("psi", self.psi)
        if getattr(X, "ndim", 2) != 2:
            raise ArgumentError(f"X: expected shape [rows, features], got {list(np.shape(X))}")
        x = rows_of(X, self)[0]
        if len(x) == 0:
            raise ArgumentError("X: expected at least one row, got none")
        fixed = labels_of(labels, X, x[None], self.max_clusters, "max_clusters")
        fixed = torch.full((len(x),), -1, device=x.device) if fixed is None else fixed[0]
        present = fixed[fixed >= 0].unique()
        if len(present) and int(present[-1]) >= len(present):
            raise ArgumentError(f"labels: expected classes 0 to {len(present) - 1}, got {int(present[-1])}")
        return _Rows(x, x.double() - x.mean(0, dtype=torch.float64), fixed, len(present))

    def _refit(self, data: _Rows, kmeans: KMeans) -> _Partition:
        """Fit k-means, again without the clusters that lose all rows."""
        kmeans.set_params(empty_cluster="keep").fit(data.x, labels=data.fixed)
        ids, centers = kmeans.labels_, kmeans.cluster_centers_
        filled = ids.bincount(minlength=len(centers)) > 0
        if not filled.all():
            return self._refit(data, KMeans(int(filled.sum()), init=centers[filled]))
        moments = cluster_moments(data.centered, ids, len(centers))
        return _Partition(kmeans, ids, centers, moments, self._log_posterior(moments).sum().item())

    def _log_posterior(self, moments: Tensor) -> Tensor:
        return log_posterior(moments, self.kappa, self.psi)

    def _split(self, data: _Rows, of: _Partition) -> Tensor | None:
        """Return the centres once the clusters that had better be two are two; None if there is none."""
        halves, centers = torch.full_like(of.labels, -1), {}
        for cluster in range(len(of.centers)):
            own = (of.labels == cluster).nonzero()[:, 0]
            free = data.fixed[own] < 0
            if len(own) > 2 * SMALL and free.any():
                two = KMeans(2, n_init=STARTS, random_state=self.random_state, empty_cluster="keep")
                two.fit(data.x[own], labels=torch.where(free, -1, 0))
                if two.labels_.bincount(minlength=2).min() > SMALL:
                    halves[own], centers[cluster] = 2 * cluster + two.labels_, two.cluster_centers_
        moments = cluster_moments(data.centered, halves, 2 * len(of.centers))
        gain = self._log_posterior(moments).view(-1, 2).sum(1) - self._log_posterior(of.moments)
        chosen = [c for c in gain.argsort(descending=True).tolist() if c in centers and gain[c] > 0]
        chosen = chosen[: self.max_clusters - len(of.centers)]
        if not chosen:
            return None
        first, second = torch.stack([centers[c] for c in chosen]).unbind(1)
        return torch.cat((of.centers.index_copy(0, torch.tensor(chosen, device=first.device), first), second))

    def _merged(self, data: _Rows, of: _Partition) -> Tensor | None:
        """Return the centres once the pairs that had better be one are one; None if there is none."""
        distance = torch.cdist(of.centers.double(), of.centers.double()).fill_diagonal_(torch.inf)
        distance[: data.known, : data.known] = torch.inf
        away, nearest = distance.min(1)
        each, sizes = self._log_posterior(of.moments), of.moments[:, -1, -1]
        gain = self._log_posterior(of.moments + of.moments[nearest]) - each - each[nearest]
        gain = gain.masked_fill(away.isinf(), -torch.inf)
        centers, merged, gone = of.centers.clone(), set(), set()
        for i in gain.argsort(descending=True).tolist():
            pair = sorted((i, int(nearest[i])))
            if gain[i] > 0 and merged.isdisjoint(pair):
                merged.update(pair)
                gone.add(pair[1])  # of a labelled class and another cluster the other one
                share = (sizes[pair] / sizes[pair].sum()).to(centers.dtype)
                centers[pair[0]] = (share[:, None] * of.centers[pair]).sum(0)
        return centers[[c for c in range(len(centers)) if c not in gone]] if gone else None


class _Rows(NamedTuple):
    x: Tensor  # [n, d]
    centered: Tensor  # float64 [n, d], less their mean
    fixed: Tensor  # [n], labels, below 0 of free rows
    known: int  # classes that have labels


class _Partition(NamedTuple):
    kmeans: KMeans
    labels: Tensor  # [n]
    centers: Tensor  # [k, d]
    moments: Tensor  # [k, d + 1, d + 1]
    log_posterior: float
