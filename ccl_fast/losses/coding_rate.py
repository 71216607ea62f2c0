"""Maximal coding rate reduction: clusters that are each compact, and together take up much room."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_has_values, checked_temperature
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.ops import segment_gram
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class CodingRateLoss(Loss):
    r"""Coding rate of the clusters less that of all rows, each a log-determinant of a Gram matrix.

    .. math::
        \ell = R_c - R, \qquad R = \log\det\Big(I + \frac{d}{n \epsilon^2} Z^T Z\Big), \qquad
        R_c = \sum_k \frac{n_k}{n} \log\det\Big(I + \frac{d}{n_k \epsilon^2} Z_k^T Z_k\Big)

    Z has the n rows of all views, :math:`Z_k` the :math:`n_k` of cluster k; an unassigned sample, or without ids each
    sample, is a cluster of its views. At most 0, and 0 if there is one cluster: it is least for clusters in subspaces
    that are orthogonal, and filled evenly. Memory is linear in n.

    Yu, Chan, You, Song, Ma, "Learning Diverse and Discriminative Representations via the Principle of Maximal Coding
    Rate Reduction" (arXiv:2006.08558), whose rates are half of these.

    Args:
        temperature: it has none, so nothing but 1.
        eps: the precision up to which rows are coded, > 0.
        normalize: scale embeddings to unit length.
        process_group: as in `Loss`. The ids travel, and the Gram matrices. Of the other options it can honour none.

    Cost:
        operators: `segment_gram`, and a log-determinant for each cluster.
        units: products of N x D x D, and (K + 1) D^3; K D^2 numbers.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import CodingRateLoss
        >>> loss = CodingRateLoss()(torch.randn(8, 2, 16), torch.arange(8) % 3)
        >>> loss.shape, bool(loss < 0)
        (torch.Size([]), True)
    """

    unsupported = ("temperature", "learnable_temperature", "reduction", "backend", "exchange")

    def __init__(self, temperature: float = 1.0, *, eps: float = 0.5, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        self.eps = checked_temperature("eps", eps)  # its inverse is a number too

    def forward(self, embeddings: Tensor, cluster_ids: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, views, d]``, or ``[n, d]`` with ids; float64, float32, bfloat16, float16.
            cluster_ids: ``[n]`` integers; -1 is unassigned.

        Returns:
            The loss, float32 (float64 for float64 embeddings); 0 of no rows.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: an id is below -1 (on a GPU: an assertion on the device).
        """
        batch = self.prepare(embeddings, cluster_ids, "cluster_ids", check=lambda: _check_values(cluster_ids))
        group, z, d = batch.exchange.group, batch.z, batch.z.shape[1]
        shape = (embeddings.shape[0], embeddings.shape[1] if embeddings.ndim == 3 else 1, d)
        ids = torch.full_like(batch.ids, -1) if cluster_ids is None else batch.ids.clamp(min=-1)
        present, clusters = batch.exchange.gather(ids).unique(return_inverse=True)
        n, clusters = clusters.shape[0], clusters - int((present < 0).sum())  # -1 is unassigned still
        sizes = (clusters + 1).bincount(minlength=2)[1:].to(accumulation_dtype(z))
        clusters = batch.exchange.own(clusters)
        of_clusters, of_all = segment_gram(z, clusters, len(sizes)), segment_gram(z, torch.zeros_like(clusters), 1)
        grams = group.sum_with_gradient(torch.cat((of_all, of_clusters)))
        if n == 0:
            return grams.sum()
        scale = d / self.eps**2
        numbers = torch.cat((sizes.new_full((1,), n), sizes))
        rates = log_det_plus_one(grams * (scale / numbers.clamp(min=1))[:, None, None])
        unassigned = clusters.view(shape[:2])[:, 0] < 0
        own = group.sum_with_gradient(_own_rates(z.view(shape), scale).masked_fill(~unassigned, 0.0).sum())
        # No product of vectors, which autocast would round: the loss is a small difference.
        return ((sizes * rates[1:]).sum() + own * shape[1]) / n - rates[0]


def _check_values(cluster_ids: Tensor | None) -> None:
    if cluster_ids is not None:
        check_has_values("cluster_ids", cluster_ids, "as they tell how many clusters there are")


def _own_rates(z: Tensor, scale: float) -> Tensor:
    """Rate ``[n]`` of each sample's views ``[n, views, d]``, by the smaller of their two Gram matrices."""
    with without_autocast(z.device):
        z = z.to(accumulation_dtype(z))
        return log_det_plus_one(z @ z.mT * (scale / z.shape[1]))


def log_det_plus_one(grams: Tensor) -> Tensor:
    """Return log det(I + G) of Gram matrices ``[..., d, d]``: ``[...]``."""
    return torch.logdet(grams + torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device))
