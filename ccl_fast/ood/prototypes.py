"""Scores by how surely a sample belongs to one of the prototypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from ccl_fast.checks import check_choice, check_finite, check_floating, check_matrix, checked_temperature
from ccl_fast.errors import ArgumentError
from ccl_fast.ood.clusters import NearestCenter
from ccl_fast.ood.neighbors import largest_cosine
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.ops.normalize import normalize_rows

if TYPE_CHECKING:
    from torch import Tensor

Score = Literal["energy", "max_softmax", "max_logit"]


class PrototypeScore(NearestCenter):
    r"""How little a sample is drawn to the prototypes of the classes, or of the clusters.

    .. math::
        \text{energy:}\quad & s(x) = -T \log \sum_k e^{\cos(x, c_k) / T} \\
        \text{max\_softmax:}\quad & s(x) = -\max_k \mathrm{softmax}_k(\cos(x, c_k) / T) \\
        \text{max\_logit:}\quad & s(x) = -\max_k \cos(x, c_k)

    The energy counts all prototypes near the sample, the largest logit the nearest alone (it orders samples as
    `NearestCenter` does), the largest softmax how far that is ahead of the others. Memory is linear in samples and
    prototypes.

    Args:
        score: "energy", "max_softmax" or "max_logit".
        prototypes: c ``[k, D]``, such as those that a loss has learned, of any length. None: the mean directions of the
            clusters that the detector is fitted with, as in `NearestCenter`.
        n_clusters: number of spherical k-means clusters made when fitted without labels or prototypes.
        temperature: T.
        model: see :class:`FeatureDetector`.
        seed: seed of that k-means.

    Papers: Liu, Wang, Owens, Li, "Energy-based out-of-distribution detection", 2020; Hendrycks, Gimpel, "A baseline for
    detecting misclassified and out-of-distribution examples in neural networks", 2017; Hendrycks et al., "Scaling
    out-of-distribution detection for real-world settings", 2022. Over learned prototypes: Ma, Zhu, Zhang, Liu,
    "ProtoGCD" (arXiv:2504.03755), with T = 1 for the energy.

    Example:
        >>> import torch
        >>> from ccl_fast.ood import PrototypeScore
        >>> prototypes = torch.eye(3)
        >>> detector = PrototypeScore("max_logit", prototypes=prototypes).fit_features(torch.randn(9, 3))
        >>> detector.predict_features(torch.tensor([[0.0, 2.0, 0.0], [-1.0, -1.0, -1.0]]))
        tensor([-1.0000,  0.5774])
    """

    hyperparameter_space: ClassVar[dict[str, list]] = {
        "score": list(get_args(Score)),
        "temperature": [0.05, 0.1, 0.2, 1.0],
        **NearestCenter.hyperparameter_space,
    }

    def __init__(
        self,
        score: Score = "energy",
        *,
        prototypes: Tensor | None = None,
        n_clusters: int = 1,
        temperature: float = 0.1,
        model: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
    ):
        self.score: Score = score
        self.prototypes, self.temperature = prototypes, temperature
        super().__init__(model, n_clusters, seed=seed)

    def _check_hyperparameters(self) -> None:
        super()._check_hyperparameters()
        check_choice("score", self.score, get_args(Score))
        self.temperature = checked_temperature("temperature", self.temperature)
        if self.prototypes is not None:
            check_matrix("prototypes", self.prototypes)
            check_floating("prototypes", self.prototypes)
            check_finite("prototypes", self.prototypes)
            if not len(self.prototypes):
                raise ArgumentError("prototypes: expected at least one row, got none")

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        if self.prototypes is None:
            super()._fit(x, y)
            return
        check_matrix("prototypes", self.prototypes, x.shape[1])
        self.centers = normalize_rows(self.prototypes.detach().to(x))

    def _score(self, x: Tensor) -> Tensor:
        largest = largest_cosine(x, self.centers)
        if self.score == "max_logit":
            return -largest
        scale = 1.0 / self.temperature
        logsumexp = streaming_logsumexp(normalize_rows(x), self.centers, scale=scale)
        return -self.temperature * logsumexp if self.score == "energy" else -(largest * scale - logsumexp).exp()
