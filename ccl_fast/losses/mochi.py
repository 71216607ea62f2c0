"""InfoNCE against a queue and against mixtures of the hardest rows in it."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_queries, check_some
from ccl_fast.ops import cross_entropy, logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.rowwise.mixtures import Mixing, mixture_logsumexp

# Places in a list of at most so many are drawn as 16-bit numbers, in longer ones as 32-bit.
LAST_OF_16_BITS = 2**15 - 1


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
    built: its logit takes the inner products of what is mixed alone, some anchors at a time, so memory is linear in n
    and in the queue, besides what is drawn: places and weights of n (s + s') mixtures. Without mixtures it is InfoNCE
    against the queue. A second derivative raises.

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
        operators: LSE over the queue; some anchors at a time their hardest, `edge_similarity` of the pairs that are
            mixed, and the mean of the mixtures.
        units: 3 + 1 of N x M x D; 1 of N x (hardest) x D; 1 of N x s x D.

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
            hardest = min(self.num_hardest, negatives.shape[0])
            mixing = self.draw(q.shape[0], hardest, positives, generator)
            of_mixtures = mixture_logsumexp(q, negatives, mixing, topk=hardest, scale=scale)
            logsumexp = logaddexp(logsumexp, of_mixtures)
        return self.reduce(cross_entropy(logsumexp, positives))

    def draw(self, n: int, hardest: int, like: Tensor, generator: torch.Generator | None) -> Mixing:
        """What to mix for n anchors with lists of ``hardest`` negatives."""
        options = {"generator": generator, "device": like.device}
        place = torch.int16 if hardest <= LAST_OF_16_BITS else torch.int32
        first, second = torch.randint(hardest, (2, n, self.num_synthetic), dtype=place, **options)
        alpha = torch.rand(n, self.num_synthetic, dtype=like.dtype, **options)
        other = torch.randint(hardest, (n, self.num_with_query), dtype=place, **options)
        beta = torch.rand(n, self.num_with_query, dtype=like.dtype, **options) / 2
        return Mixing(first, second, alpha, other, beta)
