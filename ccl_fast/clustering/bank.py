"""A bank of the latest embeddings that is parted into clusters of equal claims (BECLR's memory)."""

import torch
from torch import Tensor, nn

from ccl_fast.checks import (
    check_count,
    check_finite,
    check_floating,
    check_matrix,
    check_number,
    check_seed,
    checked_temperature,
)
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.errors import ArgumentError, NotFittedError
from ccl_fast.ops import kmeans_assign, kmeans_update, streaming_topk
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import without_autocast
from ccl_fast.ops.transport.sinkhorn import column_potentials


class ClusteredBank(nn.Module):
    r"""The latest unit embeddings, clustered, from which a batch gets its nearest neighbours.

    The first time that the bank is full its rows are clustered by spherical k-means. From then on every batch, in the
    place of the oldest rows, is assigned by optimal transport, in which all clusters get the same mass,

    .. math::
        y_i = \arg\max_k \big( \langle z_i, c_k \rangle / \epsilon + v_k \big),

    with v the potentials of `sinkhorn`, and centres move to the means of their rows,
    :math:`c_k \leftarrow m c_k + (1 - m) \bar b_k` (a cluster without rows keeps its centre).

    The memory of Poulakakis-Daktylidis and Jamali-Rad, "BECLR" (arXiv:2402.02444); what is found goes into `BECLRLoss`
    beside the batch. The released code hands Sinkhorn's algorithm distances by default, so that it prefers the farthest
    centre; here they are similarities.

    Args:
        dimension: d.
        size: b, how many rows the bank has.
        n_clusters: K, at most b.
        momentum: m, 0 to 1 (1 excluded).
        epsilon: of the transport, > 0.
        iterations: of Sinkhorn's algorithm, at least 1.
        seed: of k-means.

    Attributes:
        features: ``[b, d]``, float32; rows that are not filled yet are 0.
        labels: ``[b]``, int64; -1 before the first clustering.
        centers: ``[K, d]`` c.
        filled: how many rows are, an int64 tensor of no dimensions.

    Raises:
        ValueError: an argument has the wrong type or value.

    Example:
        >>> import torch
        >>> from ccl_fast.clustering import ClusteredBank
        >>> bank = ClusteredBank(16, size=64, n_clusters=4)
        >>> for _ in range(3):
        ...     bank.update(torch.randn(32, 16))
        >>> bank.neighbors(torch.randn(8, 16), 5).shape
        torch.Size([8, 5, 16])
    """

    features: Tensor
    labels: Tensor
    centers: Tensor
    filled: Tensor
    next_row: Tensor

    def __init__(
        self,
        dimension: int,
        *,
        size: int = 8000,
        n_clusters: int = 200,
        momentum: float = 0.0,
        epsilon: float = 0.05,
        iterations: int = 10,
        seed: int = 0,
    ):
        super().__init__()
        for name, count in (("dimension", dimension), ("size", size), ("n_clusters", n_clusters)):
            check_count(name, count)
        if n_clusters > size:
            raise ArgumentError(f"n_clusters: expected at most size={size}, got {n_clusters}")
        check_number("momentum", momentum, "a number from 0, below 1", lambda x: 0 <= x < 1)
        self.epsilon = checked_temperature("epsilon", epsilon)
        check_count("iterations", iterations)
        check_seed("seed", seed)
        self.momentum, self.iterations, self.seed = momentum, iterations, seed
        self.register_buffer("features", torch.zeros(size, dimension, dtype=torch.float32))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("centers", torch.zeros(n_clusters, dimension, dtype=torch.float32))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("next_row", torch.zeros((), dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"size={len(self.features)}, n_clusters={len(self.centers)}, momentum={self.momentum}"

    @property
    def is_full(self) -> bool:
        return int(self.filled) == len(self.features)

    @torch.no_grad()
    def update(self, embeddings: Tensor) -> None:
        """Take in embeddings ``[n, d]``, finite, in the place of the oldest, n at most b. Raises ValueError."""
        z = self._unit("embeddings", embeddings)
        size, n = len(self.features), len(z)
        if n > size:
            raise ArgumentError(f"embeddings: expected at most {size} rows, got {n}")
        was_full = self.is_full
        places = (self.next_row + torch.arange(n, device=z.device)) % size
        self.features[places] = z
        self.next_row.copy_((self.next_row + n) % size)
        self.filled.add_(n).clamp_(max=size)
        if was_full:
            self.labels[places] = self._assigned(z)
            self._move_centers()
        elif self.is_full:
            kmeans = KMeans(len(self.centers), metric="cosine", random_state=self.seed, empty_cluster="keep")
            self.labels.copy_(kmeans.fit_predict(self.features))
            self.centers.copy_(kmeans.cluster_centers_)

    def _assigned(self, z: Tensor) -> Tensor:
        """The largest entry of each row of the plan between rows and centres."""
        centers = normalize_rows(self.centers)
        scale = 1.0 / self.epsilon
        with without_autocast(z.device):
            v = column_potentials(z, centers, scale=scale, iterations=self.iterations)
            keys = torch.cat((centers * scale, v[:, None]), dim=1)
            return streaming_topk(torch.cat((z, torch.ones_like(z[:, :1])), dim=1), keys, topk=1)[1][:, 0]

    def _move_centers(self) -> None:
        sums, sizes = kmeans_update(self.features, self.labels, len(self.centers))
        means = (sums / sizes.clamp(min=1)[:, None]).to(self.centers.dtype)
        moved = torch.lerp(means, self.centers, self.momentum)
        self.centers.copy_(torch.where(sizes[:, None] > 0, moved, self.centers))

    @torch.no_grad()
    def neighbors(self, embeddings: Tensor, k: int = 5) -> Tensor:
        """Find the k most similar rows of the bank, among those of the cluster whose centre is nearest.

        Where that has fewer rows than k, among all.

        Args:
            embeddings: ``[n, d]``, finite.
            k: at most b.

        Returns:
            ``[n, k, d]``, float32, the most similar first, without a gradient.

        Raises:
            ValueError: an argument has the wrong shape, dtype or value.
            NotFittedError: (a RuntimeError) the bank has not been full yet.
        """
        z = self._unit("embeddings", embeddings)
        check_count("k", k)
        if k > len(self.features):
            raise ArgumentError(f"k: expected at most {len(self.features)}, the rows of the bank, got {k}")
        if not self.is_full:
            raise NotFittedError(f"this ClusteredBank has {int(self.filled)} of its {len(self.features)} rows yet")
        nearest = kmeans_assign(z, self.centers, metric="cosine")[0]
        among = {"q_ids": nearest, "k_ids": self.labels, "candidates": "same_id"}
        with without_autocast(z.device):
            found = streaming_topk(z, self.features, topk=k, **among)[1]
            few = (found < 0).any(1)
            if few.any():
                found[few] = streaming_topk(z[few], self.features, topk=k)[1]
        return self.features[found]

    def _unit(self, name: str, x: Tensor) -> Tensor:
        check_matrix(name, x, columns=self.features.shape[1])
        check_floating(name, x)
        check_finite(name, x)
        return normalize_rows(x.detach().to(self.features))
