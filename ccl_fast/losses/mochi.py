"""InfoNCE against a queue and against mixtures of the hardest rows in it."""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries, check_some
from ccl_fast.ops import cross_entropy, edge_similarity, logaddexp, row_dot, streaming_logsumexp, streaming_topk


class Mixing(NamedTuple):
    """What is mixed: places in the anchors' lists of hardest negatives, and weights."""

    first: Tensor  # [n, s] int64
    second: Tensor  # [n, s] int64
    alpha: Tensor  # [n, s], of the first
    other: Tensor  # [n, s'] int64
    beta: Tensor  # [n, s'], of the anchor


class MoCHiLoss(Loss):
    r"""InfoNCE whose negatives are a queue and, of each anchor, synthetic rows mixed from the hardest of the queue.

    .. math::
        \ell(q_i) = \log \Big( e^{\langle q_i, k_i \rangle / T} + \sum_{u} e^{\langle q_i, u \rangle / T}
            + \sum_{j=1}^{s} e^{\langle q_i, h_{ij} \rangle / T} + \sum_{j=1}^{s'} e^{\langle q_i, h'_{ij} \rangle / T}
            \Big) - \langle q_i, k_i \rangle / T

    with u the rows of the queue, :math:`u_a, u_b` drawn at random from the N most similar to :math:`q_i`, and

    .. math::
        h \propto \alpha u_a + (1 - \alpha) u_b, \quad h' \propto \beta q_i + (1 - \beta) u_a, \qquad
        |h| = |h'| = 1, \quad \alpha \in (0, 1), \quad \beta \in (0, \tfrac12)

    Mixtures are constants, as the queue is: no gradient flows through the anchor that went into h'. None is ever
    built: its logit takes the inner products of what is mixed alone, so memory is linear in n and in the queue, besides
    n (N + s + s') numbers. Without mixtures it is InfoNCE against the queue. A second derivative raises.

    Kalantidis et al., "Hard Negative Mixing for Contrastive Learning" (arXiv:2010.01028), on MoCo v2, with the
    defaults of its MoCHi (1024, 1024, 128). It starts to mix after some epochs: until then set ``num_synthetic``
    and ``num_with_query``, which are attributes, to 0. This project's reading: mixtures are constants, and a and b are
    drawn independently, so they may be the same.

    Args:
        temperature: T, > 0; the initial value if learnable.
        num_hardest: N, at least 1; of a shorter queue all.
        num_synthetic: s, mixtures of two negatives, at least 0.
        num_with_query: s', mixtures of a negative with the anchor, at least 0.
        learnable_temperature, normalize, reduction, backend: as in `Loss`. Mixtures have length 1 in any case.
            (It runs on one process.)

    Cost:
        operators: LSE over the queue; `streaming_topk`; `edge_similarity` of the anchors with their hardest, and of
            the pairs that are mixed.
        units: 3 + 1 of N x M x D; 2 of N x (hardest) x D; 1 of N x s x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import MoCHiLoss
        >>> loss_fn = MoCHiLoss(temperature=0.2, num_hardest=16, num_synthetic=8, num_with_query=4)
        >>> loss_fn(torch.randn(8, 16), torch.randn(8, 16), negatives=torch.randn(64, 16)).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        num_hardest: int = 1024,
        num_synthetic: int = 1024,
        num_with_query: int = 128,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_count("num_hardest", num_hardest)
        check_count("num_synthetic", num_synthetic, least=0)
        check_count("num_with_query", num_with_query, least=0)
        self.num_hardest, self.num_synthetic, self.num_with_query = num_hardest, num_synthetic, num_with_query

    def forward(
        self, queries: Tensor, keys: Tensor, *, negatives: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the anchors; float64, float32, bfloat16 or float16.
            keys: ``[n, d]``; row i is the positive of query i. (MoCo gives them no gradient: detach them.)
            negatives: ``[m, d]``, the queue: embeddings of earlier batches, at least one; no gradient flows to them.
            generator: of what is mixed, on the queries' device; None is torch's own.

        Returns:
            The loss, float32 (float64 for float64 embeddings); with reduction "none" ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        check_queries(queries, keys, negatives, required=("keys", "negatives"))
        check_some("negatives", negatives)
        scale = 1.0 / self.temperature
        q, negatives = self.unit(queries), self.unit(negatives.detach())
        positives = row_dot(q, self.unit(keys)) * scale
        logsumexp = streaming_logsumexp(q, negatives, scale=scale, backend=self.backend)
        if self.num_synthetic + self.num_with_query:
            mixed = self._similarity_of_mixtures(q, negatives, generator)
            logsumexp = logaddexp(logsumexp, (mixed * scale).logsumexp(1))
        return self.reduce(cross_entropy(logsumexp, positives))

    def draw(self, n: int, hardest: int, like: Tensor, generator: torch.Generator | None) -> Mixing:
        """What to mix for n anchors with lists of ``hardest`` negatives."""
        options = {"generator": generator, "device": like.device}
        first, second = torch.randint(hardest, (2, n, self.num_synthetic), **options)
        alpha = torch.rand(n, self.num_synthetic, dtype=like.dtype, **options)
        other = torch.randint(hardest, (n, self.num_with_query), **options)
        beta = torch.rand(n, self.num_with_query, dtype=like.dtype, **options) / 2
        return Mixing(first, second, alpha, other, beta)

    def _similarity_of_mixtures(self, q: Tensor, negatives: Tensor, generator: torch.Generator | None) -> Tensor:
        """<q_i, h> of all mixtures of each anchor, [n, s + s']."""
        n, hardest = q.shape[0], min(self.num_hardest, negatives.shape[0])
        hard = streaming_topk(q, negatives, topk=hardest)[1]
        similarity = edge_similarity(
            q, negatives, torch.arange(n + 1, device=q.device) * hardest, hard.flatten()
        ).view(n, hardest)  # fmt: skip
        first, second, alpha, other, beta = self.draw(n, hardest, similarity, generator)
        square = row_dot(negatives, negatives)

        a, b = hard.gather(1, first), hard.gather(1, second)
        of_two = _mixed(
            alpha,
            (similarity.gather(1, first), similarity.gather(1, second)),
            (square[a], square[b], _similarity_at(negatives, a, b)),
        )
        near, constant = similarity.gather(1, other), q.detach()
        of_query = _mixed(
            beta,
            (row_dot(q, constant)[:, None], near),
            (row_dot(constant, constant)[:, None], square[hard.gather(1, other)], near.detach()),
        )
        return torch.cat((of_two, of_query), dim=1)


def _mixed(weight: Tensor, similarity: tuple[Tensor, Tensor], products: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """<q, h> of h = w x + (1 - w) y at unit length, given <q, x>, <q, y>, and <x, x>, <y, y>, <x, y>."""
    x, y, both = products
    square = weight**2 * x + (1 - weight) ** 2 * y + 2 * weight * (1 - weight) * both
    return (weight * similarity[0] + (1 - weight) * similarity[1]) * square.clamp(min=1e-12).rsqrt()


def _similarity_at(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """<x_a, x_b> of index pairs of any shape, by the row of a."""
    ordered, order = a.flatten().sort()
    rows = torch.searchsorted(ordered, torch.arange(x.shape[0] + 1, device=x.device))
    found = edge_similarity(x, x, rows, b.flatten()[order])
    return torch.empty_like(found).index_copy_(0, order, found).view(a.shape)
