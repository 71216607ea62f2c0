"""Contrast for regression: near in their targets attract, near in their predictions alone repel."""

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import (
    check_flag,
    check_floating,
    check_matrix,
    check_not_negative,
    check_same,
    check_vector,
    host_knows,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import map_row_blocks
from ccl_fast.ops.precision import scale_tensor
from ccl_fast.ops.rowwise.pairs import masked_logsumexp


class ConRLoss(Loss):
    r"""Contrastive regulariser of imbalanced regression.

    With targets y, predictions p and weights h of the rows, P(i) the other rows with :math:`|y_i - y_j| \le w`, and
    N(i) those with :math:`|y_i - y_j| > w` that are predicted as if they were near, :math:`|p_i - p_j| \le w`,

    .. math::
        \ell_i = h_i \Big( \log \Big( \sum_{j \in P(i)} e^{s_{ij}} + \sum_{j \in N(i)} h_i e^{\epsilon |y_i - y_j|}
            e^{s_{ij}} \Big) - \frac{1}{|P(i)|} \sum_{j \in P(i)} s_{ij} \Big), \qquad
        s_{ij} = \langle z_i, z_j \rangle / T

    and 0 for a row without a negative or without a positive, which counts in the mean. The predictions decide who is a
    negative and get no gradient. Memory is linear in the rows.

    Keramati, Meng, Evans, "ConR: Contrastive Regularizer for Deep Imbalanced Regression" (arXiv:2309.06651), for
    targets of one dimension. In the authors' code pairs that are masked still add e^0 = 1 each (``count_masked``), and
    a row without a positive gives NaN.

    Args:
        temperature: T, > 0; the initial value if learnable.
        window: w, >= 0.
        push: epsilon, >= 0: how much more farther negatives weigh.
        count_masked: each row that is no positive, the anchor itself included, adds 1 to the sum in the logarithm.
        learnable_temperature, normalize, reduction: as in `Loss`. (It has no backends, and runs on one process.)

    Cost:
        operators: `map_row_blocks`: a masked log-sum-exp and a masked mean of the same similarities.
        units: 4 of N x N x D, and what attributes of pairs cost, some ten passes over N x N.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import ConRLoss
        >>> z, ages = torch.randn(8, 16), 80 * torch.rand(8)
        >>> ConRLoss(window=5.0)(z, targets=ages, predictions=ages + torch.randn(8)).shape
        torch.Size([])
    """

    unsupported = ("backend", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        window: float = 1.0,
        push: float = 0.01,
        count_masked: bool = False,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_not_negative("window", window)
        check_not_negative("push", push)
        check_flag("count_masked", count_masked)
        self.window, self.push, self.count_masked = window, push, count_masked

    def forward(
        self, embeddings: Tensor, *, targets: Tensor, predictions: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``; float64, float32, bfloat16, float16.
            targets: ``[n]``, numbers of any dtype: y.
            predictions: ``[n]``, likewise: p.
            weights: ``[n]``, floating point, >= 0: h, such as the inverse frequencies of the targets. None: 1.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per row, ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
        """
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        for name, x in (("targets", targets), ("predictions", predictions), ("weights", weights)):
            if x is not None:
                check_vector(name, x, embeddings.shape[0])
                check_same(name, x, "embeddings", embeddings, dtype=False)
        z, scale = self.unit(embeddings), scale_tensor(1.0 / self.temperature, embeddings)
        if weights is None:
            weights = torch.ones_like(scale).expand(z.shape[0])
        check_floating("weights", weights)
        if host_knows(weights) and bool((weights < 0).any()):
            raise ArgumentError(f"weights: expected numbers >= 0, got a smallest of {weights.min():g}")
        # Differences of bool do not exist, and of unsigned integers they wrap.
        y, p = (x.detach() if x.is_floating_point() else x.long() for x in (targets, predictions))
        numbers = torch.arange(z.shape[0], device=z.device)
        return self.reduce(map_row_blocks(self._losses, [z, y, p, weights, numbers], [z, y, p, numbers, scale]))

    def _losses(self, rows: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        z, y, p, h, numbers = rows
        s = z @ keys[0].T * keys[4]
        distance = (y[:, None] - keys[1]).abs()
        is_near = distance <= self.window
        positive = is_near & (numbers[:, None] != keys[3])
        negative = ~is_near & ((p[:, None] - keys[2]).abs() <= self.window)
        # A logarithm that has a derivative where a weight is 0: that times 0 is to be 0.
        log_h = h.clamp(min=torch.finfo(h.dtype).tiny).log()
        pushed = (s + self.push * distance + log_h[:, None]).masked_fill(~negative, -torch.inf)
        logsumexp, count = masked_logsumexp(torch.where(positive, s, pushed)), positive.sum(1)
        if self.count_masked:
            logsumexp = torch.logaddexp(logsumexp, (s.shape[1] - count).to(s.dtype).log())
        mean = s.masked_fill(~positive, 0.0).sum(1) / count.clamp(min=1)
        counts = (count > 0) & negative.any(1)
        return (h * (logsumexp - mean).masked_fill(~counts, 0.0)).to(s.dtype)
