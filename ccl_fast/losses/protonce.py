"""InfoNCE with a cross-entropy over cluster centres, of several clusterings of the data (ProtoNCE, PCL)."""

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from ccl_fast.losses.base import CommonOptions
from ccl_fast.losses.centers import center_cross_entropies, check_clusterings
from ccl_fast.losses.infonce import InfoNCELoss


class ProtoNCELoss(InfoNCELoss):
    r"""InfoNCE, plus the same against prototypes: the centres of M clusterings of the data.

    With :math:`y^m_i` the cluster of sample i in clustering m, :math:`c^m_k` its unit centres and :math:`\phi^m_k`
    their concentrations (a temperature per cluster: a loose cluster attracts less):

    .. math::
        \ell_i = \mathrm{InfoNCE}_i + \frac{1}{M} \sum_m \Big[
            \log \sum_k e^{\langle z_i, c^m_k \rangle / \phi^m_k} - \langle z_i, c^m_{y_i} \rangle / \phi^m_{y_i} \Big]

    All centres are negatives (the paper draws r of them; its code takes those of the batch's own clusters, repeated).
    The centres get no gradient. Memory is linear in n and k.

    Li et al., "Prototypical Contrastive Learning of Unsupervised Representations" (arXiv:2005.04966), where keys come
    from a momentum encoder, M = 3, and concentrations are those of `ccl_fast.clustering.concentration`, scaled to the
    mean T, and where a queue alone holds the negatives (``in_batch_negatives=False``).

    Args:
        temperature: T of InfoNCE, > 0; the initial value if learnable.
        in_batch_negatives: as in `InfoNCELoss`.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `InfoNCELoss`; the centres
            are the same on every process.

    Cost:
        operators: InfoNCE; per clustering LSE over c / phi.
        units: InfoNCE + 3 M of N x K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import ProtoNCELoss
        >>> views, coarse, fine = torch.randn(8, 2, 16), torch.arange(8) % 2, torch.arange(8) % 4
        >>> loss_fn = ProtoNCELoss(temperature=0.2)
        >>> loss_fn(views, [coarse, fine], [torch.randn(2, 16), torch.randn(4, 16)]).shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.1, *, in_batch_negatives: bool = True, **common: Unpack[CommonOptions]):
        super().__init__(temperature, symmetric=False, in_batch_negatives=in_batch_negatives, **common)

    def forward(
        self,
        queries: Tensor,
        cluster_ids: Sequence[Tensor],
        centers: Sequence[Tensor],
        *,
        center_temperature: Sequence[Tensor] | None = None,
        keys: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the anchors; without ``keys`` ``[n, 2, d]``: two views, both anchors.
            cluster_ids: M tensors ``[n]``, integers. -1 is unassigned: no term of this clustering.
            centers: M tensors ``[k_m, d]``.
            center_temperature: M tensors ``[k_m]``, positive: the concentrations; None: T for every cluster.
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
            counts = self._check(queries, keys, negatives)
            check_clusterings(queries, cluster_ids, centers, center_temperature)
            return counts

        _, exchange, first = self.join_processes(
            check,
            {"queries": queries, "keys": keys},
            lambda: {"centers": centers, "center_temperature": center_temperature},
        )
        losses, shape = self._losses(queries, keys, negatives, exchange, first)
        of_centers = center_cross_entropies(self, queries, cluster_ids, centers, center_temperature, exchange)
        terms = [term for term, _ in of_centers]
        losses = losses + sum(terms) / len(terms)
        return self.reduce(losses, shape=shape, group=exchange.group)
