"""What a run can minimise after its warm-up. A row of the table is all there is to an objective."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from ccl_fast.losses import (
    CACRLoss,
    CCLLoss,
    CMIMLoss,
    CodingRateLoss,
    DeepClusterV2Loss,
    GroCoLoss,
    HardContrastiveLoss,
    MEOWLoss,
    PamCLoss,
    ProtoGCDLoss,
    ProtoNCELoss,
    SupConLoss,
    SwAVLoss,
)
from ccl_fast.training.cooperation import Clustering, CooperativeCCL

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Of a loss, embeddings [b, 2 views, d], and what they are held against, an entry for every number in ``clusters``:
# a Clustering, or prototypes [k, d].
Value = Callable[[Any, Tensor, Sequence], Tensor]

ObjectiveName = Literal[
    "simclr",
    "hard-contrastive",
    "cacr",
    "cmim",
    "groco",
    "ccl",
    "supcon",
    "protonce",
    "deepcluster-v2",
    "pamc",
    "meow",
    "coding-rate",
    "swav",
    "protogcd",
]


@dataclass(frozen=True)
class Objective:
    """A way of contrasting images.

    Attributes:
        title: in tables and reports.
        loss: makes the module from its ``temperature`` and, if it takes one, its ``process_group``.
        value: calls it.
        needs: what the embeddings are held against: "nothing" but each other, "clusters" of k-means, or "prototypes",
            which are learned with the network.
        options: which of ``OPTIONS`` it uses.
        min_clusters: with fewer its loss is constant, as there is nothing to tell apart.
    """

    title: str
    loss: Callable[..., nn.Module]
    value: Value
    needs: Literal["nothing", "clusters", "prototypes"]
    options: tuple[str, ...] = ()
    min_clusters: int = 1

    @property
    def is_distributed(self) -> bool:
        """Whether several processes can share a batch."""
        options, unsupported = inspect.signature(self.loss).parameters, getattr(self.loss, "unsupported", ())
        return "process_group" in options and "process_group" not in unsupported

    def make_loss(self, temperature: float, process_group: ProcessGroup | str | None) -> nn.Module:
        return self.loss(temperature=temperature, **({"process_group": process_group} if self.is_distributed else {}))


def _mean(value: Callable[[Any, Tensor, Any], Tensor]) -> Value:
    """Make the mean over the numbers of clusters of a loss for one."""
    return lambda loss, z, targets: torch.stack([value(loss, z, of) for of in targets]).mean()


def _protonce(loss: ProtoNCELoss, z: Tensor, targets: Sequence[Clustering]) -> Tensor:
    ids, centers, temperatures, *_ = zip(*targets, strict=True)
    return loss(z, ids, centers, center_temperature=None if temperatures[0] is None else temperatures)


def _deepcluster(loss: DeepClusterV2Loss, z: Tensor, targets: Sequence[Clustering]) -> Tensor:
    return loss(z, [of.ids for of in targets], [of.centers for of in targets])


def _pamc(loss: PamCLoss, z: Tensor, of: Clustering) -> Tensor:
    """Return the loss with both views as anchors."""
    first, second = z.unbind(1)
    return (loss(first, second, of.ids) + loss(second, first, of.ids)) / 2


# The baseline, and the warm-up of every other objective.
BASELINE: ObjectiveName = "simclr"

# Options of all objectives on k-means clusters, and of how CCL's clusters and instances cooperate.
OF_CLUSTERS = ("recluster_every", "labels_from")
OF_COOPERATION = ("instance_weight", "instance_negatives", "believe")

# By name. (Not here: SBCL, which needs classes, and MCL, whose every stage trains a network of its own.)
OBJECTIVES: dict[ObjectiveName, Objective] = {
    # Without ids CCLLoss is NT-Xent.
    BASELINE: Objective("SimCLR", CCLLoss, lambda loss, z, _: loss(z), "nothing"),
    "hard-contrastive": Objective("Hard contrastive", HardContrastiveLoss, lambda loss, z, _: loss(z), "nothing"),
    # It has no temperature (the warm-up does).
    "cacr": Objective(
        "CACR",
        lambda temperature: CACRLoss(negatives_of="all views"),
        lambda loss, z, _: loss(z),
        "nothing",
    ),
    # Its other view is what a row is told from the others by: there is no decoder.
    "cmim": Objective("cMIM", CMIMLoss, lambda loss, z, _: loss(z), "nothing"),
    # It has no temperature either.
    "groco": Objective("GroCo", lambda temperature: GroCoLoss(), lambda loss, z, _: loss(z), "nothing"),
    "ccl": Objective(
        "CCL",
        CooperativeCCL,
        _mean(lambda loss, z, of: loss(z, of)),
        "clusters",
        (*OF_CLUSTERS, "center_weight", "center_ramp_epochs", "concentration", *OF_COOPERATION),
    ),
    "supcon": Objective(
        "SupCon",
        SupConLoss,
        _mean(lambda loss, z, of: loss(z, of.ids)),
        "clusters",
        OF_CLUSTERS,
    ),
    "protonce": Objective("ProtoNCE", ProtoNCELoss, _protonce, "clusters", (*OF_CLUSTERS, "concentration")),
    "deepcluster-v2": Objective(
        "DeepCluster-v2",
        DeepClusterV2Loss,
        _deepcluster,
        "clusters",
        OF_CLUSTERS,
        min_clusters=2,
    ),
    "pamc": Objective(
        "PamC",
        functools.partial(PamCLoss, form="node"),
        _mean(_pamc),
        "clusters",
        OF_CLUSTERS,
    ),
    "meow": Objective(
        "MEOW",
        functools.partial(MEOWLoss, weigh_positive=False),
        _mean(lambda loss, z, of: loss(z, of.ids)),
        "clusters",
        OF_CLUSTERS,
        min_clusters=2,
    ),
    # It has no temperature either.
    "coding-rate": Objective(
        "Coding rate",
        lambda temperature, process_group=None: CodingRateLoss(process_group=process_group),
        _mean(lambda loss, z, of: loss(z, of.ids)),
        "clusters",
        OF_CLUSTERS,
        min_clusters=2,
    ),
    "swav": Objective(
        "SwAV",
        SwAVLoss,
        _mean(lambda loss, z, prototypes: loss(z, prototypes)),
        "prototypes",
        min_clusters=2,
    ),
    # Its unsupervised part; the share of hard labels is the loop's.
    "protogcd": Objective(
        "ProtoGCD",
        lambda temperature: ProtoGCDLoss(temperature, teacher_temperature=temperature / 2, supervised_weight=0.0),
        _mean(lambda loss, z, prototypes: loss(z, prototypes)),
        "prototypes",
        min_clusters=2,
    ),
}

# Fields of the configuration that only some objectives use; with the others they have their defaults.
OPTIONS = tuple(dict.fromkeys(name for objective in OBJECTIVES.values() for name in objective.options))
