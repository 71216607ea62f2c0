"""NT-Xent with the centres of the other clusters as further negatives."""

import torch
from torch import Tensor

from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import Loss
from ccl_fast.ops import cross_entropy, logaddexp, row_dot, streaming_logsumexp


class CenterNegativesLoss(Loss):
    r"""NT-Xent whose negatives are the centres of the other clusters too.

    .. math::
        \ell_i = \log \Big( \sum_{j \in A(i)} e^{s_{ij}} + \sum_{c \ne y_i} e^{s_{ic}} \Big) - s_{ii'}

    A(i) are all other rows, i' the other view of i, y the cluster, s inner products of unit rows, or of a row with a
    unit centre, over the temperature T. The batch is held apart from the whole data set, for the price of k rows; no
    two samples are pulled together, so clusters that are wrong do no harm. Without centres it is NT-Xent (SimCLR).
    Memory is linear in n.

    Args:
        temperature: T, > 0; the initial value if learnable.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`.

    Cost:
        operators: LSE; LSE over centres, `candidates="other_id"`; the positive.
        units: 2 of N x N x D, 3 of N x K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import CenterNegativesLoss
        >>> loss = CenterNegativesLoss(0.2)(torch.randn(8, 2, 16), torch.arange(8) % 3, torch.randn(3, 16))
        >>> loss.shape
        torch.Size([])
    """

    def forward(self, embeddings: Tensor, cluster_ids: Tensor, centers: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, 2, d]``; float64, float32, bfloat16 or float16.
            cluster_ids: ``[n]``, integers, rows of the centres; -1 is unassigned, held against all centres.
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
        scale = 1.0 / self.shared(self.temperature, batch.exchange.group)
        z, rows = batch.z, batch.z.unflatten(0, (-1, 2))
        samples = torch.arange(batch.first, batch.first + rows.shape[0], device=z.device).repeat_interleave(2)
        among_rows = self.logsumexp_over_rows(z, samples, "other_id", scale, batch.exchange)
        keys = self.unit(centers.detach().to(torch.promote_types(centers.dtype, torch.float32))).to(z.dtype)
        number = torch.arange(keys.shape[0], device=keys.device)
        among_centers = streaming_logsumexp(
            z,
            keys,
            scale=scale,
            q_ids=batch.ids.to(number.dtype),
            k_ids=number,
            candidates="other_id",
            backend=self.backend,
        )
        positive = row_dot(*rows.unbind(1)).repeat_interleave(2) * scale
        losses = cross_entropy(logaddexp(among_rows, among_centers), positive)
        return self.reduce(losses, shape=batch.shape, group=batch.exchange.group)
