"""InfoNCE: one positive per anchor."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_flag
from ccl_fast.distributed import Exchange
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries
from ccl_fast.ops import cross_entropy, logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.contrast_tile import tower_contrast, views_contrast
from ccl_fast.ops.logsumexp.distributed import Wanted, global_contrast
from ccl_fast.ops.logsumexp.operator import both_logsumexps


class InfoNCELoss(Loss):
    r"""Contrasts each query with its own key, the other keys being negatives.

    .. math::
        \ell(q_i) = \log \sum_{j} e^{\langle q_i, k_j \rangle / T} - \langle q_i, k_i \rangle / T

    Three uses, told apart by the arguments of ``forward``:

    - views, ``loss(embeddings)`` with embeddings [n, 2, d]: NT-Xent (SimCLR), every row against all other rows;
    - two towers, ``loss(queries, keys)``: CLIP, the mean of both directions; one direction if not ``symmetric``;
    - extra negatives or a queue, ``negatives=``: further keys in every anchor's sum. They take the place of the
      batch's own with ``in_batch_negatives=False``: with ``symmetric=False`` that is MoCo's loss, the cross-entropy of
      :math:`[\langle q_i, k_i \rangle, \langle q_i, u_1 \rangle, \dots, \langle q_i, u_m \rangle] / T` with the first.

    A loss is never below 0, and exact, with its gradient, also where positives outweigh all else (close views, cold
    temperatures): the positive is not in the sum that is computed, but comes to it by log(1 + x).

    van den Oord et al. (arXiv:1807.03748); Chen et al., SimCLR (arXiv:2002.05709); Radford et al., CLIP
    (arXiv:2103.00020); He et al., MoCo (arXiv:1911.05722).

    Args:
        temperature: T, > 0; the initial value if learnable.
        symmetric: two towers contrast in both directions (keys are anchors too).
        in_batch_negatives: the other rows of the batch are negatives; if not, ``negatives`` alone are.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; the keys of all
            processes are negatives, ``negatives`` those of the process that passes them.

    Cost:
        operators: LSE, of both directions at once; LSE over a queue of M.
        units: 2 of N x N x D (one direction of two towers: 4); 3 of N x M x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast import InfoNCELoss
        >>> images, texts, queue = torch.randn(8, 16), torch.randn(8, 16), torch.randn(32, 16)
        >>> clip = InfoNCELoss(0.07, learnable_temperature=True)(images, texts)
        >>> moco = InfoNCELoss(0.2, symmetric=False, in_batch_negatives=False, reduction="none")
        >>> moco(images, texts, negatives=queue).shape
        torch.Size([8])
    """

    _names = ("queries", "keys")  # the first two arguments of `forward`

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        symmetric: bool = True,
        in_batch_negatives: bool = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_flag("symmetric", symmetric)
        check_flag("in_batch_negatives", in_batch_negatives)
        self.symmetric, self.in_batch_negatives = symmetric, in_batch_negatives

    def forward(self, queries: Tensor, keys: Tensor | None = None, *, negatives: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, or ``[n, 2, d]`` (two views) without ``keys``; float64, float32, bfloat16, float16.
            keys: ``[n, d]``; row i is the positive of query i.
            negatives: ``[m, d]``, such as a queue; required without negatives of the batch.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per anchor: ``[n, 2]`` for
            views and for two towers in both directions (second column: the keys), else ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        if negatives is None and self.process_group is None:
            self._check(queries, keys, negatives)
            in_one_tile = self._in_one_tile(queries, keys)
            if in_one_tile is not None:
                return in_one_tile
        rows = dict(zip(self._names, (queries, keys), strict=True))
        _, exchange, first = self.join_processes(lambda: self._check(queries, keys, negatives), rows)
        losses, shape = self._losses(queries, keys, negatives, exchange, first)
        return self.reduce(losses, shape=shape, group=exchange.group)

    def _check(self, queries: Tensor, keys: Tensor | None, negatives: Tensor | None) -> tuple[int, int]:
        counts = check_queries(queries, keys, negatives, names=self._names)
        if negatives is None and not self.in_batch_negatives:
            raise ArgumentError("negatives: expected rows [m, d] with in_batch_negatives=False, got None")
        return counts

    def _in_one_tile(self, queries: Tensor, keys: Tensor | None) -> Tensor | None:
        """The loss of a small batch by a single node; None where that does not serve."""
        if keys is None:
            return self.of_views_in_one_tile(queries, None)
        scale = 1.0 / self.temperature
        if not self.is_tile(queries, queries.shape[0], scale):
            return None
        return tower_contrast(queries, keys, scale=scale, symmetric=self.symmetric, mean=self.reduction == "mean")

    def of_views_in_one_tile(self, first: Tensor, second: Tensor | None) -> Tensor | None:
        """The loss of two views of a small batch, [n, d] each or both [n, 2, d], likewise."""
        scale = 1.0 / self.temperature
        if not self.is_tile(first[..., 0, :] if second is None else first, 4 * first.shape[0], scale):
            return None
        return views_contrast(first, second, scale=scale, mean=self.reduction == "mean")

    def _losses(
        self, queries: Tensor, keys: Tensor | None, negatives: Tensor | None, exchange: Exchange, first: int
    ) -> tuple[Tensor, torch.Size]:
        """Of every anchor, and their shape; all is checked."""
        scale = 1.0 / self.shared(self.temperature, exchange.group)
        n = queries.shape[0]
        shape = (n,) if keys is not None and not self.symmetric else (n, 2)
        if keys is None:
            anchors, positives = self.unit(queries.flatten(0, 1)), None
            pairs = anchors.unflatten(0, (n, 2)).unbind(1)
        else:
            anchors, positives = pairs = self.unit(queries), self.unit(keys)
        # The positive is left out of the sum, and comes to it again by log(1 + x): nothing cancels where it prevails.
        rest = None
        if self.in_batch_negatives:
            rest = self._logsumexp_of_others(anchors, positives, scale, exchange, first)
        if negatives is not None:
            if len(shape) == 2 and positives is not None:
                anchors = torch.cat((anchors, positives))
            extra = streaming_logsumexp(anchors, self.unit(negatives), scale=scale, backend=self.backend)
            rest = extra if rest is None else logaddexp(rest, extra)
        assert rest is not None  # without negatives of the batch there is a queue: `_check` has seen to that
        own = row_dot(*pairs) * scale  # of both anchors
        if len(shape) == 2:
            rest, own = rest.view(n, 2) if keys is None else rest.view(2, n).T, own[:, None]
        return cross_entropy(rest, own), torch.Size(shape)

    def _logsumexp_of_others(
        self, q: Tensor, k: Tensor | None, scale: float | Tensor, exchange: Exchange, first: int
    ) -> Tensor:
        """Of every anchor, the log-sum-exp over the batch without itself and its positive.

        Anchors are both views of a sample, ``q`` [2 n, d], or queries, or all queries and then all keys.
        """
        numbers = {"device": q.device, "dtype": torch.int32}
        if k is None:
            samples = torch.arange(2 * first, 2 * first + q.shape[0], **numbers) // 2
            return self.logsumexp_over_rows(q, samples, "other_id", scale, exchange)
        if not exchange.group.is_null:
            towers = torch.arange(2, device=q.device).repeat_interleave(q.shape[0])
            wanted = Wanted(other=True, by_id=True, partners=True)
            rows, options = torch.cat((q, k)), {"exchange": exchange, "backend": self.backend}
            found = global_contrast(rows, towers, scale=scale, wanted=wanted, **options)["other"]
            return found if self.symmetric else found[: q.shape[0]]
        samples = torch.arange(q.shape[0], **numbers)
        among = {"q_ids": samples, "k_ids": samples, "candidates": "other_id", "backend": self.backend}
        if self.symmetric:
            return both_logsumexps(q, k, scale=scale, **among)
        return streaming_logsumexp(q, k, scale=scale, **among)
