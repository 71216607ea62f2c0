"""Contrast of a graph's nodes in two views, by the strength of their communities."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_floating, check_not_negative, check_same, check_tensor, check_vector
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries, check_rows
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp
from ccl_fast.ops.ids import consecutive_ids, separate_unassigned


class CSGCLLoss(Loss):
    r"""GRACE whose logits grow with the strength of both nodes' communities.

    With z the unit embeddings of all n nodes in both views, v the strength of a node's community
    (`community_strength`) and g its weight, a row's loss is a contrast with all other rows of both views:

    .. math::
        \ell_i = \log \sum_{j \ne i} e^{(\langle z_i, z_j \rangle + g v_j) / T}
            - (\langle z_i, z_{i'} \rangle + g v_i) / T

    i' being the node in the other view; the term :math:`g v_i` of the anchor itself is in numerator and denominator,
    and cancels. With g = 0 it is GRACE, which is `NTXentLoss` of both views. Memory is linear in the nodes.

    Chen, Zhao, Li, Zou, Li, Zhang, "CSGCL: Community-Strength-Enhanced Graph Contrastive Learning" (arXiv:2305.04658):
    its team-up objective. The authors let g grow with the epoch, ``min(max((epoch - 500) / 100, 0), 1)``: set
    ``strength_weight``. Their augmentations, which spare strong communities, are not here.

    Args:
        temperature: T, > 0; the initial value if learnable.
        strength_weight: g, >= 0; it may be set between calls.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: LSE with key bias, `candidates="other_id"`, and the positive.
        units: 2 of N x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import CSGCLLoss, community_strength
        >>> strength = community_strength(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 0, 1, 1]))
        >>> CSGCLLoss()(torch.randn(4, 16), torch.randn(4, 16), strength=strength).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(self, temperature: float = 0.4, *, strength_weight: float = 1.0, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_not_negative("strength_weight", strength_weight)
        self.strength_weight = strength_weight

    def forward(self, queries: Tensor, keys: Tensor, *, strength: Tensor) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the nodes in one view; float64, float32, bfloat16, float16.
            keys: ``[n, d]``, the same nodes in the other view.
            strength: ``[n]``, floating point: v of each node.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" ``[n, 2]``, of each node in both
            views.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
        """
        n, _ = check_queries(queries, keys, required=("keys",))
        check_vector("strength", strength, n)
        check_floating("strength", strength)
        check_same("strength", strength, "queries", queries, dtype=False)
        z, scale = torch.cat((self.unit(queries), self.unit(keys))), 1.0 / self.temperature
        positives = row_dot(z, z.roll(n, 0)) * scale
        bias = self.strength_weight * strength.to(positives.dtype).repeat(2) * scale
        nodes = torch.arange(n, device=z.device).repeat(2)
        among = {"q_ids": nodes, "candidates": "other_id"}
        rest = streaming_logsumexp(z, scale=scale, key_bias=bias, backend=self.backend, **among)
        return self.reduce(cross_entropy(rest, positives + bias).view(2, n).T)


def community_strength(edges: Tensor, labels: Tensor) -> Tensor:
    r"""Measure how much denser the community of each node is than chance: its part of the graph's modularity.

    .. math::
        v_c = \frac{L_c}{L} - \Big( \frac{D_c}{2 L} \Big)^2

    of a community c with :math:`L_c` of the L edges inside and the sum of degrees :math:`D_c`. Over all communities
    it sums to Newman's modularity.

    Chen et al., "CSGCL: Community-Strength-Enhanced Graph Contrastive Learning" (arXiv:2305.04658).

    Args:
        edges: ``[2, e]``, integers: the nodes that an undirected edge joins. Each edge once, or all in both directions,
            as torch_geometric has them: the result is the same. (There loops are to be listed twice too.)
        labels: ``[n]``, integers: the community of each node; one of -1 is a community of its own.

    Returns:
        ``[n]`` float64: v of each node's community; 0 where there are no edges.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or device.
        IndexError: an edge joins what is no node, or a label is below -1 (on a GPU an assertion on the device).

    Example:
        >>> import torch
        >>> from ccl_fast.losses import community_strength
        >>> community_strength(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.tensor([0, 0, 1, 1]))
        tensor([0.0833, 0.0833, 0.0833, 0.0833], dtype=torch.float64)
    """
    check_tensor("labels", labels)
    check_tensor("edges", edges)
    if edges.ndim != 2 or edges.shape[0] != 2:
        raise ArgumentError(f"edges: expected shape [2, e], got {list(edges.shape)}")
    check_rows("edges", edges, labels)
    check_ids("labels", labels, labels)
    communities = consecutive_ids(separate_unassigned(labels.long()))
    first, second = communities[edges.long()]
    ones = torch.ones(first.shape, dtype=torch.float64, device=labels.device)
    total = max(first.shape[0], 1)
    count = ones.new_zeros(labels.shape[0])
    inner = count.index_add(0, first, ones.masked_fill(first != second, 0.0))
    degree = count.index_add(0, first, ones).index_add(0, second, ones)
    return (inner / total - (degree / (2 * total)).square())[communities]
