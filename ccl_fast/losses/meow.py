"""InfoNCE whose negatives are of other clusters than the anchor's (MEOW)."""

from typing import Unpack

from torch import Tensor

from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries
from ccl_fast.losses.processes import check_views_only
from ccl_fast.ops import cross_entropy, row_dot
from ccl_fast.ops.ids import separate_unassigned


class MEOWLoss(Loss):
    r"""InfoNCE whose negatives are of other clusters than the anchor's.

    .. math::
        \ell(q_i) = \log \Big( e^{\langle q_i, k_i \rangle / T} + \sum_{j:\ y_j \ne y_i}
            e^{\langle q_i, k_j \rangle / T} \Big) - \langle q_i, k_i \rangle / T

    Rows of the anchor's own cluster y, likely of its kind, are no negatives. With each sample a cluster of its own it
    is InfoNCE. Two uses, as in `InfoNCELoss`: views ``[n, 2, d]``, each row against all other rows, and two towers.
    Memory is linear in n.

    The hard-weighted negatives of Yu, Li, "Heterogeneous Graph Contrastive Learning with Meta-path Contexts and
    Weighted Negative Samples" (MEOW, arXiv:2212.13847), whose queries and keys are the coarse and the fine view of a
    node; this project's reading. Its term against cluster centres is that of `ProtoNCELoss`, for each clustering; its
    learned weights are `AdaMEOWLoss`'s.

    Args:
        temperature: T, > 0; the initial value if learnable.
        symmetric: two towers contrast in both directions (keys are anchors too).
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; several
            processes take views, not two towers, and ids that mean the same on all of them.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import MEOWLoss
        >>> q, k, cluster_ids = torch.randn(8, 16), torch.randn(8, 16), torch.arange(8) % 3
        >>> of_views = MEOWLoss(temperature=0.2)(torch.stack((q, k), dim=1), cluster_ids)
        >>> MEOWLoss(symmetric=False, reduction="none")(q, cluster_ids, keys=k).shape
        torch.Size([8])
    """

    def __init__(self, temperature: float = 0.1, *, symmetric: bool = True, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        self.symmetric = symmetric

    def forward(self, queries: Tensor, cluster_ids: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """
        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            cluster_ids: ``[n]``, integers; -1 is unassigned: a cluster of its own, with all others as negatives.
            keys: ``[n, d]``; row i is the positive of query i.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 (on a GPU: an assertion on the device).
        """

        def check() -> tuple[int, int]:
            check_views_only(self, keys)
            counts = check_queries(queries, keys)
            check_ids("cluster_ids", cluster_ids, queries)
            return counts

        _, exchange, first = self.join_processes(check, {"queries": queries, "keys": keys})
        ids = separate_unassigned(cluster_ids.long(), first)
        scale = 1.0 / self.shared(self.temperature, exchange)

        def losses(anchors: Tensor, positives: Tensor, keys: Tensor | None) -> Tensor:
            negatives = self.logsumexp_among(anchors, keys, ids, "other_id", scale, exchange)
            logits = row_dot(anchors, positives) * scale
            return cross_entropy(negatives, logits)

        return self.reduce(self.both_directions(queries, keys, losses, self.symmetric), exchange=exchange)
