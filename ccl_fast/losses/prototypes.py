"""Classification of embeddings by their clusters' centres, over several clusterings of the same data."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ccl_fast.errors import ArgumentError
from ccl_fast.losses.contrast import Batch, ContrastiveLoss, check_batch
from ccl_fast.losses.infonce import InfoNCELoss, check_pairs
from ccl_fast.ops.logsumexp.distributed import Exchange


class ProtoNCELoss(InfoNCELoss):
    r"""InfoNCE, plus the same against prototypes: the centres of M clusterings of the data.

    With :math:`y^m_i` the cluster of sample i in clustering m, :math:`c^m_k` its unit centres and :math:`\phi^m_k`
    their concentrations (a temperature per cluster: a loose cluster attracts less):

    .. math::
        \ell_i = \mathrm{InfoNCE}_i + \frac{1}{M} \sum_m \Big[
            \log \sum_k e^{\langle z_i, c^m_k \rangle / \phi^m_k} - \langle z_i, c^m_{y_i} \rangle / \phi^m_{y_i} \Big]

    All centres are negatives (the paper draws r of them). The centres get no gradient. Memory is linear in n and k.

    Li et al., "Prototypical Contrastive Learning of Unsupervised Representations" (arXiv:2005.04966), where keys come
    from a momentum encoder, M = 3, and concentrations are those of `ccl_fast.clustering.concentration`, scaled to the
    mean T.

    Args:
        temperature: T of InfoNCE, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `InfoNCELoss`; the centres
            are the same on every process.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        process_group: ProcessGroup | str | None = None,
        exchange: str = "all-gather",
    ):
        super().__init__(
            temperature, False, learnable_temperature, normalize, reduction, backend, process_group, exchange
        )

    def forward(
        self,
        queries: Tensor,
        cluster_ids: Sequence[Tensor],
        centers: Sequence[Tensor],
        concentrations: Sequence[Tensor] | None = None,
        keys: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            queries: ``[n, d]``, the anchors; without ``keys`` ``[n, 2, d]``: two views, both anchors.
            cluster_ids: M tensors ``[n]``, int32 or int64. -1 is unassigned: no term of this clustering.
            centers: M tensors ``[k_m, d]``.
            concentrations: M tensors ``[k_m]``, positive; None: T for every cluster.
            keys: ``[n, d]``; row i is the positive of query i.
            negatives: ``[m, d]``, further keys, such as a queue.

        Returns:
            The loss, float32 (float64 for float64 embeddings); the mean is over all anchors. With reduction "none" a
            loss per anchor: ``[n]``, or ``[n, 2]`` for views.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 or not less than k (on a GPU: an assertion on the device).
        """

        def check() -> tuple[int, int]:
            counts = check_pairs(queries, keys, negatives)
            _check_clusterings(queries, cluster_ids, centers, concentrations)
            return counts

        _, exchange, _ = self.meet(
            check, {"queries": queries, "keys": keys}, lambda: {"centers": centers, "concentrations": concentrations}
        )
        losses, shape = self._losses(queries, keys, negatives, exchange)
        terms = [term for term, _ in _terms(self, queries, cluster_ids, centers, concentrations, exchange)]
        losses = losses + sum(terms) / len(terms)
        return self.reduce(losses, torch.ones_like(losses, dtype=torch.bool), shape, exchange)


class DeepClusterV2Loss(ContrastiveLoss):
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
        learnable_temperature, normalize, reduction, backend, process_group: as in `CCLLoss`. Of several processes the
            centres are the same everywhere; no rows travel.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        process_group: ProcessGroup | str | None = None,
    ):
        super().__init__(temperature, learnable_temperature, normalize, reduction, backend, process_group)

    def forward(self, embeddings: Tensor, cluster_ids: Sequence[Tensor], centers: Sequence[Tensor]) -> Tensor:
        """
        Args:
            embeddings: ``[n, d]`` or ``[n, views, d]``; float64, float32, bfloat16, float16.
            cluster_ids: H tensors ``[n]``, int32 or int64; -1 is unassigned.
            centers: H tensors ``[k_h, d]``.

        Returns:
            The loss, float32 (float64 for float64 embeddings).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 or not less than k (on a GPU: an assertion on the device).
        """
        _, exchange, _ = self.meet(
            lambda: _check_clusterings(embeddings, cluster_ids, centers),
            {"embeddings": embeddings},
            lambda: {"centers": centers},
        )
        terms = list(_terms(self, embeddings, cluster_ids, centers, None, exchange))
        return sum(self.reduce(*term, embeddings.shape[:-1], exchange) for term in terms) / len(terms)


def _check_clusterings(
    embeddings: Tensor,
    cluster_ids: Sequence[Tensor],
    centers: Sequence[Tensor],
    temperatures: Sequence[Tensor] | None = None,
) -> tuple[int, int]:
    """Numbers of samples, and of rows of each."""
    if len(cluster_ids) == 0:
        raise ArgumentError("cluster_ids: expected a sequence with a tensor [n] for every clustering, got none")
    for name, given in (("centers", centers), ("concentrations", temperatures)):
        if given is not None and len(given) != len(cluster_ids):
            raise ArgumentError(f"{name}: expected {len(cluster_ids)} tensors, as of cluster_ids, got {len(given)}")
    temperatures = [None] * len(cluster_ids) if temperatures is None else temperatures
    for m, (ids, own, temperature) in enumerate(zip(cluster_ids, centers, temperatures, strict=True)):
        counts = check_batch(embeddings, ids, f"cluster_ids[{m}]", own, temperature, f"concentrations[{m}]")
    return counts


def _terms(
    loss_fn: ContrastiveLoss,
    embeddings: Tensor,
    cluster_ids: Sequence[Tensor],
    centers: Sequence[Tensor],
    temperatures: Sequence[Tensor] | None,
    exchange: Exchange | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Of each clustering the cross-entropy of every row with its centre (0 if unassigned), and who is assigned."""
    z, scale = loss_fn.unit(embeddings.flatten(0, -2)), 1.0 / loss_fn.shared(loss_fn.temperature, exchange)
    views = 1 if embeddings.ndim == 2 else embeddings.shape[1]
    temperatures = [None] * len(cluster_ids) if temperatures is None else temperatures
    for ids, own, temperature in zip(cluster_ids, centers, temperatures, strict=True):
        batch = Batch(z, ids.repeat_interleave(views), embeddings.shape[:-1], exchange)
        logsumexp, logit = loss_fn.contrast_centers(batch, own, temperature, scale)
        yield (logsumexp - logit).masked_fill(~batch.assigned, 0.0), batch.assigned
