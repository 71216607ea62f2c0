"""Contrast along the edges of a graph."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import (
    check_choice,
    check_count,
    check_flag,
    check_floating,
    check_matrix,
    check_same,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.pairs import check_graph, entries
from ccl_fast.ops import logaddexp, streaming_logsumexp

NORMALIZATIONS = ("rows", "symmetric")


class SCGCLoss(Loss):
    r"""Influence augmented contrast: each node against all others, its positives weighted by a sparse matrix.

    With z unit embeddings of n nodes and :math:`\gamma_{ij} \ge 0` the influence of node j on node i,

    .. math::
        \ell_i = -\log \frac{\gamma_{ii} + \sum_{j \ne i} \gamma_{ij} e^{\langle z_i, z_j \rangle / T}}
                            {1 + \sum_{j \ne i} e^{\langle z_i, z_j \rangle / T}}

    where j = i counts at a similarity of 0, or with ``self_term=False`` not at all. Where all weights are 1 it is 0,
    and where they are those of the classes' graph, without the self term, SupCon with its sum inside the logarithm.
    The matrix comes from `influence_matrix`. Memory is linear in the nodes and the edges.

    Kulatilleke, Portmann, Chandra, "SCGC: Self-Supervised Contrastive Graph Clustering" (arXiv:2204.12656): its IAC
    loss, without the 1e-8 in the denominator. The authors' code multiplies similarities by tau. The losses of its
    autoencoder and of soft clusters are not here.

    Args:
        temperature: T, > 0; the initial value if learnable.
        self_term: j = i is in both sums, as in the authors' code.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: LSE; `edge_similarity`.
        units: 2 of N x N x D, and E x D for E entries.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SCGCLoss, influence_matrix
        >>> path = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).to_sparse()
        >>> SCGCLoss()(torch.randn(3, 16), influence=influence_matrix(path)).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(self, temperature: float = 1.0, *, self_term: bool = True, **common: Unpack[CommonOptions]):
        super().__init__(temperature, **common)
        check_flag("self_term", self_term)
        self.self_term = self_term

    def forward(self, embeddings: Tensor, *, influence: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``, one row per node; float64, float32, bfloat16, float16.
            influence: ``[n, n]`` sparse, CSR or COO, floating point; row i holds the weights, >= 0, of the positives
                of node i. Without ``self_term`` its diagonal is passed over. It gets no gradient.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per node, ``[n]``. A node
            with no positive weight has the loss 0 and does not count in the mean.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        check_graph("influence", influence, embeddings.shape[0])
        check_same("influence", influence, "embeddings", embeddings, dtype=False)
        edges, weights = entries(influence)
        z, scale = self.unit(embeddings), 1.0 / self.temperature
        logits = edges.logits(z, z, scale).masked_fill(edges.diagonal, 0.0)
        # Unwanted it stays, as an edge of weight 0: to drop it would need to know the number of edges.
        weights = weights.to(logits.dtype).masked_fill(edges.diagonal & (not self.self_term), 0.0)
        candidates = streaming_logsumexp(z, scale=scale, backend=self.backend)
        if self.self_term:
            candidates = logaddexp(candidates, torch.zeros_like(candidates))
        positives = edges.logsumexp(logits, len(z), weights)
        has_positive = positives != -torch.inf
        return self.reduce(candidates - positives.masked_fill(~has_positive, 0.0), has_positive)


def influence_matrix(
    adjacency: Tensor, *, hops: int = 2, cumulative: bool = True, normalization: str = "rows"
) -> Tensor:
    r"""Sum up the influence of nodes on each other within some hops: powers of the normalised adjacency.

    .. math::
        \gamma = \sum_{r = 1}^{R} \hat A^r, \qquad \hat A = D^{-1} (A + I) \text{ or } D^{-1/2} (A + I) D^{-1/2}, \qquad
        D_{ii} = \sum_j (A + I)_{ij}

    Made once, before training. It holds an entry for each pair of nodes within R hops, so R is to be small.

    Kulatilleke, Portmann, Chandra, "SCGC: Self-Supervised Contrastive Graph Clustering" (arXiv:2204.12656).

    Args:
        adjacency: ``[n, n]`` sparse, CSR or COO, float32 or float64, symmetric, weights >= 0, without loops.
        hops: R, at least 1.
        cumulative: the sum over all powers; if not, only the last.
        normalization: "rows", the first, as in the authors' code; or "symmetric", the second.

    Returns:
        ``[n, n]`` sparse COO of the dtype of ``adjacency``.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import influence_matrix
        >>> path = torch.tensor([[0.0, 1, 0], [1, 0, 1], [0, 1, 0]]).to_sparse()
        >>> influence_matrix(path, hops=1).to_dense()[0]
        tensor([0.5000, 0.5000, 0.0000])
    """
    check_graph("adjacency", adjacency)
    if adjacency.dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"adjacency: expected float32 or float64, got {adjacency.dtype}")
    check_count("hops", hops)
    check_flag("cumulative", cumulative)
    check_choice("normalization", normalization, NORMALIZATIONS)
    n = len(adjacency)
    (rows, columns), weights = entries(adjacency)
    loops = torch.arange(n, device=rows.device)
    rows, columns = torch.cat((rows, loops)), torch.cat((columns, loops))
    weights = torch.cat((weights, weights.new_ones(n)))
    degree = weights.new_zeros(n).index_add(0, rows, weights)
    weights = weights / (degree[rows] if normalization == "rows" else (degree[rows] * degree[columns]).sqrt())
    options = {"device": weights.device, "check_invariants": False}
    step = torch.sparse_coo_tensor(torch.stack((rows, columns)), weights, (n, n), **options).coalesce()
    power = total = step
    for _ in range(hops - 1):
        power = torch.sparse.mm(power, step)
        total = total + power if cumulative else power
    return total.coalesce()
