"""A memory bank whose pseudo-labels follow the features, batch by batch."""

import torch
from torch import Tensor, nn

from ccl_fast.checks import check_count, check_floating, check_ids, check_matrix, check_same, check_share
from ccl_fast.clustering.kmeans import KMeans
from ccl_fast.errors import ArgumentError
from ccl_fast.ops import kmeans_assign, kmeans_update
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import accumulation_dtype

# Of k-means, to halve a cluster: it need not be the best halves.
HALVING_STEPS = 10


class OnlineClusters(nn.Module):
    r"""Unit features of all samples with pseudo-labels and centres, each kept up to date by what is at hand.

    .. math::
        \text{update:}\quad b_i \leftarrow \frac{(1 - \mu) b_i + \mu \hat z_i}{|(1 - \mu) b_i + \mu \hat z_i|}, \quad
            y_i \leftarrow \arg\max_k \frac{\langle b_i, c_k \rangle}{|c_k|}, \qquad
        \text{update\_centers:}\quad c_k \leftarrow \frac{1}{n_k} \sum_{i: y_i = k} b_i

    for the samples i of a batch with embeddings z, and :math:`\hat z = z / |z|`. Before centres are updated, the rows
    of clusters with fewer than ``min_size`` go to the nearest of the other clusters; each of them gets a half of the
    then largest cluster, by k-means with two clusters. So none stays empty, if there are rows enough.

    The memory of Zhan et al., "Online Deep Clustering for Unsupervised Representation Learning" (arXiv:2006.10645), and
    of `InterCLRLoss`, whose defaults these are; there the centres are updated every 10 steps, and rows are compared
    with the means themselves, not with their directions.

    Args:
        features: ``[b, d]``, of all samples, such as those that were clustered; float64, float32, bfloat16, float16.
        labels: ``[b]``, int32 or int64 from 0: of a first clustering, as `KMeans`'s; the largest tells how many
            clusters there are.
        momentum: mu, 0 < mu <= 1; with 1 the newest embedding takes the place of the older.
        min_size: at least 1.

    Attributes:
        features: ``[b, d]`` b, unit rows, the dtype of the features.
        labels: ``[b]`` y, int64.
        centers: ``[k, d]`` c, float32 (float64 for float64).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    features: Tensor
    labels: Tensor
    centers: Tensor

    def __init__(self, features: Tensor, labels: Tensor, *, momentum: float = 1.0, min_size: int = 20):
        super().__init__()
        check_matrix("features", features)
        check_floating("features", features)
        check_ids("labels", labels, features)
        if len(features) == 0 or labels.min() < 0:
            raise ArgumentError("labels: expected at least one, and none below 0")
        check_share("momentum", momentum)
        check_count("min_size", min_size)
        self.momentum, self.min_size = momentum, min_size
        wide = accumulation_dtype(features)
        self.register_buffer("features", normalize_rows(features.detach().to(wide)).to(features.dtype))
        self.register_buffer("labels", labels.long().clone())
        shape = int(labels.max()) + 1, features.shape[1]
        self.register_buffer("centers", torch.zeros(shape, device=features.device, dtype=wide))
        self._take_means()
        self.update_centers()

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, min_size={self.min_size}, clusters={len(self.centers)}"

    @torch.no_grad()
    def update(self, indices: Tensor, embeddings: Tensor) -> Tensor:
        """Take over the embeddings ``[n, d]`` of the samples ``indices`` ``[n]``, all different, and label them anew.

        Returns:
            The share of them whose label has changed.
        """
        check_matrix("embeddings", embeddings, columns=self.features.shape[1])
        check_same("embeddings", embeddings, "the features", self.features, dtype=False)
        check_ids("indices", indices, embeddings)
        wide = self.centers.dtype
        new = normalize_rows(embeddings.to(wide))
        if self.momentum < 1:
            new = normalize_rows(torch.lerp(self.features[indices].to(wide), new, self.momentum))
        self.features[indices] = new.to(self.features.dtype)
        labels = kmeans_assign(new, self.centers, metric="cosine")[0]
        changed = (labels != self.labels[indices]).to(wide).mean()
        self.labels[indices] = labels
        return changed

    @torch.no_grad()
    def update_centers(self) -> None:
        """Dissolve what is too small, halve what is largest instead, and set all centres to the means."""
        size = self.labels.bincount(minlength=len(self.centers))
        small = size < self.min_size
        if small.all():  # nothing to dissolve them into, but empty ones are to be filled
            small = size == 0
        if small.any() and not small.all():
            others, rows = (~small).nonzero()[:, 0], small[self.labels].nonzero()[:, 0]
            nearest = kmeans_assign(self.features[rows].to(self.centers.dtype), self.centers[others], metric="cosine")
            self.labels[rows] = others[nearest[0]]
            for cluster in small.nonzero()[:, 0].tolist():
                members = (self.labels == self.labels.bincount().argmax()).nonzero()[:, 0]
                if len(members) < 2:
                    break
                self.labels[members[self._half(members)]] = cluster
        self._take_means()

    def _half(self, members: Tensor) -> Tensor:
        # Of equal rows one of the two is empty, of which "keep" does not warn.
        halving = KMeans(2, metric="cosine", max_iter=HALVING_STEPS, empty_cluster="keep")
        half = halving.fit_predict(self.features[members].to(self.centers.dtype)) == 1
        if half.any() and not half.all():
            return half
        return torch.arange(len(members), device=members.device) % 2 == 1  # of equal rows any half

    def _take_means(self) -> None:
        sums, size = kmeans_update(self.features, self.labels, len(self.centers))
        means = (sums / size.clamp(min=1)[:, None]).to(self.centers.dtype)
        self.centers.copy_(torch.where(size[:, None] > 0, means, self.centers))
