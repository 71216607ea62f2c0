"""Prototypes of few labelled samples, moved to where the samples in question are."""

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_finite, check_floating, check_matrix, check_same, checked_temperature
from ccl_fast.errors import ArgumentError
from ccl_fast.ops import sinkhorn, streaming_logsumexp, streaming_topk
from ccl_fast.ops.logsumexp.operator import softmax_sums
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


@torch.no_grad()
def transport_prototypes(
    support: Tensor, queries: Tensor, *, epsilon: float = 0.05, iterations: int = 100, passes: int = 1
) -> Tensor:
    r"""Replace each prototype by the mean of the queries that an optimal transport plan takes it to.

    .. math::
        c_k \leftarrow \sum_i \frac{\pi_{ki}}{\sum_j \pi_{kj}} q_i, \qquad
        \pi_{ki} = e^{u_k + v_i - |c_k - q_i|^2 / (\epsilon \max_{lj} |c_l - q_j|^2)}

    with the potentials u, v under which all prototypes have the same mass, and all queries. Costs are inner products in
    two more dimensions, so that the plan never exists: memory is linear in prototypes and queries. No gradient flows.

    The inference of Poulakakis-Daktylidis and Jamali-Rad, "BECLR" (arXiv:2402.02444): of one shot, the samples
    themselves as prototypes and 5 passes; of several, one pass from their means, and 0.7 of the new with 0.3 of the old
    prototypes. A classifier of the prototypes is then fitted to them.

    Args:
        support: c ``[K, d]``, finite, at least one; float64, float32, bfloat16 or float16.
        queries: q ``[n, d]``, likewise, same dtype and device, at least one.
        epsilon: > 0, in units of the largest cost.
        iterations: of Sinkhorn's algorithm, at least 1.
        passes: how often prototypes are moved, each time from where they are.

    Returns:
        ``[K, d]``, float32 (float64 for float64 input).

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.clustering import transport_prototypes
        >>> queries = torch.tensor([[0.0, 1.0], [0.0, 3.0], [5.0, 1.0], [5.0, 3.0]])
        >>> transport_prototypes(torch.tensor([[1.0, 0.0], [4.0, 0.0]]), queries, epsilon=0.01).round()
        tensor([[0., 2.],
                [5., 2.]])
    """
    check_matrix("support", support)
    check_matrix("queries", queries, columns=support.shape[1])
    for name, x in (("support", support), ("queries", queries)):
        check_floating(name, x)
        check_finite(name, x)
        if len(x) == 0:
            raise ArgumentError(f"{name}: expected at least one row, got none")
    check_same("queries", queries, "support", support)
    epsilon = checked_temperature("epsilon", epsilon)
    check_count("iterations", iterations)
    check_count("passes", passes)
    wide = accumulation_dtype(support)
    prototypes, q = support.to(wide), queries.to(wide)
    # Squares of what is far from the origin, or huge, or tiny, lose what is between the points.
    origin = q.mean(0)
    unit = torch.cat((q - origin, prototypes - origin)).abs().amax()
    unit = unit.where(unit > 0, 1.0)
    prototypes, q = (prototypes - origin) / unit, (q - origin) / unit
    with without_autocast(q.device):
        for _ in range(passes):
            prototypes = _transported(prototypes, q, epsilon, iterations)
    return prototypes * unit + origin


def _transported(prototypes: Tensor, queries: Tensor, epsilon: float, iterations: int) -> Tensor:
    d = prototypes.shape[1]
    # Their inner products are squared distances, negated.
    keys = torch.cat((2 * prototypes, -_squares(prototypes), -torch.ones_like(prototypes[:, :1])), dim=1)
    rows = torch.cat((queries, torch.ones_like(queries[:, :1]), _squares(queries)), dim=1)
    largest = streaming_topk(-rows, keys, topk=1)[0].max()
    if largest <= 0:  # all are one point
        return prototypes
    scale = 1.0 / (epsilon * largest)
    of_queries, _ = sinkhorn(rows, keys, scale=scale, iterations=iterations)
    total = streaming_logsumexp(keys, rows, scale=scale, key_bias=of_queries)
    ones = torch.ones_like(total)
    return softmax_sums(keys, rows, total, ones, scale=scale, key_bias=of_queries, of="keys", backend="auto")[:, :d]


def _squares(x: Tensor) -> Tensor:
    return x.square().sum(1, keepdim=True)
