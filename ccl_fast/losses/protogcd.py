"""Prototypes of old and new classes by distillation between views (ProtoGCD)."""

import math
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import (
    check_floating,
    check_matrix,
    check_not_negative,
    check_number,
    check_same,
    checked_temperature,
)
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids, check_queries, check_some, labels_as_ids
from ccl_fast.ops import (
    cross_entropy,
    distilled_prediction,
    log_assignment_mass,
    row_dot,
    streaming_logsumexp,
    streaming_topk,
)


class ProtoGCDLoss(Loss):
    r"""Classifies a view as the other view is, by prototypes that learn to be far apart and to get equal shares.

    With z, z' unit embeddings of two views, c unit prototypes, p a view's softmax of :math:`\langle z, c_k \rangle / T`
    and q that at the teacher's temperature, a constant, which of a share r of the rows is the indicator of its largest
    entry: of those whose two largest similarities differ most,

    .. math::
        \mathcal{L} = (1 - w) \Big[ \frac12 \big\langle - q' \log p - q \log p' \big\rangle
            + w_e \Big( \log K + \sum_k \bar p_k \log \bar p_k \Big)
            + w_s \Big\langle \log \frac{1}{K - 1} \sum_{b \ne a} e^{\langle c_a, c_b \rangle / T} \Big\rangle_a \Big]
            + w \big\langle - \log p_y \big\rangle_{\text{labelled}}

    with :math:`\bar p` the mean of p over all rows. Prototypes 0, 1, ... are those of the labels of the same number,
    the others those of classes that have none. Memory is linear in n and K; a second derivative raises.

    Ma, Zhu, Zhang, Liu, "ProtoGCD: Unified and Unbiased Prototype Learning for Generalized Category Discovery"
    (arXiv:2504.03755), where r grows linearly from 0.2 to 1 in 100 epochs of 200. Their whole loss has InfoNCE and
    SupCon of projected features beside it, with the same weights: `InfoNCELoss` and `SupConLoss`.

    Args:
        temperature: T, > 0; the initial value if learnable.
        teacher_temperature: of q, > 0.
        hard_share: r, 0 to 1. It may be set later (``loss.hard_share = 0.5``), as a schedule does.
        entropy_weight: w_e, >= 0.
        separation_weight: w_s, >= 0.
        supervised_weight: w, 0 to 1.
        learnable_temperature, normalize, backend: as in `Loss`; the backend is that of the log-sum-exps. (Terms of the
            whole batch are no sum over rows: there is no other reduction than the mean. It runs on one process.)

    Cost:
        operators: `distilled_prediction` of both views; which rows are hard by `streaming_topk` of the teacher;
            `assignment_mass` of all rows; LSE of the prototypes against themselves, and of labelled rows over them.
        units: 15 of N x K x D (distillation 6, top-k 1, mass 8), with labels 4 more; 2 of K x K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import ProtoGCDLoss
        >>> prototypes, labels = torch.nn.Parameter(torch.randn(5, 16)), torch.tensor([0, 1, 2, 0, -1, -1, -1, -1])
        >>> ProtoGCDLoss()(torch.randn(8, 2, 16), prototypes, labels=labels).backward()
        >>> prototypes.grad.shape
        torch.Size([5, 16])
    """

    unsupported = ("reduction", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        teacher_temperature: float = 0.05,
        hard_share: float = 1.0,
        entropy_weight: float = 2.0,
        separation_weight: float = 0.1,
        supervised_weight: float = 0.35,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        self.teacher_temperature = checked_temperature("teacher_temperature", teacher_temperature)
        _check_share("hard_share", hard_share)
        _check_share("supervised_weight", supervised_weight)
        for name, weight in (("entropy_weight", entropy_weight), ("separation_weight", separation_weight)):
            check_not_negative(name, weight)
        self.hard_share, self.supervised_weight = hard_share, supervised_weight
        self.entropy_weight, self.separation_weight = entropy_weight, separation_weight

    def forward(self, embeddings: Tensor, prototypes: Tensor, *, labels: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, 2, d]``; float64, float32, bfloat16 or float16.
            prototypes: ``[k, d]``, such as an nn.Parameter; they get a gradient.
            labels: ``[n]`` or ``[n, 1]``, of any integer dtype, bool, or whole numbers of a floating one, below k; -1
                for unlabelled. None: no row has one.

        Returns:
            The loss, float32 (float64 for float64 embeddings). Without rows the separation of the prototypes alone.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is below -1 or not less than k (on a GPU: an assertion on the device).
        """
        _check_share("hard_share", self.hard_share)  # it may have been set since
        check_queries(embeddings, None, names=("embeddings", "keys"))
        check_matrix("prototypes", prototypes, columns=embeddings.shape[2])
        check_floating("prototypes", prototypes)
        check_same("prototypes", prototypes, "embeddings", embeddings, dtype=False)
        check_some("prototypes", prototypes)
        if labels is not None:
            labels = labels_as_ids(labels, embeddings)
            check_ids("labels", labels, embeddings, prototypes.shape[0], "prototypes")
        z = self.unit(embeddings.transpose(0, 1).flatten(0, 1))
        centers, scale = self.unit(prototypes).to(z.dtype), 1.0 / self.temperature
        loss = self.separation_weight * self._separation(centers, scale)
        if z.shape[0]:
            loss = loss + self._distillation(z, centers, scale)
            loss = loss + self.entropy_weight * self._lack_of_entropy(z, centers, scale)
        loss = (1 - self.supervised_weight) * loss + 0.0 * z.sum(dtype=loss.dtype)
        if labels is None or not self.supervised_weight:
            return loss
        return loss + self.supervised_weight * self._supervised(z, centers, scale, labels.long().repeat(2))

    def _distillation(self, z: Tensor, centers: Tensor, scale: float | Tensor) -> Tensor:
        """Mean of both views' predictions of the other's assignments."""
        teacher = z.detach().roll(z.shape[0] // 2, dims=0)
        return distilled_prediction(
            z,
            centers,
            teacher,
            centers,
            scale=scale,
            teacher_scale=1.0 / self.teacher_temperature,
            hard=self._are_hard(teacher, centers.detach()),
        ).mean()

    def _are_hard(self, teacher: Tensor, centers: Tensor) -> Tensor | None:
        """Of each view's rows the share with the largest ratios of the two largest entries of q."""
        n = teacher.shape[0] // 2
        number = int(n * self.hard_share)
        if number == 0:
            return None
        if number == n:
            return torch.ones(2 * n, dtype=torch.bool, device=teacher.device)
        largest, second = streaming_topk(teacher, centers, topk=2)[0].unbind(1)
        chosen = (largest - second).view(2, n).topk(number, sorted=False).indices
        return torch.zeros(2, n, dtype=torch.bool, device=teacher.device).scatter(1, chosen, True).flatten()

    def _lack_of_entropy(self, z: Tensor, centers: Tensor, scale: float | Tensor) -> Tensor:
        log_mean = log_assignment_mass(z, centers, scale=scale, backend=self.backend) - math.log(z.shape[0])
        return math.log(centers.shape[0]) + (log_mean.exp() * log_mean).sum()

    def _separation(self, centers: Tensor, scale: float | Tensor) -> Tensor:
        """0 of a single prototype."""
        others = centers.shape[0] - 1
        if others == 0:
            return 0.0 * (centers * scale).sum()
        return streaming_logsumexp(centers, scale=scale, backend=self.backend).mean() - math.log(others)

    def _supervised(self, z: Tensor, centers: Tensor, scale: float | Tensor, labels: Tensor) -> Tensor:
        """Cross-entropies with the labels, the mean over the rows that have one."""
        own = labels.clamp(min=0)
        others = streaming_logsumexp(
            z,
            centers,
            scale=scale,
            q_ids=own,
            k_ids=torch.arange(centers.shape[0], device=centers.device),
            candidates="other_id",
            backend=self.backend,
        )
        return self.reduce(cross_entropy(others, row_dot(z, centers[own]) * scale), labels >= 0)


def _check_share(name: str, share: float) -> None:
    check_number(name, share, "a number from 0 to 1", lambda x: 0 <= x <= 1)
