"""The contrastive term of cMIM: each row against the mean of the others."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp


class CMIMLoss(Loss):
    r"""Tells each row from the others, whose mean counts: no positives are needed.

    .. math::
        \ell_i = \log \Big( e^{s_{ii}} + \frac{1}{n - 1} \sum_{j \ne i} e^{s_{ij}} \Big) - s_{ii}
            = \operatorname{softplus} \Big( \log \frac{1}{n - 1} \sum_{j \ne i} e^{s_{ij}} - \frac{1}{T} \Big), \qquad
        s_{ij} = \langle z_i, z_j \rangle / T

    the second for unit rows. As the negatives are averaged, the loss hardly depends on the size of the batch. Of views
    ``[n, 2, d]`` the other view takes the place of the row itself, and the mean is over all rows of other samples: a
    form of this library, for training without a decoder. Memory is linear in the rows.

    Livne, "cMIM: A Contrastive Mutual Information Framework for Unified Generative and Discriminative Representation
    Learning" (arXiv:2502.19642): its contrastive term alone, which the paper adds to that of a probabilistic
    autoencoder. By itself, of rows, it only spreads them.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: LSE; of views `candidates="other_id"`, and the positive.
        units: 2 of N x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import CMIMLoss
        >>> CMIMLoss()(torch.randn(8, 16)).shape, CMIMLoss(reduction="none")(torch.randn(8, 2, 16)).shape
        (torch.Size([]), torch.Size([8, 2]))
    """

    unsupported = ("process_group", "exchange")

    def __init__(self, temperature: float = 0.1, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``, rows, or ``[n, 2, d]``, two views of each sample; float64, float32, bfloat16,
                float16.

        Returns:
            The loss, float32 (float64 for float64 input). With reduction "none" a loss per row, ``[n]`` or ``[n, 2]``;
            that of a sample alone is 0.

        Raises:
            ValueError: the argument has the wrong type, shape or dtype.
        """
        check_tensor("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        if embeddings.ndim != 2 and (embeddings.ndim != 3 or embeddings.shape[1] != 2):
            raise ArgumentError(f"embeddings: expected shape [n, d] or [n, 2, d], got {list(embeddings.shape)}")
        if embeddings.ndim == 2:
            z = self.unit(embeddings)
            return self.reduce(self._losses(z, z, None, embeddings.shape[0] - 1))
        return self.reduce(self.both_directions(embeddings, None, self._losses_of_views, True))

    def _losses_of_views(self, anchors: Tensor, positives: Tensor, _keys: Tensor | None) -> Tensor:
        n = anchors.shape[0] // 2
        samples = torch.arange(n, device=anchors.device).repeat(2)
        return self._losses(anchors, positives, samples, 2 * (n - 1))

    def _losses(self, anchors: Tensor, positives: Tensor, samples: Tensor | None, negatives: int) -> Tensor:
        scale = 1.0 / self.temperature
        among = {} if samples is None else {"q_ids": samples, "candidates": "other_id"}
        rest = streaming_logsumexp(anchors, scale=scale, backend=self.backend, **among)
        mean = rest - rest.new_full((), negatives).clamp(min=1).log()
        return cross_entropy(mean, row_dot(anchors, positives) * scale)
