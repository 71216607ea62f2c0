"""What clustering hands to contrast: ids, centres and temperatures, for one or several numbers of clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ccl_fast.clustering import KMeans, align_clusters, concentration
from ccl_fast.evaluation import cluster_quality
from ccl_fast.ops import kmeans_assign
from ccl_fast.ops.unit import unit
from ccl_fast.training.cooperation import Clustering
from ccl_fast.training.processes import ALONE, Processes

# Runs of k-means from different starts, of which the best is kept; later clusterings start from the last centres.
STARTS = 5


class PseudoLabels:
    """Spherical k-means of the embeddings of all training images, once for every number of clusters.

    Args:
        clusters: the numbers of clusters.
        seed: of k-means++.
        temperature: of the loss, which is the mean of the clusters' own ones.
        concentration: give every cluster its own temperature: small for tight ones.
        believe: share of the images whose cluster is believed, those nearest to their centre; the others count as
            unassigned. "agreement": as large a share as `agreement` is, measured after every clustering.
        device: where ids and centres are kept.
        processes: each clusters with the others, and has the ids of all images.
    """

    def __init__(
        self,
        clusters: Sequence[int],
        *,
        seed: int,
        temperature: float,
        concentration: bool,
        device: torch.device,
        believe: float | Literal["agreement"] = 1.0,
        processes: Processes = ALONE,
    ):
        self.clusters, self.seed, self.temperature = list(clusters), seed, temperature
        self.concentration, self.device, self.processes = concentration, device, processes
        self.believe = believe
        # Per number of clusters: {"ids": [n], -1 where not believed; "all_ids": [n]; "believed": their share;
        # "centers": [k, d]; "temperatures": [k] or absent}.
        self.found: list[dict[str, Tensor | float]] = []

    def update(
        self,
        embeddings: Tensor,
        classes: Tensor | None,
        views: Callable[[], tuple[Tensor, Sequence[Tensor]]] | None = None,
    ) -> dict[str, float]:
        """Cluster anew, from the last centres if there are any; returns what is worth a line in the log.

        Args:
            embeddings: ``[n, d]``, finite; of several processes each gives those of its part of the images.
            classes: ``[n]``, of all images, if they are known: for the log and for nothing else.
            views: the numbers of some images, and embeddings of views of them, to measure agreement by.
        """
        log, group = {}, self.processes.group
        previous, self.found, seen = self.found, [], None
        for i, k in enumerate(self.clusters):
            start = previous[i]["centers"] if previous else "k-means++"
            starts = 1 if previous else STARTS
            kmeans = KMeans(k, metric="cosine", init=start, n_init=starts, seed=self.seed, process_group=group)
            own, centers = kmeans.fit_predict(embeddings), kmeans.cluster_centers_
            ids = self.processes.gather(own)
            log_of_k = _describe(ids, k, previous[i].get("all_ids") if previous else None, classes)
            found = {"centers": centers}
            if self.concentration:
                found["temperatures"] = concentration(
                    embeddings, own, centers, mean=self.temperature, process_group=group
                )
            believed = self.believe
            if believed == "agreement":
                seen = seen or views()
                rows, of_rows = seen
                found_ids = ids[rows.to(ids.device)]
                believed = self.processes.first(partial(agreement, found_ids, of_rows, centers), patient=True)
            distance = self.processes.gather(1 - (unit(embeddings) * centers[own]).sum(1))
            nearest = distance.argsort(stable=True)[: round(believed * len(ids))]
            found |= {"ids": torch.full_like(ids, -1).scatter(0, nearest, ids[nearest]), "all_ids": ids}
            found["believed"] = len(nearest) / len(ids)
            if self.believe != 1:
                log_of_k["believed"] = found["believed"]
                if classes is not None and len(nearest):
                    quality = cluster_quality(ids[nearest], classes.to(ids.device)[nearest])
                    log_of_k["believed_same_class"] = quality["same_class"]
            self.found.append(found)
            log |= log_of_k if len(self.clusters) == 1 else {f"{name}/{k}": value for name, value in log_of_k.items()}
        return log

    def of(self, rows: Tensor) -> list[Clustering]:
        """The clusterings of the training images of these numbers ``[b]``; none before the first `update`."""
        return [
            Clustering(
                found["ids"][rows],
                found["centers"],
                found.get("temperatures"),
                found["all_ids"][rows],
                found["believed"],
            )
            for found in self.found
        ]

    def state_dict(self) -> list[dict[str, Tensor | float]]:
        return self.found

    def load_state_dict(self, state: list[dict[str, Tensor | float]]) -> None:
        self.found = [
            {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in found.items()} for found in state
        ]


def _describe(ids: Tensor, k: int, previous: Tensor | None, classes: Tensor | None) -> dict[str, float]:
    sizes = ids.bincount(minlength=k)
    log = {"smallest_cluster": sizes.min().item(), "largest_cluster": sizes.max().item()}
    if previous is not None:
        renamed = align_clusters(ids, previous, k)[ids]
        log["changed_labels"] = (renamed != previous).double().mean().item()
    return log if classes is None else log | cluster_quality(ids, classes)


def agreement(ids: Tensor, views: Sequence[Tensor], centers: Tensor) -> float:
    """Share of images all of whose views lie nearest to the centre of the image's own cluster, beyond chance.

    Chance is that cluster and views fall together independently; the share is that of Cohen's kappa, at least 0. Of
    clusters that mean nothing to the features it is about 0, however few they are.

    Args:
        ids: clusters of images ``[n]``.
        views: embeddings ``[n, d]`` of views of the same images.
        centers: ``[k, d]``.
    """
    all_ids = [ids, *(kmeans_assign(view, centers, metric="cosine")[0].to(ids.device) for view in views)]
    shares = torch.stack([each.bincount(minlength=len(centers)) for each in all_ids]).double() / len(ids)
    by_chance = shares.prod(0).sum().item()
    agreeing = torch.stack([each == ids for each in all_ids]).all(0).double().mean().item()
    return max(0.0, (agreeing - by_chance) / (1 - by_chance)) if by_chance < 1 else 1.0
