"""A predicted view drawn to the teacher's, all rows apart, through one logarithm for the batch (BECLR)."""

import math
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_not_negative, check_same, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries
from ccl_fast.ops import row_dot, streaming_logsumexp


class BECLRLoss(Loss):
    r"""Draws the prediction of each view to the teacher's other view, and all rows away from each other.

    .. math::
        \mathcal{L} = -\frac{1}{2n} \sum_{i, v} \langle p^{(v)}_i, t^{(v')}_i \rangle
            + w \log \frac{1}{2n (2n - 2)} \sum_{a} \sum_{b \ne a, a'} e^{\langle z_a, z_b \rangle / T}

    with p predictions, t the teacher's embeddings (constants) and z embeddings, all of unit length, v' the other view,
    a and b rows of both views and a' the other view of a. The negatives' sum is one for the whole batch, a log-sum-exp
    of log-sum-exps: memory is linear in n. Rows of a bank may stand beside those of the batch, as those that
    :meth:`ccl_fast.clustering.ClusteredBank.neighbors` finds for each view: then n counts them too. A second derivative
    raises.

    Poulakakis-Daktylidis, Jamali-Rad, "BECLR: Batch enhanced contrastive few-shot learning" (arXiv:2402.02444).

    Args:
        temperature: T, > 0; the initial value if learnable.
        negative_weight: w, >= 0.
        learnable_temperature, normalize, backend: as in `Loss`. (A logarithm of the whole batch is no sum over rows:
            there is no other reduction than the mean. It runs on one process.)

    Cost:
        operators: LSE, `candidates="other_id"` by sample; inner products of rows.
        units: 2 of N x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import BECLRLoss
        >>> z, teacher = torch.randn(8, 2, 16), torch.randn(8, 2, 16)
        >>> BECLRLoss()(z, predictions=torch.nn.Linear(16, 16)(z), targets=teacher).shape
        torch.Size([])
    """

    unsupported = ("reduction", "process_group", "exchange")

    def __init__(self, temperature: float = 2.0, *, negative_weight: float = 0.1, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_not_negative("negative_weight", negative_weight)
        self.negative_weight = negative_weight

    def forward(
        self, embeddings: Tensor, *, predictions: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: z ``[n, 2, d]``; float64, float32, bfloat16 or float16.
            predictions: p, likewise, of a predictor on top. None: the embeddings themselves.
            targets: t, likewise, of the teacher; they get no gradient. None: the embeddings.

        Returns:
            The loss, float32 (float64 for float64 embeddings). Of a single sample, which has no negatives, the first
            term; without any 0.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        check_queries(embeddings, None, names=("embeddings", "keys"))
        for name, x in (("predictions", predictions), ("targets", targets)):
            if x is None:
                continue
            check_tensor(name, x)
            check_same(name, x, "embeddings", embeddings)
            if x.shape != embeddings.shape:
                expected = f"{list(embeddings.shape)} (that of embeddings)"
                raise ArgumentError(f"{name}: expected shape {expected}, got {list(x.shape)}")
        n = embeddings.shape[0]
        z = self._rows(embeddings)
        p = z if predictions is None else self._rows(predictions)
        t = (z if targets is None else self._rows(targets)).detach().roll(n, dims=0)
        loss = -row_dot(p, t).sum() / max(2 * n, 1)
        if n < 2:
            return loss + 0.0 * (z.sum(dtype=loss.dtype) / self.temperature)
        ids = torch.arange(n, device=z.device).repeat(2)
        of_rows = streaming_logsumexp(
            z, scale=1.0 / self.temperature, q_ids=ids, candidates="other_id", backend=self.backend
        )
        return loss + self.negative_weight * (of_rows.logsumexp(0) - math.log(2 * n * (2 * n - 2)))

    def _rows(self, views: Tensor) -> Tensor:
        """First all of the first view, then all of the second."""
        return self.unit(views.transpose(0, 1).flatten(0, 1))
