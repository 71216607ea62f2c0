"""InfoNCE between views of an image, and between images of one pseudo-label."""

import math
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_matrix, check_number, check_same, check_share, check_vector
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import ceil_of_share, check_ids, check_queries, check_rows, check_some
from ccl_fast.ops import cross_entropy, row_dot, streaming_logsumexp, topk_logsumexp
from ccl_fast.ops.ids import separate_unassigned


class InterCLRLoss(Loss):
    r"""Contrasts an image with its other view and a queue, and with an image of its cluster and semi-hard others.

    .. math::
        \ell_i = (1 - \lambda) \Big[ \log \Big( e^{\langle q_i, k_i \rangle / T}
            + \sum_u e^{\langle q_i, u \rangle / T} \Big) - \langle q_i, k_i \rangle / T \Big]
            + \lambda \Big[ \log \Big( e^{(\langle q_i, b_p \rangle - m) / T}
            + \sum_{j \in N_i} e^{\langle q_i, b_j \rangle / T} \Big) - (\langle q_i, b_p \rangle - m) / T \Big]

    with u the rows of a queue and b a memory bank that holds one row of each image of the data set, with pseudo-labels:

    - the positive :math:`b_p` is drawn from all images of the anchor's label, its own earlier row being one of them;
    - the negatives :math:`N_i` are as good as drawn from the share x of the bank that is most similar to the anchor
      ("semi-hard"), without its label: they are the most similar share x of some drawn rows, 1 / x times as many as
      negatives are wanted. So none is gathered, and memory is linear in n and in the bank;
    - the margin m is the positive's. Below 0 it loosens the decision: two images of a cluster need not be one.

    No gradient flows to the queue and the bank. A second derivative raises.

    Xie et al., "Delving into Inter-Image Invariance for Unsupervised Visual Representations" (arXiv:2008.11702) on
    MoCo v2, with the defaults of its code for ImageNet (a bank of 1.28 million). This project's reading: the code draws
    from each anchor's 128,000 nearest rows of the bank, again where a row has its label; here rows are drawn once for
    the batch, and those of its label are left out before the nearest are taken. The paper's labels are online, as
    those of `ccl_fast.clustering.OnlineClusters`.

    Args:
        temperature: T, > 0; the initial value if learnable.
        inter_weight: lambda, from 0 to 1.
        num_negatives: wanted from the bank for each anchor, at least 1.
        pool: x, 0 < x <= 1; 1 draws them from the whole bank.
        margin: m.
        learnable_temperature, normalize, reduction, backend: as in `Loss`; the backend is that of the queue. (It
            runs on one process.)

    Cost:
        operators: LSE over the queue; `topk_logsumexp` over drawn rows, `candidates="other_id"`.
        units: 3 of N x M x D; 3 of N x R x D, and the selection.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import InterCLRLoss
        >>> q, k, queue, bank = (torch.randn(n, 16) for n in (8, 8, 64, 100))
        >>> of_bank = {"bank": bank, "bank_cluster_ids": torch.arange(100) % 5, "indices": torch.arange(8)}
        >>> InterCLRLoss(num_negatives=10)(q, k, negatives=queue, **of_bank).shape
        torch.Size([])
    """

    unsupported = ("process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        inter_weight: float = 0.25,
        num_negatives: int = 16384,
        pool: float = 0.1,
        margin: float = -0.5,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_number("inter_weight", inter_weight, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        check_count("num_negatives", num_negatives)
        check_share("pool", pool)
        check_number("margin", margin, "a finite number", math.isfinite)
        self.inter_weight, self.num_negatives, self.pool, self.margin = inter_weight, num_negatives, pool, margin

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        negatives: Tensor,
        bank: Tensor,
        bank_cluster_ids: Tensor,
        indices: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[n, d]``, the anchors; float64, float32, bfloat16 or float16.
            keys: ``[n, d]``; row i is the positive of query i. (MoCo gives them no gradient: detach them.)
            negatives: ``[m, d]``, the queue: embeddings of earlier batches, at least one.
            bank: ``[b, d]`` earlier embeddings of all images.
            bank_cluster_ids: ``[b]``, integers, their pseudo-labels; -1 is unassigned: a cluster of its own.
            indices: ``[n]``, integers: the rows of the bank that are the queries' images.
            generator: of what is drawn, on the queries' device; None is torch's own.

        Returns:
            The loss, float32 (float64 for float64 embeddings); with reduction "none" ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1, or an index out of range (on a GPU torch's assertion on the device).
        """
        check_queries(queries, keys, negatives, required=("keys", "negatives"))
        check_some("negatives", negatives)
        check_matrix("bank", bank, columns=queries.shape[1])
        check_same("bank", bank, "queries", queries)
        check_some("bank", bank)
        check_ids("bank_cluster_ids", bank_cluster_ids, bank)
        check_vector("indices", indices, queries.shape[0])
        check_rows("indices", indices, bank)
        scale, q = 1.0 / self.temperature, self.unit(queries)
        intra = _info_nce(
            row_dot(q, self.unit(keys)) * scale,
            streaming_logsumexp(q, self.unit(negatives.detach()), scale=scale, backend=self.backend),
        )
        inter = self._inter(
            q, bank.detach(), separate_unassigned(bank_cluster_ids.long()), indices.long(), scale, generator
        )
        losses = (1 - self.inter_weight) * intra + self.inter_weight * inter
        return self.reduce(losses)

    def draw(self, n: int, size: int, like: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Draw which of its cluster is each anchor's positive, ``[n]`` from 0 to 1.

        And rows of a bank of ``size`` among which are the negatives.
        """
        options = {"generator": generator, "device": like.device}
        all_of_them = self.num_negatives >= size * self.pool
        wanted = size if all_of_them else ceil_of_share(1 / self.pool, self.num_negatives)
        which = torch.rand(n, dtype=torch.float32, **options)
        return which, torch.randperm(size, **options)[:wanted]

    def _inter(
        self,
        q: Tensor,
        bank: Tensor,
        ids: Tensor,
        indices: Tensor,
        scale: float | Tensor,
        generator: torch.Generator | None,
    ) -> Tensor:
        own = ids.index_select(0, indices)
        which, drawn = self.draw(q.shape[0], bank.shape[0], q, generator)
        ordered, order = ids.sort(stable=True)  # the same draw everywhere
        first, end = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
        place = first + (which * (end - first)).long()
        positives = self.unit(bank[order[place]])
        hardest = max(ceil_of_share(self.pool, drawn.shape[0]), 1)
        return _info_nce(
            (row_dot(q, positives) - self.margin) * scale,
            topk_logsumexp(
                q,
                self.unit(bank[drawn]),
                scale=scale,
                topk=hardest,
                q_ids=own,
                k_ids=ids[drawn],
                candidates="other_id",
            ),
        )


def _info_nce(positives: Tensor, logsumexp: Tensor) -> Tensor:
    return cross_entropy(logsumexp, positives)
