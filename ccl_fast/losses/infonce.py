"""InfoNCE: one positive per anchor."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.distributed import Exchange
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries
from ccl_fast.ops import logaddexp, row_dot, streaming_logsumexp


class InfoNCELoss(Loss):
    r"""Contrasts each query with its own key, the other keys being negatives.

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
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; the keys of all
            processes are negatives, ``negatives`` those of the process that passes them.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast import InfoNCELoss
        >>> images, texts, queue = torch.randn(8, 16), torch.randn(8, 16), torch.randn(32, 16)
        >>> clip = InfoNCELoss(0.07, learnable_temperature=True)(images, texts)
        >>> moco = InfoNCELoss(0.2, symmetric=False, reduction="none")(images, texts, negatives=queue)
        >>> moco.shape
        torch.Size([8])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        symmetric: bool = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        self.symmetric = symmetric

    def forward(self, queries: Tensor, keys: Tensor | None = None, *, negatives: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            keys: ``[n, d]``; row i is the positive of query i.
            negatives: ``[m, d]``, such as a queue.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        rows = {"queries": queries, "keys": keys}
        _, exchange, _ = self.join_processes(lambda: check_queries(queries, keys, negatives), rows)
        losses, shape = self._losses(queries, keys, negatives, exchange)
        return self.reduce(losses, shape=shape, group=exchange.group)

    def _losses(
        self, queries: Tensor, keys: Tensor | None, negatives: Tensor | None, exchange: Exchange
    ) -> tuple[Tensor, torch.Size]:
        """Of every anchor, and their shape; all is checked."""
        scale = 1.0 / self.shared(self.temperature, exchange.group)
        one_way = keys is not None and not self.symmetric
        if keys is not None and one_way and exchange.group.is_null:
            anchors, positives = self.unit(queries), self.unit(keys)
            logsumexp = streaming_logsumexp(anchors, positives, scale=scale, backend=self.backend)
            shape = queries.shape[:1]
        else:
            views = queries if keys is None else torch.stack((queries, keys), dim=1)
            n, shape = views.shape[0], views.shape[:2]
            # Both directions of two towers are one pass over all rows of both: each two rows are multiplied once.
            # Tower by tower, so that whole tiles within a tower can be passed over.
            anchors = self.unit(views.transpose(0, 1).flatten(0, 1))
            positives = anchors.roll(n, dims=0)
            towers = None
            if keys is not None:
                towers = torch.arange(2, device=anchors.device).repeat_interleave(n)
            candidates = "all" if towers is None else "other_id"
            logsumexp = self.logsumexp_over_rows(anchors, towers, candidates, scale, exchange)
            if one_way:
                anchors, positives, logsumexp, shape = anchors[:n], positives[:n], logsumexp[:n], shape[:1]
        if negatives is not None:
            extra = streaming_logsumexp(anchors, self.unit(negatives), scale=scale, backend=self.backend)
            logsumexp = logaddexp(logsumexp, extra)
        losses = logsumexp - row_dot(anchors, positives) * scale
        if len(shape) == 2:
            losses = losses.view(2, -1).T.flatten()
        return losses, shape
