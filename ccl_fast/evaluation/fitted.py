"""The detectors of a model once they are fitted, as a run keeps them: they need the training images no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ccl_fast.evaluation.detectors import make_detectors
from ccl_fast.evaluation.thresholds import threshold
from ccl_fast.ops import kmeans_assign

if TYPE_CHECKING:
    from torch import Tensor

    from ccl_fast.ood.detector import FeatureDetector

# How names of tensors begin.
DETECTOR, CENTERS, TEST_SCORES = "detector", "centers", "test_scores"


@dataclass
class FittedDetectors:
    """Detectors that are fitted to training images, with what the run's test images and clusters say of a score.

    Attributes:
        arguments: of `make_detectors`.
        detectors: by "<level>/<name>".
        centers: "encoder" or "head" -> unit centres [k, d] of the clusters of the training images.
        test_scores: by detector, the scores [m] of the test images in ascending order.
    """

    arguments: dict[str, Any]
    detectors: dict[str, FeatureDetector]
    centers: dict[str, Tensor]
    test_scores: dict[str, Tensor]

    def threshold(self, name: str, accept: float) -> float:
        """The least score that accepts that share of the test images, by the detector of that name."""
        return threshold(self.test_scores[name], accept)

    def nearest_clusters(self, name: str, features: Mapping[str, Tensor]) -> Tensor:
        """The cluster whose centre is nearest, int64 [n]; of the level "all" by the head's features.

        Args:
            name: of a detector.
            features: by level, [n, d].
        """
        level = "encoder" if name.startswith("encoder/") else "head"
        return kmeans_assign(features[level], self.centers[level].to(features[level].device), metric="cosine")[0]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors by name, and as plain values."""
        tensors = {f"{CENTERS}.{level}": centers for level, centers in self.centers.items()}
        tensors |= {f"{TEST_SCORES}.{name}": scores for name, scores in self.test_scores.items()}
        for name, detector in self.detectors.items():
            tensors |= {f"{DETECTOR}.{name}.{of}": tensor for of, tensor in detector.state_dict().items()}
        return tensors, {"arguments": self.arguments}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], description: Mapping[str, Any]) -> Self:
        """Make them again from what `state` has returned.

        Raises:
            Exception: whatever tensors and values that are others make a constructor say.
        """
        arguments = dict(description["arguments"])
        detectors = make_detectors(**arguments)
        for name, detector in detectors.items():
            detector.load_state_dict(_under(f"{DETECTOR}.{name}.", tensors))
        scores = _under(f"{TEST_SCORES}.", tensors)
        return cls(arguments, detectors, _under(f"{CENTERS}.", tensors), {name: scores[name] for name in detectors})


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
