"""Classification of embeddings by the centres of their clusters (DeepCluster-v2)."""

from collections.abc import Sequence

from torch import Tensor

from ccl_fast.losses.base import Loss
from ccl_fast.losses.centers import center_cross_entropies, check_clusterings


class DeepClusterV2Loss(Loss):
    r"""Cross-entropy of the similarities to cluster centres with the assigned cluster, over H heads (clusterings).

    .. math::
        \ell_i = \frac{1}{H} \sum_h \Big[ \log \sum_k e^{\langle z_i, c^h_k \rangle / T}
            - \langle z_i, c^h_{y_i} \rangle / T \Big]

    with z unit embeddings, c the unit centres of spherical k-means and y its labels. An unassigned row does not count
    in the mean of a head. The centres get no gradient. Memory is linear in n and k.

    The DeepCluster-v2 of Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments"
    (arXiv:2006.09882), with H = 3 clusterings of a memory bank of the last epoch.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction, backend, process_group: as in `Loss`. Of several processes the
            centres are the same everywhere; no rows travel, so there is no exchange to choose.

    Cost:
        operators: per head LSE over centres.
        units: 3 H of N x K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import DeepClusterV2Loss
        >>> coarse, fine = torch.arange(8) % 2, torch.arange(8) % 4
        >>> loss = DeepClusterV2Loss()(torch.randn(8, 16), [coarse, fine], [torch.randn(2, 16), torch.randn(4, 16)])
        >>> loss.shape
        torch.Size([])
    """

    unsupported = ("exchange",)

    def forward(self, embeddings: Tensor, cluster_ids: Sequence[Tensor], centers: Sequence[Tensor]) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` or ``[n, views, d]``; float64, float32, bfloat16, float16.
            cluster_ids: H tensors ``[n]``, integers; -1 is unassigned.
            centers: H tensors ``[k_h, d]``.

        Returns:
            The loss, float32 (float64 for float64 embeddings).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 or not less than k (on a GPU: an assertion on the device).
        """
        _, exchange, _ = self.join_processes(
            lambda: check_clusterings(embeddings, cluster_ids, centers),
            {"embeddings": embeddings},
            lambda: {"centers": centers},
        )
        terms = center_cross_entropies(self, embeddings, cluster_ids, centers, None, exchange)
        first, *others = (self.reduce(*term, embeddings.shape[:-1], exchange.group) for term in terms)
        return sum(others, first) / len(cluster_ids)
