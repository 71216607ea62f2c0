"""InfoNCE whose negatives are of other clusters than the anchor's (MEOW)."""

import functools
from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_flag, check_sequence
from ccl_fast.distributed import NO_GROUP, Group
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries
from ccl_fast.losses.processes import check_views_only
from ccl_fast.ops import cross_entropy, logaddexp, row_dot
from ccl_fast.ops.ids import separate_unassigned


class MEOWLoss(Loss):
    r"""InfoNCE whose negatives are of other clusters than the anchor's.

    .. math::
        \ell(q_i) = \log \sum_{j} w_{ij} e^{\langle q_i, k_j \rangle / T} - \langle q_i, k_i \rangle / T, \qquad
        w_{ij} = \#\{m : y^m_j \ne y^m_i\}

    Rows of the anchor's own cluster y, likely of its kind, are no negatives; of several clusterings m each counts. So
    the positive is not in the sum, the loss may be below 0, and an anchor without negatives contributes 0 and does not
    count in the mean. With ``weigh_positive=False`` the positive is in the sum, with the weight 1: then each sample a
    cluster of its own is InfoNCE. Two uses, as in `InfoNCELoss`: views ``[n, 2, d]``, each row against all other rows,
    and two towers. Memory is linear in n.

    The hard-weighted negatives of Yu, Li, "Heterogeneous Graph Contrastive Learning with Meta-path Contexts and
    Weighted Negative Samples" (MEOW, arXiv:2212.13847), whose queries and keys are the coarse and the fine view of a
    node, and whose code this is, in one direction (``symmetric=False``). Its term against cluster centres is that of
    `ProtoNCELoss`, for each clustering; its learned weights are `AdaMEOWLoss`'s.

    Args:
        temperature: T, > 0; the initial value if learnable.
        symmetric: two towers contrast in both directions (keys are anchors too).
        weigh_positive: the positive has the weight of its pair in the sum, as in the authors' code, which is 0; if not,
            it has the weight 1.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; several
            processes take views, not two towers, and ids that mean the same on all of them.

    Cost:
        operators: LSE, `candidates="other_id"`, for each clustering.
        units: views: 2 of N x N x D; two towers 4 for each direction.

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

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        symmetric: bool = True,
        weigh_positive: bool = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_flag("symmetric", symmetric)
        check_flag("weigh_positive", weigh_positive)
        self.symmetric, self.weigh_positive = symmetric, weigh_positive

    def forward(self, queries: Tensor, cluster_ids: Tensor | Sequence[Tensor], *, keys: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            cluster_ids: ``[n]``, integers; -1 is unassigned: a cluster of its own, with all others as negatives. Of
                several clusterings a sequence of such tensors.
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
            if not clusterings:
                raise ArgumentError("cluster_ids: expected a tensor [n], or one for every clustering, got none")
            for m, ids in enumerate(clusterings):
                check_ids(f"cluster_ids[{m}]" if several else "cluster_ids", ids, queries)
            return counts

        several = not isinstance(cluster_ids, Tensor)
        if several:
            check_sequence("cluster_ids", cluster_ids, "integers [n], or these alone")
        clusterings = list(cluster_ids) if several else [cluster_ids]
        _, exchange, first = self.join_processes(
            check, {"queries": queries, "keys": keys}, lambda: {"cluster_ids": f"{len(clusterings)} tensors"}
        )
        clusterings = [separate_unassigned(ids.long(), first) for ids in clusterings]
        scale = 1.0 / self.shared(self.temperature, exchange.group)

        def losses(anchors: Tensor, positives: Tensor, keys: Tensor | None) -> Tensor:
            negatives = functools.reduce(
                logaddexp,
                (self.logsumexp_among(anchors, keys, ids, "other_id", scale, exchange) for ids in clusterings),
            )
            return self._losses(negatives, row_dot(anchors, positives) * scale)

        return self._reduced(self.both_directions(queries, keys, losses, self.symmetric), exchange.group)

    def _losses(self, weighted: Tensor, logits: Tensor) -> Tensor:
        """Of a log-sum-exp with the positive as it is weighted, or else without it."""
        return weighted - logits if self.weigh_positive else cross_entropy(weighted, logits)

    def _reduced(self, losses: Tensor, group: Group = NO_GROUP) -> Tensor:
        """Without anything in its sum an anchor has no loss."""
        return self.reduce(losses, (losses != -torch.inf).flatten(), losses.shape, group)
