"""Contrast of a graph's nodes with a low-rank view of the graph."""

from typing import Unpack

import torch
from torch import Tensor, nn

from ccl_fast.checks import (
    check_count,
    check_flag,
    check_floating,
    check_matrix,
    check_positive,
    check_same,
    check_tensor,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries, check_rows
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp
from ccl_fast.ops.differentiable import savable
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class LightGCLLoss(Loss):
    r"""InfoNCE of the nodes of a batch B against all nodes of another view of the graph.

    With e the nodes' embeddings in the graph and g those in its view, both of unit length:

    .. math::
        \ell_i = \log \sum_{j = 1}^{N} e^{\langle e_i, g_j \rangle / T} - \langle e_i, g_i \rangle / T, \qquad i \in B

    The view is a propagation through a few singular values of the adjacency matrix (`SVDView`). Of users and items,
    and of several layers, the losses are added: one call for each. Memory is linear in N.

    Cai, Huang, Xia, Ren, "LightGCL: Simple Yet Effective Graph Contrastive Learning for Recommendation"
    (arXiv:2302.08191). The authors' code takes the view's rows as queries and the graph's as keys, sums the layers
    before one contrast, and leaves embeddings as they are (``normalize=False``).

    Args:
        temperature: T, > 0; the initial value if learnable.
        positive_limit: positives' logits, and with them their gradient, are cut off at this and at its negative, 5 as
            in the authors' code: unit vectors at T = 0.2 are within. None: they are not.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. (It runs on one process.)

    Cost:
        operators: rectangular LSE.
        units: 4 of B x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import LightGCLLoss, SVDView
        >>> users, items = torch.randn(8, 16), torch.randn(6, 16)
        >>> of_users = SVDView(torch.rand(8, 6), rank=2)(items)
        >>> LightGCLLoss(temperature=0.2)(users, of_users, nodes=torch.tensor([0, 3, 3])).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(
        self, temperature: float = 0.2, *, positive_limit: float | None = 5.0, **common: Unpack[CommonOptions]
    ):
        super().__init__(temperature, **common)
        if positive_limit is not None:
            check_positive("positive_limit", positive_limit)
        self.positive_limit = positive_limit

    def forward(self, queries: Tensor, keys: Tensor, *, nodes: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, e of all nodes; float64, float32, bfloat16, float16.
            keys: ``[n, d]``, g of the same nodes.
            nodes: ``[b]``, integers: the batch, rows of the above (one may come several times); None for all.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per node of the batch,
            ``[b]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
            IndexError: a node is not among the rows (on a GPU an assertion on the device).
        """
        check_queries(queries, keys, required=("keys",))
        keys = positives = self.unit(keys)
        if nodes is not None:
            _check_nodes(nodes, queries)
            nodes = savable(nodes.long())
            queries, positives = (x.index_select(0, nodes) for x in (queries, keys))
        anchors, scale = self.unit(queries), 1.0 / self.temperature
        every = torch.arange(keys.shape[0], device=keys.device)
        among = {"q_ids": every if nodes is None else nodes, "k_ids": every, "candidates": "other_id"}
        rest = streaming_logsumexp(anchors, keys, scale=scale, backend=self.backend, **among)
        logits = row_dot(anchors, positives) * scale
        losses = cross_entropy(rest, logits)
        if self.positive_limit is not None:
            losses = losses + (logits - logits.clamp(-self.positive_limit, self.positive_limit))
        return self.reduce(losses)


class SVDView(nn.Module):
    r"""Propagates through the largest singular values of a sparse adjacency matrix, which is never rebuilt.

    .. math::
        A \approx U \operatorname{diag}(s) V^\top, \qquad G = U (s \odot (V^\top E))

    of cost O((m + n) rank d) instead of O(m n d). For a graph of users (rows) and items (columns) the view of the users
    is ``view(items)`` and that of the items ``view(users, transposed=True)``. Buffers ``u``, ``s`` and ``v`` move with
    the module and are saved with it. The factors are constants: no gradient for them, only for E.

    The view of LightGCL (arXiv:2302.08191), whose matrix is normalised by its degrees, as for the propagation through
    the graph itself: :math:`A_{ui} / \sqrt{\deg u \deg i}`.

    Args:
        adjacency: ``[m, n]``, sparse (COO, CSR or CSC) or dense, float32 or float64.
        rank: of the approximation, at most min(m, n).
        iterations: subspace iterations of ``torch.svd_lowrank``, which starts from random numbers of torch's global
            generator (``torch.manual_seed``); more are more exact.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SVDView
        >>> view = SVDView(torch.rand(8, 6), rank=2)  # of users and items
        >>> view(torch.randn(6, 16)).shape, view(torch.randn(8, 16), transposed=True).shape
        (torch.Size([8, 16]), torch.Size([6, 16]))
    """

    u: Tensor
    s: Tensor
    v: Tensor

    def __init__(self, adjacency: Tensor, *, rank: int = 5, iterations: int = 2):
        super().__init__()
        check_matrix("adjacency", adjacency, sparse=True)
        if adjacency.dtype not in (torch.float32, torch.float64):
            raise ArgumentError(f"adjacency: expected float32 or float64, got {adjacency.dtype}")
        most = min(adjacency.shape)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= most:
            raise ArgumentError(f"rank: expected an integer from 1 to {most} (the smaller side), got {rank!r}")
        check_count("iterations", iterations, least=0)
        if adjacency.layout != torch.strided:
            adjacency = adjacency.to_sparse_coo()
        with without_autocast(adjacency.device):
            u, s, v = torch.svd_lowrank(adjacency.detach(), q=rank, niter=iterations)
        for name, factor in (("u", u), ("s", s), ("v", v)):
            self.register_buffer(name, factor)

    def forward(self, embeddings: Tensor, *, transposed: bool = False) -> Tensor:
        """Propagate embeddings.

        Args:
            embeddings: ``[n, d]`` of the columns, or with ``transposed`` ``[m, d]`` of the rows; any floating dtype.
            transposed: propagate from rows to columns.

        Returns:
            ``[m, d]``, or with ``transposed`` ``[n, d]``, of the dtype of the embeddings (products in float32 or more).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype or device.
        """
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        check_same("embeddings", embeddings, "the adjacency", self.u, dtype=False)
        check_flag("transposed", transposed)
        to, source = (self.v, self.u) if transposed else (self.u, self.v)
        if embeddings.shape[0] != source.shape[0]:
            raise ArgumentError(f"embeddings: expected {source.shape[0]} rows, got {embeddings.shape[0]}")
        wide = torch.promote_types(embeddings.dtype, accumulation_dtype(self.u))
        with without_autocast(embeddings.device):
            spectrum = self.s.to(wide)[:, None] * (source.to(wide).T @ embeddings.to(wide))
            return (to.to(wide) @ spectrum).to(embeddings.dtype)


def _check_nodes(nodes: Tensor, queries: Tensor) -> None:
    check_tensor("nodes", nodes)
    if nodes.ndim != 1:
        raise ArgumentError(f"nodes: expected shape [b], got {list(nodes.shape)}")
    check_rows("nodes", nodes, queries)
