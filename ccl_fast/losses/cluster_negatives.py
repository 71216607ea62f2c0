"""InfoNCE whose negatives are chosen by clusters: those of the anchor's own, those of the others, or their centres."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ccl_fast.checks import check_ids
from ccl_fast.distributed import outside_of_graphs
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.contrast import ContrastiveLoss
from ccl_fast.losses.infonce import check_pairs
from ccl_fast.ops import logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.ids import joint_ids, separate_unassigned
from ccl_fast.ops.logsumexp.distributed import Exchange


class _ClusterNegatives(ContrastiveLoss):
    def __init__(
        self,
        temperature: float = 0.1,
        symmetric: bool = True,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        process_group: ProcessGroup | str | None = None,
        exchange: str = "all-gather",
    ):
        super().__init__(temperature, learnable_temperature, normalize, reduction, backend, process_group, exchange)
        self.symmetric = symmetric

    def extra_repr(self) -> str:
        return f"symmetric={self.symmetric}, {super().extra_repr()}"

    @property
    def settings(self) -> dict:
        return super().settings | {"symmetric": self.symmetric}

    def _check(self, queries: Tensor, keys: Tensor | None) -> tuple[int, int]:
        if keys is not None and self.process_group is not None:
            raise ArgumentError("keys: expected None with process_group (views [n, 2, d] as queries), got a tensor")
        return check_pairs(queries, keys)

    def _contrast(
        self, queries: Tensor, keys: Tensor | None, ids: Tensor, candidates: str, exchange: Exchange | None
    ) -> Tensor:
        """The loss: of each anchor the sum over the candidates by its samples' ids [n], with its own positive."""
        scale = 1.0 / self.shared(self.temperature, exchange)

        def losses(anchors: Tensor, positives: Tensor, logsumexp: Tensor) -> Tensor:
            logits = row_dot(anchors, positives) * scale
            return (logsumexp if candidates == "same_id" else logaddexp(logsumexp, logits)) - logits

        def one_way(anchors: Tensor, keys: Tensor) -> Tensor:
            among = {"q_ids": ids, "k_ids": ids, "candidates": candidates}
            return losses(anchors, keys, streaming_logsumexp(anchors, keys, scale=scale, backend=self.backend, **among))

        if keys is None:
            z = self.unit(queries.transpose(0, 1).flatten(0, 1))
            logsumexp = self.self_contrast(z, ids.repeat(2), candidates, scale, exchange)
            rows = losses(z, z.roll(len(queries), dims=0), logsumexp).view(2, -1).T
        else:
            q, k = self.unit(queries), self.unit(keys)
            rows = one_way(q, k)
            if self.symmetric:
                rows = torch.stack((rows, one_way(k, q)), dim=1)
        every = torch.ones_like(rows, dtype=torch.bool).flatten()
        return self.reduce(rows.flatten(), every, rows.shape, exchange)


class MCLLoss(_ClusterNegatives):
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
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `CCLLoss`; several
            processes take views, not two towers, and ids that mean the same on all of them.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    def forward(self, queries: Tensor, stage_ids: Sequence[Tensor], keys: Tensor | None = None) -> Tensor:
        """
        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            stage_ids: for each earlier stage ``[n]``, int32 or int64: the samples' clusters, below 0 for a cluster of
                its own (such a sample has no negatives, and its loss is 0). None of them in the first stage.
            keys: ``[n, d]``; row i is the positive of query i.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """

        def check() -> tuple[int, int]:
            counts = self._check(queries, keys)
            for stage, ids in enumerate(stage_ids):
                check_ids(f"stage_ids[{stage}]", ids, queries)
            return counts

        _, exchange, first = self.meet(
            check, {"queries": queries, "keys": keys}, lambda: {"stage_ids": f"{len(stage_ids)} tensors"}
        )
        stages = [separate_unassigned(ids, first) for ids in stage_ids]
        if exchange is None or not stages:
            ids = joint_ids(torch.zeros(len(queries), dtype=torch.int64, device=queries.device), *stages)
        else:
            ids = _joint_ids_of_all(stages, exchange)
        return self._contrast(queries, keys, ids, "same_id", exchange)


