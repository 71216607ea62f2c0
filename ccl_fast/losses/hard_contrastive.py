"""InfoNCE against the hardest negatives alone."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_flag, check_share
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import ceil_of_share, check_queries
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp, topk_logsumexp


class HardContrastiveLoss(Loss):
    r"""InfoNCE whose negatives are, of each anchor, the share alpha that is most similar to it.

    .. math::
        \ell(q_i) = \log \Big( e^{\langle q_i, k_i \rangle / T} + \sum_{j \in N(i):\ s_{ij} \ge s^\alpha_i}
            e^{s_{ij} / T} \Big) - \langle q_i, k_i \rangle / T, \qquad s_{ij} = \langle q_i, k_j \rangle

    with :math:`s^\alpha_i` the upper alpha-quantile of the anchor's similarities to its M negatives N(i): the
    :math:`\lceil \alpha M \rceil`-th largest. Negatives as similar as that all take part (equal rows may differ by the
    rounding of their products). With alpha = 1 it is `InfoNCELoss`, and it never exceeds it. The gradient is that of
    the chosen negatives: which they are is constant. Three uses, as in `InfoNCELoss`: views ``[n, 2, d]``, two towers,
    and extra negatives or a queue, ranked together with the negatives of the batch.

    Wang, Liu, "Understanding the Behaviour of Contrastive Loss" (arXiv:2012.09740), whose alpha is the share that is
    kept (0.0315 to 0.0819: some 4,000 negatives of a memory bank), and whose temperatures are large.

    Args:
        temperature: T, > 0; the initial value if learnable.
        alpha: the share of negatives that are kept, 0 < alpha <= 1.
        symmetric: two towers contrast in both directions (keys are anchors too).
        learnable_temperature, normalize, reduction, backend: as in `Loss`; the backend is that of alpha = 1. (It
            runs on one process.)

    Cost:
        operators: `topk_logsumexp`, `candidates="other_id"`, and the positive.
        units: views: 4 of N x N x D; two towers 4 for each direction; and the selection in N x N similarities.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import HardContrastiveLoss
        >>> loss = HardContrastiveLoss(alpha=0.25)(torch.randn(8, 2, 16))
        >>> loss.shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.7,
        *,
        alpha: float = 0.0819,
        symmetric: bool = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_share("alpha", alpha)
        check_flag("symmetric", symmetric)
        self.alpha, self.symmetric = alpha, symmetric

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
        check_queries(queries, keys, negatives)
        extra = None if negatives is None else self.unit(negatives)

        def losses(anchors: Tensor, positives: Tensor, keys: Tensor | None) -> Tensor:
            return self._losses(anchors, positives, keys, extra)

        return self.reduce(self.both_directions(queries, keys, losses, self.symmetric))

    def _losses(self, anchors: Tensor, positives: Tensor, keys: Tensor | None, extra: Tensor | None) -> Tensor:
        """Losses of the anchors against keys (None: two views, against each other) and extra rows."""
        scale, views = 1.0 / self.temperature, 2 if keys is None else 1
        n = anchors.shape[0] // views
        negatives = views * max(n - 1, 0)
        ids = torch.arange(n, device=anchors.device).repeat(views)
        key_ids = None if keys is None else ids
        if extra is not None:
            negatives += extra.shape[0]
            keys = torch.cat((anchors if keys is None else keys, extra))
            key_ids = torch.cat((ids, ids.new_full((extra.shape[0],), -1)))
        if self.alpha == 1:
            logsumexp = streaming_logsumexp(
                anchors, keys, scale=scale, q_ids=ids, k_ids=key_ids, candidates="other_id", backend=self.backend
            )
        else:
            kept = max(ceil_of_share(self.alpha, negatives), 1)
            logsumexp = topk_logsumexp(
                anchors, keys, scale=scale, topk=kept, q_ids=ids, k_ids=key_ids, candidates="other_id"
            )
        logits = row_dot(anchors, positives) * scale
        return cross_entropy(logsumexp, logits)
