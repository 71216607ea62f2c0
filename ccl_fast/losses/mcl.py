"""InfoNCE whose negatives share the anchor's cluster in all earlier stages of training (MCL)."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_flag, check_sequence
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries
from ccl_fast.losses.processes import check_views_only
from ccl_fast.ops import row_dot
from ccl_fast.ops.ids import joint_ids, separate_unassigned


class MCLLoss(Loss):
    r"""InfoNCE whose negatives share the anchor's cluster in all earlier stages of training.

    .. math::
        \ell(q_i) = \log \sum_{j:\ y^1_j = y^1_i, \dots, y^S_j = y^S_i} e^{\langle q_i, k_j \rangle / T}
            - \langle q_i, k_i \rangle / T

    with :math:`y^s` the clusters of the features that stage s has learned: what they tell apart already makes no
    negative, so the next stage must learn other features. With one cluster it is InfoNCE. Two uses, as in
    `InfoNCELoss`: views ``[n, 2, d]``, each row against all other rows of its clusters, and two towers. On a CPU only
    the blocks of equal clusters are computed. Memory is linear in n.

    The negatives of multistage contrastive learning: Zhang et al., "Learning the Unlearned: Mitigating Feature
    Suppression in Contrastive Learning" (arXiv:2402.11816). The final representation concatenates all stages'.

    Args:
        temperature: T, > 0; the initial value if learnable.
        symmetric: two towers contrast in both directions (keys are anchors too).
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; several
            processes take views, not two towers, and ids that mean the same on all of them.

    Cost:
        operators: LSE, `candidates="same_id"`.
        units: views: 2 of N x N x D, over K equal clusters on a CPU 2 / K; two towers 4 for each direction,
            likewise.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import MCLLoss
        >>> views, first_stage, second_stage = torch.randn(8, 2, 16), torch.arange(8) % 2, torch.arange(8) % 3
        >>> loss = MCLLoss(temperature=0.2)(views, [first_stage, second_stage])
        >>> loss.shape
        torch.Size([])
    """

    def __init__(self, temperature: float = 0.1, *, symmetric: bool = True, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_flag("symmetric", symmetric)
        self.symmetric = symmetric

    def forward(self, queries: Tensor, cluster_ids: Sequence[Tensor], *, keys: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            cluster_ids: for each earlier stage ``[n]``, integers; -1 is unassigned: a cluster of its own (such a
                sample has no negatives, and its loss is 0). None of them in the first stage.
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
            check_sequence("cluster_ids", cluster_ids, "integers [n]")
            counts = check_queries(queries, keys)
            for stage, ids in enumerate(cluster_ids):
                check_ids(f"cluster_ids[{stage}]", ids, queries)
            return counts

        _, exchange, first = self.join_processes(
            check, {"queries": queries, "keys": keys}, lambda: {"cluster_ids": f"{len(cluster_ids)} tensors"}
        )
        stages = [separate_unassigned(ids.long(), first) for ids in cluster_ids]
        ids = torch.zeros(queries.shape[0], dtype=torch.int64, device=queries.device)
        if stages:
            samples = exchange._replace(counts=[rows // 2 for rows in exchange.counts])
            ids = samples.own(joint_ids(*(samples.gather(each) for each in stages)))
        scale = 1.0 / self.shared(self.temperature, exchange.group)

        def losses(anchors: Tensor, positives: Tensor, keys: Tensor | None) -> Tensor:
            logsumexp = self.logsumexp_among(anchors, keys, ids, "same_id", scale, exchange)
            return logsumexp - row_dot(anchors, positives) * scale

        return self.reduce(self.both_directions(queries, keys, losses, self.symmetric), group=exchange.group)
