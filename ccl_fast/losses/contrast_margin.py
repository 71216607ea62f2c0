"""MCLRec's regulariser: negatives are to spread below the positive and the hardest one."""

import torch
from torch import Tensor

from ccl_fast.losses.batch import check_queries
from ccl_fast.ops import edge_similarity, row_dot, streaming_topk
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


def contrast_margin(queries: Tensor, keys: Tensor) -> Tensor:
    r"""Measure by how much the positive and the hardest negative of each row are above its mean negative.

    Over the 2 n rows of two views, with :math:`p_i` the inner product of row i with its positive, :math:`n_{ij}` those
    with the rows of other samples and :math:`m_i` the largest of these,

    .. math::
        \operatorname{mean}_i \Big( \max(0, p_i - m_i) + \max(p_i, m_i) - \operatorname{mean}_j n_{ij} \Big)

    The regulariser of MCLRec, in closed form; it is added to a contrast, so that views which a network makes do not
    come to tell as little as they can. Rows are used as they come. The mean needs no pairs, and the hardest negative is
    found some rows at a time: memory is linear in n. The gradient flows through both.

    Qin et al., "Meta-optimized Contrastive Learning for Sequential Recommendation" (arXiv:2304.07763).

    Args:
        queries: ``[n, d]``, the first view; float64, float32, bfloat16, float16.
        keys: ``[n, d]``, the second.

    Returns:
        A number, float32 (float64 for float64 input); 0 for less than two samples.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or device.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import contrast_margin
        >>> contrast_margin(torch.eye(2), torch.eye(2))
        tensor(2.)
    """
    n, _ = check_queries(queries, keys, required=("keys",))
    z = torch.cat((queries, keys)).to(accumulation_dtype(queries))
    with without_autocast(z.device):
        if n < 2:
            return 0.0 * z.sum()
        samples = torch.arange(n, device=z.device).repeat(2)
        hardest = streaming_topk(z, topk=1, q_ids=samples, candidates="other_id")[1].flatten()
        negative = edge_similarity(z, z, torch.arange(2 * n + 1, device=z.device), hardest)
        positive = row_dot(z, z.roll(n, 0))
        others = row_dot(z, z.sum(0).expand_as(z)) - row_dot(z, z) - positive
        return (2 * torch.maximum(positive, negative) - negative - others / (2 * n - 2)).mean()
