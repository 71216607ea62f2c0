"""InfoNCE: one positive per anchor."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ccl_fast.checks import check_floating, check_matrix, check_same
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.contrast import ContrastiveLoss
from ccl_fast.ops import logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.logsumexp.distributed import Exchange


class InfoNCELoss(ContrastiveLoss):
    r"""Contrast of pairs: each query against its own key, the other keys being negatives.

    .. math::
        \ell(q_i) = \log \sum_{j} e^{\langle q_i, k_j \rangle / T} - \langle q_i, k_i \rangle / T

    Three uses, told apart by the arguments of ``forward``:

    - views, ``loss(embeddings)`` with embeddings [n, 2, d]: NT-Xent (SimCLR), every row against all other rows;
    - two towers, ``loss(queries, keys)``: CLIP, the mean of both directions; one direction if not ``symmetric``;
    - extra negatives or a queue, ``negatives=``: further keys in every anchor's sum (MoCo with ``symmetric=False``).

    van den Oord et al. (arXiv:1807.03748); Chen et al., SimCLR (arXiv:2002.05709); Radford et al., CLIP
    (arXiv:2103.00020); He et al., MoCo (arXiv:1911.05722).

    Args:
        temperature: T, > 0; the initial value if learnable.
        symmetric: two towers contrast in both directions (keys are anchors too).
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `CCLLoss`; the keys of all
            processes are negatives, ``negatives`` those of the process that passes them.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

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

    def forward(self, queries: Tensor, keys: Tensor | None = None, negatives: Tensor | None = None) -> Tensor:
        """
        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``.
            keys: ``[n, d]``; row i is the positive of query i.
            negatives: ``[m, d]``, such as a queue.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.
        """
        _, exchange, _ = self.meet(lambda: check_pairs(queries, keys, negatives), {"queries": queries, "keys": keys})
        losses, shape = self._losses(queries, keys, negatives, exchange)
        return self.reduce(losses, torch.ones_like(losses, dtype=torch.bool), shape, exchange)

    def _losses(
        self, queries: Tensor, keys: Tensor | None, negatives: Tensor | None, exchange: Exchange | None
    ) -> tuple[Tensor, torch.Size]:
        """Of every anchor, and their shape; all is checked."""
        scale = 1.0 / self.shared(self.temperature, exchange)
        one_way = keys is not None and not self.symmetric
        if one_way and exchange is None:
            anchors, positives = self.unit(queries), self.unit(keys)
            logsumexp = streaming_logsumexp(anchors, positives, scale=scale, backend=self.backend)
            shape = queries.shape[:1]
        else:
            pairs = queries if keys is None else torch.stack((queries, keys), dim=1)
            n, shape = pairs.shape[0], pairs.shape[:2]
            # Both directions of two towers are one self-contrast between them: a pair of rows is met once.
            # Tower by tower, so that whole tiles within a tower can be passed over.
            anchors = self.unit(pairs.transpose(0, 1).flatten(0, 1))
            positives = anchors.roll(n, dims=0)
            towers = None
            if keys is not None:
                towers = torch.arange(2, device=anchors.device).repeat_interleave(n)
            candidates = "all" if towers is None else "other_id"
            logsumexp = self.self_contrast(anchors, towers, candidates, scale, exchange)
            if one_way:
                anchors, positives, logsumexp, shape = anchors[:n], positives[:n], logsumexp[:n], shape[:1]
        if negatives is not None:
            extra = streaming_logsumexp(anchors, self.unit(negatives), scale=scale, backend=self.backend)
            logsumexp = logaddexp(logsumexp, extra)
        losses = logsumexp - row_dot(anchors, positives) * scale
        if len(shape) == 2:
            losses = losses.view(2, -1).T.flatten()
        return losses, shape


def check_pairs(queries: Tensor, keys: Tensor | None, negatives: Tensor | None = None) -> tuple[int, int]:
    """Numbers of samples, and of rows of each."""
    if keys is None:
        if not isinstance(queries, Tensor) or queries.ndim != 3 or queries.shape[1] != 2:
            got = list(queries.shape) if isinstance(queries, Tensor) else type(queries).__name__
            raise ArgumentError(f"queries: expected shape [n, 2, d] without keys, got {got}")
    else:
        check_matrix("queries", queries)
        check_matrix("keys", keys, columns=queries.shape[1])
        check_same("keys", keys, "queries", queries)
        if keys.shape != queries.shape:
            raise ArgumentError(f"keys: expected shape {list(queries.shape)} (that of queries), got {list(keys.shape)}")
    check_floating("queries", queries)
    if negatives is not None:
        check_matrix("negatives", negatives, columns=queries.shape[-1])
        check_same("negatives", negatives, "queries", queries)
    return len(queries), 2
