"""Positives are to come after negatives in a soft sort of similarities."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_positive, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import edge_similarity, row_dot, soft_rank_mass, streaming_topk
from ccl_fast.ops.precision import without_autocast


class GroCoLoss(Loss):
    r"""Group ordering constraints: sorted softly, all positives are more similar to a row than its hardest negatives.

    Of every row the similarities to the h most similar rows of its own view, and after them those to its V - 1 other
    views, both ascending, are a list of m = h + V - 1. With :math:`\mu_j` the probability that the j-th of the list
    lands in the last V - 1 places of a soft sort (`soft_rank_mass`),

    .. math::
        \ell = - \frac{1}{m} \Big( \sum_{j \le h} \log (1 - \mu_j) + \sum_{j > h} \log \mu_j \Big)

    Gradients flow to the row alone, not to those that it is compared with. Memory is linear in the rows.

    Shvetsova, Petersen, Kukleva, Schiele, Kuehne, "Learning by Sorting: Self-supervised Learning with Group Ordering
    Constraints" (arXiv:2301.02009), as in the authors' code; logarithms are cut off at the smallest normal float32.

    Args:
        temperature: it has none but the steepness, so nothing but 1.
        num_negatives: h; of a smaller batch all.
        steepness: of the swaps of the soft sort, > 0.
        normalize: scale embeddings to unit length; if not, similarities are inner products.
        reduction: "mean", "sum", or "none". Of the other options of `Loss` it can honour none.

    Cost:
        operators: `streaming_topk` of each view, `edge_similarity` of what it finds, `soft_rank_mass`.
        units: V of N/V x N/V x D without a gradient, and the selection.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import GroCoLoss
        >>> GroCoLoss(num_negatives=4, reduction="none")(torch.randn(8, 3, 16)).shape
        torch.Size([8, 3])
    """

    unsupported = ("temperature", "learnable_temperature", "backend", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        num_negatives: int = 10,
        steepness: float = 1.0,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_count("num_negatives", num_negatives)
        check_positive("steepness", steepness)
        self.num_negatives, self.steepness = num_negatives, steepness

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, views, d]``, at least two views; float64, float32, bfloat16, float16.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per row, ``[n, views]``;
            that of a sample alone is 0.

        Raises:
            ValueError: the argument has the wrong type, shape or dtype.
        """
        check_tensor("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        if embeddings.ndim != 3 or embeddings.shape[1] < 2:
            raise ArgumentError(
                f"embeddings: expected shape [n, views, d] with two views at least, got {list(embeddings.shape)}"
            )
        z = self.unit(embeddings.transpose(0, 1).flatten(0, 1)).unflatten(0, (embeddings.shape[1], -1))
        views = list(z.unbind(0))
        losses = [self._losses(view, views[:v] + views[v + 1 :]) for v, view in enumerate(views)]
        return self.reduce(torch.stack(losses, dim=1))

    def _losses(self, z: Tensor, others: list[Tensor]) -> Tensor:
        """Losses of the rows of a view."""
        negatives = self._hardest(z)
        positives = torch.stack([row_dot(z, other.detach()) for other in others], dim=1).sort(dim=1).values
        h = negatives.shape[1]
        with without_autocast(z.device):
            mass = soft_rank_mass(torch.cat((negatives, positives), 1), len(others), steepness=self.steepness)
            right = torch.cat((1 - mass[:, :h], mass[:, h:]), 1).clamp(torch.finfo(torch.float32).tiny, 1.0)
            return -right.log().mean(1)

    def _hardest(self, z: Tensor) -> Tensor:
        """Similarities to the most similar other rows, ascending."""
        n, constant = z.shape[0], z.detach()
        kept = min(self.num_negatives, max(n - 1, 0))
        if kept == 0:
            return torch.empty(n, 0, dtype=torch.promote_types(z.dtype, torch.float32), device=z.device)
        where = streaming_topk(constant, topk=kept)[1].flip(1)
        starts = torch.arange(n + 1, device=z.device) * kept
        return edge_similarity(z, constant, starts, where.flatten()).view(n, kept)