@outside_of_graphs
def _joint_ids_of_all(ids: Sequence[Tensor], exchange: Exchange) -> Tensor:
    """`joint_ids` of this process's samples that mean the same on every one."""
    peers, counts = exchange.peers, [rows // 2 for rows in exchange.counts]
    return joint_ids(*(peers.gather(each, counts) for each in ids)).split(counts)[peers.rank]


class MEOWLoss(_ClusterNegatives):
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
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `CCLLoss`; several
            processes take views, not two towers, and ids that mean the same on all of them.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    def forward(self, queries: Tensor, cluster_ids: Tensor, keys: Tensor | None = None) -> Tensor:
        """
        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            cluster_ids: ``[n]``, int32 or int64; below 0 is unassigned: a cluster of its own, with all others as
                negatives.
            keys: ``[n, d]``; row i is the positive of query i.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """

        def check() -> tuple[int, int]:
            counts = self._check(queries, keys)
            check_ids("cluster_ids", cluster_ids, queries)
            return counts

        _, exchange, first = self.meet(check, {"queries": queries, "keys": keys})
        return self._contrast(queries, keys, separate_unassigned(cluster_ids, first), "other_id", exchange)


class CenterNegativesLoss(ContrastiveLoss):
    r"""NT-Xent that holds an anchor against the centres of the other clusters too.

    .. math::
        \ell_i = \log \Big( \sum_{j \in A(i)} e^{s_{ij}} + \sum_{c \ne y_i} e^{s_{ic}} \Big) - s_{ii'}

    A(i) are all other rows, i' the other view of i, y the cluster, s inner products of unit rows, or of a row with a
    unit centre, over the temperature T. The batch is held apart from the whole data set, for the price of k rows; no
    two samples are pulled together, so clusters that are wrong do no harm. Without centres it is NT-Xent (SimCLR).
    Memory is linear in n.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `CCLLoss`.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> loss = CenterNegativesLoss(0.2)(torch.randn(8, 2, 16), torch.arange(8) % 3, torch.randn(3, 16))
    """

    def forward(self, embeddings: Tensor, cluster_ids: Tensor, centers: Tensor) -> Tensor:
        """
        Args:
            embeddings: ``[n, 2, d]``; float64, float32, bfloat16 or float16.
            cluster_ids: ``[n]``, int32 or int64, rows of the centres; -1 is unassigned, held against all centres.
            centers: ``[k, d]``. They get no gradient.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per row, ``[n, 2]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 or not less than k (on a GPU: an assertion on the device).
        """

        def check() -> None:
            if embeddings.ndim != 3 or embeddings.shape[1] != 2:
                raise ArgumentError(f"embeddings: expected shape [n, 2, d], got {list(embeddings.shape)}")

        batch = self.prepare(embeddings, cluster_ids, "cluster_ids", centers, check=check)
        scale = 1.0 / self.shared(self.temperature, batch.exchange)
        z, rows = batch.z, batch.z.unflatten(0, (-1, 2))
        among_rows = self.self_contrast(z, None, "all", scale, batch.exchange)
        keys = self.unit(centers.detach().to(torch.promote_types(centers.dtype, torch.float32))).to(z.dtype)
        number = torch.arange(len(keys), device=keys.device)
        among = {"q_ids": batch.ids.to(number.dtype), "k_ids": number, "candidates": "other_id"}
        among_centers = streaming_logsumexp(z, keys, scale=scale, backend=self.backend, **among)
        positive = row_dot(rows[:, 0], rows[:, 1]).repeat_interleave(2) * scale
        losses = logaddexp(among_rows, among_centers) - positive
        return self.reduce(losses, torch.ones_like(losses, dtype=torch.bool), batch.shape, batch.exchange)
