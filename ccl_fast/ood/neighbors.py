"""Scores by the nearest training samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_seed
from ccl_fast.errors import ArgumentError
from ccl_fast.ood.detector import FeatureDetector
from ccl_fast.ops.normalize import normalize_rows

# Rows and columns of one tile of a query x training matrix: on a CPU it should stay in the cache.
CPU_TILE = 512, 8192
DEVICE_TILE = 4096, 16384


class NeighborDetector(FeatureDetector):
    """Base of the detectors that keep training samples: all of them, or as many as are asked for, drawn at random."""

    _tensors = ("features",)

    def __init__(self, model: Callable[[Tensor], Tensor] | None = None, *, max_rows: int | None = None, seed: int = 0):
        self.max_rows, self.seed = max_rows, seed
        super().__init__(model)

    def _check_hyperparameters(self) -> None:
        if self.max_rows is not None:
            check_count("max_rows", self.max_rows)
        check_seed("seed", self.seed)

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        if self.max_rows is not None and len(x) > self.max_rows:
            generator = torch.Generator().manual_seed(int(self.seed))
            drawn = torch.randperm(len(x), generator=generator, device="cpu")[: self.max_rows]
            x = x[drawn.sort().values.to(x.device)]
        self.features = normalize_rows(x)


class NearestNeighbor(NeighborDetector):
    r"""Cosine distance to the k-th nearest training sample.

    .. math::
        s(x) = 1 - \cos(x, x_{(k)})

    For unit vectors that is half the squared Euclidean distance, so it orders samples as pytorch-ood's ``KNN`` does.
    Memory grows with N + M: the matrix of cosines is made in tiles. A training sample is its own nearest neighbour.

    Args:
        model: see :class:`FeatureDetector`.
        k: which neighbour, of those that are kept; there must be so many.
        max_rows: training samples that are kept, drawn at random where there are more; None: all. The k-th of a share
            of the samples is as far as the (k / share)-th of all, on average.
        seed: of that draw.

    Paper: Sun, Ming, Zhu, Li, "Out-of-distribution detection with deep nearest neighbors", 2022.
    """

    hyperparameter_space: ClassVar[dict[str, list]] = {"k": [1, 5, 10, 20, 50, 100, 200]}

    def __init__(
        self,
        model: Callable[[Tensor], Tensor] | None = None,
        k: int = 1,
        *,
        max_rows: int | None = None,
        seed: int = 0,
    ):
        self.k = k
        super().__init__(model, max_rows=max_rows, seed=seed)

    def _check_hyperparameters(self) -> None:
        super()._check_hyperparameters()
        check_count("k", self.k)
        if self.max_rows is not None and self.max_rows < self.k:
            raise ArgumentError(f"max_rows: expected at least k={self.k}, got {self.max_rows}")

    def _fit(self, x: Tensor, y: Tensor | None) -> None:
        if len(x) < self.k:
            raise ArgumentError(f"x: expected at least k={self.k} rows, got {len(x)}")
        super()._fit(x, y)

    def _score(self, x: Tensor) -> Tensor:
        return (1 - largest_cosine(x, self.features, self.k)).clamp_(min=0)


class CosineNorm(NeighborDetector):
    r"""CSI's score: the cosine to the nearest training sample times the length of the feature, negated.

    .. math::
        s(x) = -\max_i \cos(x, x_i) \, |x|

    A contrastive loss sees directions only; the paper found that training makes the features of its images long all
    the same. So this is the one detector for which lengths count: give it features that are not normalised.

    Args:
        model: see :class:`FeatureDetector`.
        max_rows, seed: as of :class:`NearestNeighbor`.

    Paper: Tack, Mo, Jeong, Shin, "CSI: novelty detection via contrastive learning on distributionally shifted
    instances", 2020 (there also summed over shifts and augmentations of x).
    """

    def _score(self, x: Tensor) -> Tensor:
        return -largest_cosine(x, self.features) * x.norm(dim=1, dtype=torch.float64).to(x.dtype)


def largest_cosine(x: Tensor, others: Tensor, k: int = 1) -> Tensor:
    """The k-th largest cosine [M] of every row of x, [M, D], to the unit vectors others, [N, D], N >= k.

    A zero row has cosine 0. Tiles of the matrix come and go: memory is that of the arguments and of one tile.
    """
    rows, columns = CPU_TILE if x.device.type == "cpu" else DEVICE_TILE
    result = []
    for block in normalize_rows(x).split(rows):
        best = block.new_empty(len(block), 0)
        for tile in others.split(columns):
            best = torch.cat([best, _largest(block @ tile.T, k)], 1)
            best = _largest(best, k)
        result.append(best.amin(1))
    return torch.cat(result)


def _largest(values: Tensor, k: int) -> Tensor:
    if k == 1:
        return values.amax(1, keepdim=True)
    return values.topk(k, sorted=False).values if values.shape[1] > k else values
