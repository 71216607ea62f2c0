"""K-means whose soft memberships agree with those of the nearest neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from ccl_fast.checks import check_count, check_finite, check_not_negative, check_seed, shown
from ccl_fast.clustering.arrays import INTEGERS, labels_of, like, rows_of
from ccl_fast.clustering.data import Data
from ccl_fast.clustering.seeding import k_means_plus_plus
from ccl_fast.errors import ArgumentError
from ccl_fast.ops import kmeans_assign, kmeans_update, streaming_topk
from ccl_fast.ops.precision import without_autocast

if TYPE_CHECKING:
    from numpy.typing import ArrayLike


class LaplacianKMeans(ClusterMixin, BaseEstimator):
    r"""Clusters with memberships that are near in distance, and alike among neighbours; some may be labelled.

    .. math::
        y_i \leftarrow \mathrm{softmax}_k\Big(-|x_i - c_k|^2 + l \sum_{j \in N(i)} y_{jk}\Big), \qquad
        c_k = \mathrm{mean}\{x_i : \arg\max_{k'} y_{ik'} = k\}

    with N(i) the nearest neighbours of row i. The memberships take some steps for centres that stay, and then the
    centres move, until no label changes. A labelled row has the whole of its membership in its cluster. With
    ``max_iter=0`` it is transductive few-shot classification, where the centres are the means of the labelled rows. For
    l = 0 it is k-means.

    Args:
        n_clusters: K.
        smoothness: l, >= 0. Distances are not scaled: the default suits rows of unit length.
        n_neighbors: of each row, besides itself.
        init: "k-means++", which is the means of the labelled rows and what the seeding of `KMeans` chooses beside
            them, or centres ``[K, D]``.
        steps: of the memberships before the centres move.
        max_iter: largest number of moves of the centres.
        random_state: seed of k-means++.

    Attributes:
        memberships_: y, ``[N, K]``.
        labels_: int64 ``[N]``, the cluster of the largest membership.
        cluster_centers_: ``[K, D]``.
        n_iter_: how often the centres moved.

    Cost: neighbours by one product of all rows with all, in blocks (or given to ``fit``); a step O(N K) and, of the
    neighbours, O(N K n_neighbors), in O(N (K + D)) memory.

    Papers: Ziko, Granger, Ben Ayed, "Scalable Laplacian K-modes", 2018; Ziko, Dolz, Granger, Ben Ayed, "Laplacian
    regularized few-shot learning", 2020 (``max_iter=0``).

    Example:
        >>> import torch
        >>> from ccl_fast.clustering import LaplacianKMeans
        >>> x = torch.eye(3)[torch.arange(30) % 3] + torch.rand(30, 3) / 5
        >>> supports = torch.where(torch.arange(30) < 3, torch.arange(30), -1)
        >>> bool((LaplacianKMeans(3).fit(x, supports).labels_ == torch.arange(30) % 3).all())
        True
    """

    # Tensors or arrays, as the fitted rows were.
    memberships_: Any
    labels_: Any
    cluster_centers_: Any
    n_iter_: int

    def __init__(
        self,
        n_clusters: int = 8,
        smoothness: float = 0.7,
        *,
        n_neighbors: int = 2,
        init: Literal["k-means++"] | Tensor | ArrayLike = "k-means++",
        steps: int = 50,
        max_iter: int = 100,
        random_state: int = 0,
    ):
        self.n_clusters = n_clusters
        self.smoothness = smoothness
        self.n_neighbors = n_neighbors
        self.init: Literal["k-means++"] | Tensor | ArrayLike = init
        self.steps = steps
        self.max_iter = max_iter
        self.random_state = random_state

    @torch.no_grad()
    def fit(
        self,
        X: Tensor | ArrayLike,
        labels: Tensor | ArrayLike | None = None,
        *,
        neighbors: Tensor | ArrayLike | None = None,
    ) -> LaplacianKMeans:
        """Find memberships and centres.

        Args:
            X: floating point ``[N, D]``, finite.
            labels: the cluster that a row stays in, ``[N]`` integers below K; below 0: any.
            neighbors: N(i), ``[N, m]`` integers, in place of the ``n_neighbors`` nearest rows.

        Returns:
            self.

        Raises:
            ValueError: an argument has the wrong type, shape or value.
        """
        rows, fixed = self._checked(X, labels)
        with without_autocast(rows.device):
            memberships, centers = self._fitted(rows, fixed, neighbors)
        self.memberships_, self.labels_ = like(memberships, X), like(memberships.argmax(1), X)
        self.cluster_centers_ = like(centers, X)
        return self

    def _fitted(self, rows: Tensor, fixed: Tensor, neighbors: Any) -> tuple[Tensor, Tensor]:
        """Return memberships and centres."""
        # Distances by products lose what is far from the origin.
        origin = rows.mean(0)
        x = rows - origin
        near = self._nearest(x) if neighbors is None else _given(neighbors, x)
        hard = torch.where(fixed >= 0, fixed, 0)[:, None] == torch.arange(self.n_clusters, device=x.device)

        def memberships_of(centers: Tensor) -> Tensor:
            logits = -torch.cdist(x, centers).square_()
            y = logits.softmax(1)
            for _ in range(self.steps):
                y = torch.where(fixed[:, None] < 0, y, hard.to(y.dtype))
                y = torch.add(logits, _sums(y, near), alpha=self.smoothness).softmax(1)
            return torch.where(fixed[:, None] < 0, y, hard.to(y.dtype))

        centers, self.n_iter_ = self._start(rows, fixed) - origin, 0
        memberships = memberships_of(centers)
        while self.n_iter_ < self.max_iter:
            before = memberships.argmax(1)
            sums, sizes = kmeans_update(x, before, self.n_clusters)
            means = (sums / sizes.clamp(min=1)[:, None]).to(x.dtype)
            centers = torch.where(sizes[:, None] > 0, means, centers)
            memberships, self.n_iter_ = memberships_of(centers), self.n_iter_ + 1
            if memberships.argmax(1).equal(before):
                break
        return memberships, centers + origin

    def predict(self, X: Tensor | ArrayLike) -> Any:
        """Return the nearest centre of every row of X, ``[M, D]``, which have no neighbours here: int64 ``[M]``."""
        check_is_fitted(self)
        x = rows_of(X, self)[0]
        centers = torch.as_tensor(self.cluster_centers_, dtype=x.dtype, device=x.device)
        return like(kmeans_assign(x, centers)[0], X)

    def _checked(self, X: Any, labels: Any) -> tuple[Tensor, Tensor]:
        for name, least in (("n_clusters", 1), ("n_neighbors", 1), ("steps", 1), ("max_iter", 0)):
            check_count(name, getattr(self, name), least)
        check_not_negative("smoothness", self.smoothness)
        check_seed("random_state", self.random_state)
        if getattr(X, "ndim", 2) != 2:
            raise ArgumentError(f"X: expected shape [rows, features], got {list(np.shape(X))}")
        x = rows_of(X, self)[0]
        check_finite("X", x)
        if len(x) == 0:
            raise ArgumentError("X: expected at least one row, got none")
        fixed = labels_of(labels, X, x[None], self.n_clusters)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return x, torch.full((len(x),), -1, device=x.device) if fixed is None else fixed[0]

    def _start(self, x: Tensor, fixed: Tensor) -> Tensor:
        if isinstance(self.init, str):
            if self.init != "k-means++":
                raise ArgumentError(f'init: expected "k-means++" or centres, got {shown(self.init)}')
            data = Data(x[None], None, "euclidean", None, x.device, "auto", fixed=fixed[None])
            if len(x) < self.n_clusters:
                raise ArgumentError(f"X: expected at least n_clusters={self.n_clusters} rows, got {len(x)}")
            return k_means_plus_plus(data, self.n_clusters, [torch.Generator().manual_seed(self.random_state)])[0]
        centers = torch.as_tensor(self.init, device=x.device).to(x.dtype)
        if centers.shape != (self.n_clusters, x.shape[1]):
            expected = [self.n_clusters, x.shape[1]]
            raise ArgumentError(f"init: expected centres {expected}, got {list(centers.shape)}")
        check_finite("init", centers)
        return centers

    def _nearest(self, x: Tensor) -> Tensor:
        """Numbers of each row's nearest others, [n, m], of rows around the origin."""
        own = torch.arange(len(x), device=x.device)
        # |x - y|^2 is least where <x, y> - |y|^2 / 2 is largest.
        keys = torch.cat((x, x.square().sum(1, keepdim=True) / -2), 1)
        rows = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        count = min(self.n_neighbors, len(x) - 1)
        if count == 0:
            return own.new_empty(len(x), 0)
        return streaming_topk(rows, keys, topk=count, q_ids=own, k_ids=own, candidates="other_id")[1]


def _sums(y: Tensor, near: Tensor) -> Tensor:
    """Sum of the memberships of each row's neighbours, one neighbour after the other: [n, k]."""
    total = torch.zeros_like(y)
    for column in near.unbind(1):
        total += y[column]
    return total


def _given(neighbors: Any, x: Tensor) -> Tensor:
    near = torch.as_tensor(neighbors, device=x.device)
    if near.ndim != 2 or len(near) != len(x) or near.dtype not in INTEGERS:
        raise ArgumentError(f"neighbors: expected integers [{len(x)}, m], got {near.dtype} {list(near.shape)}")
    if near.numel() and not 0 <= near.min() <= near.max() < len(x):
        raise ArgumentError(f"neighbors: expected rows 0 to {len(x) - 1}, got {near.min():d} to {near.max():d}")
    return near.long()
