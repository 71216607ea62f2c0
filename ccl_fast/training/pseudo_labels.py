"""What clustering hands to contrast: ids, centres and temperatures, for one or several numbers of clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from ccl_fast.clustering import KMeans, align_clusters, concentration
from ccl_fast.distributed import NO_GROUP, Group
from ccl_fast.errors import ArgumentError
from ccl_fast.metrics import cluster_quality
from ccl_fast.ops import kmeans_assign
from ccl_fast.ops.normalize import normalize_rows as unit
from ccl_fast.training.cooperation import Clustering, Labels

# Runs of k-means from different starts, of which the best is kept; later clusterings start from the last centres.
STARTS = 5


class Found(TypedDict):
    """What is found for a number of clusters; a checkpoint keeps it."""

    centers: Tensor  # [k, d]
    temperatures: NotRequired[Tensor]  # [k]
    ids: Tensor  # [n], -1 where not believed
    all_ids: Tensor  # [n]
    believed: float  # share of the images


class PseudoLabels:
    """Spherical k-means of the embeddings of all training images, once for every number of clusters.

    Args:
        clusters: the numbers of clusters.
        seed: of k-means++.
        temperature: of the loss, which is the mean of the clusters' own ones.
        concentration: give every cluster its own temperature: small for tight ones.
        labels_from: "k-means", or, to see what clusters would be worth, the images' "classes" or "random" numbers.
        believe: share of the images whose cluster is believed, those nearest to their centre; the others count as
            unassigned. "agreement": as large a share as `agreement` is, measured after every clustering.
        device: where ids and centres are kept.
        group: each process clusters with the others, and has the ids of all images.
    """

    def __init__(
        self,
        clusters: Sequence[int],
        *,
        seed: int,
        temperature: float,
        concentration: bool,
        device: torch.device,
        labels_from: Labels = "k-means",
        believe: float | Literal["agreement"] = 1.0,
        group: Group = NO_GROUP,
    ):
        self.clusters, self.seed, self.temperature = list(clusters), seed, temperature
        self.concentration, self.device, self.group = concentration, device, group
        self.labels_from: Labels = labels_from
        self.believe: float | Literal["agreement"] = believe
        self.found: list[Found] = []  # for each number of clusters

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
        log, previous, self.found = {}, self.found, []
        views = cache(views) if views else None
        for i, k in enumerate(self.clusters):
            before = previous[i] if previous else None
            own, centers = self._labels(embeddings, classes, k, before)
            ids = self.group.gather(own)
            log_of_k = _describe(ids, len(centers), before["all_ids"] if before else None, classes)
            temperatures = None
            if self.concentration:
                temperatures = concentration(
                    embeddings, own, centers, mean=self.temperature, process_group=self.group.process_group
                )
            nearest = self._believed(embeddings, own, ids, centers, views)
            found: Found = {
                "centers": centers,
                "ids": torch.full_like(ids, -1).scatter(0, nearest, ids[nearest]),
                "all_ids": ids,
                "believed": len(nearest) / len(ids),
            }
            if temperatures is not None:
                found["temperatures"] = temperatures
            if self.believe != 1:
                log_of_k |= _describe_believed(ids, nearest, classes)
            self.found.append(found)
            one = len(self.clusters) == 1
            log |= log_of_k if one else {f"{name}/{len(centers)}": value for name, value in log_of_k.items()}
        return log

    def _labels(
        self, embeddings: Tensor, classes: Tensor | None, k: int, before: Found | None
    ) -> tuple[Tensor, Tensor]:
        """Return the clusters of this process's images, and all centres."""
        if self.labels_from != "k-means":
            return self._given(embeddings, classes, k)
        start, starts = (before["centers"], 1) if before else ("k-means++", STARTS)
        kmeans = KMeans(
            k,
            metric="cosine",
            init=start,
            n_init=starts,
            random_state=self.seed,
            process_group=self.group.process_group,
        )
        return kmeans.fit_predict(embeddings), kmeans.cluster_centers_

    def _believed(
        self, embeddings: Tensor, own: Tensor, ids: Tensor, centers: Tensor, views: Callable | None
    ) -> Tensor:
        """Return the images whose clusters are believed, those nearest to their centres."""
        share = self.believe
        if share == "agreement":
            assert views is not None
            rows, of_rows = views()
            measure = partial(agreement, ids[rows.to(ids.device)], of_rows, centers)
            share = self.group.patient.first(measure)
        distance = self.group.gather(1 - (unit(embeddings) * centers[own]).sum(1))
        return distance.argsort(stable=True)[: round(share * len(ids))]

    def _given(self, embeddings: Tensor, classes: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Return labels that are not those of k-means, and the unit means of their images."""
        if self.labels_from == "classes" and classes is None:
            raise ArgumentError("labels_from: expected images with classes for 'classes', got some without")
        n = sum(self.group.gather_int(len(embeddings)))
        if classes is not None and self.labels_from == "classes":
            ids = classes.unique(return_inverse=True)[1].to(embeddings.device)
        else:
            ids = torch.randint(k, (n,), generator=torch.Generator().manual_seed(self.seed), device="cpu").to(
                embeddings.device
            )
        k, own = int(ids.max()) + 1, ids[self.group.part(n)]
        sums = embeddings.new_zeros(k, embeddings.shape[1]).index_add_(0, own, unit(embeddings))
        first, *others = self.group.gather_objects(sums)
        return own, unit(sum(others, first))

    def of(self, rows: Tensor) -> list[Clustering]:
        """Return the clusterings of the training images of these numbers ``[b]``; none before the first `update`."""
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

    def state_dict(self) -> list[Found]:
        return self.found

    def load_state_dict(self, state: list[Found]) -> None:
        self.found = [self._here(found) for found in state]

    def _here(self, found: Any) -> Any:
        return {name: x.to(self.device) if isinstance(x, Tensor) else x for name, x in found.items()}


def _describe(ids: Tensor, k: int, previous: Tensor | None, classes: Tensor | None) -> dict[str, float]:
    sizes = ids.bincount(minlength=k)
    log = {"smallest_cluster": sizes.min().item(), "largest_cluster": sizes.max().item()}
    if previous is not None:
        renamed = align_clusters(ids, previous, k)[ids]
        log["changed_labels"] = (renamed != previous).double().mean().item()
    return log if classes is None else log | cluster_quality(ids, classes)


def _describe_believed(ids: Tensor, nearest: Tensor, classes: Tensor | None) -> dict[str, float]:
    log = {"believed": len(nearest) / len(ids)}
    if classes is not None and len(nearest):
        log["believed_same_class"] = cluster_quality(ids[nearest], classes.to(ids.device)[nearest])["same_class"]
    return log


def agreement(ids: Tensor, views: Sequence[Tensor], centers: Tensor) -> float:
    r"""Measure the share of images all of whose views lie nearest to the image's own cluster's centre, beyond chance.

    With y the images' clusters, v the one that all of an image's views fall into (none if they do not agree), and
    P(v = k), P(y = k) shares of the images,

    .. math::
        \kappa = \max\Big(0, \frac{P(v = y) - c}{1 - c}\Big), \qquad c = \sum_k P(v = k) P(y = k).

    Views fall into the same cell of any partition of the features; of ids that have nothing to do with these
    :math:`\kappa` is about 0, however few clusters there are.

    Args:
        ids: clusters of images ``[n]``.
        views: embeddings ``[n, d]`` of views of the same images.
        centers: ``[k, d]``.
    """
    first, *others = (kmeans_assign(view, centers, metric="cosine")[0].to(ids.device) for view in views)
    is_same = torch.stack([other == first for other in others or [first]]).all(0)
    shares = [of.bincount(minlength=len(centers)).double() / len(ids) for of in (first[is_same], ids)]
    by_chance = (shares[0] * shares[1]).sum().item()
    observed = (is_same & (first == ids)).double().mean().item()
    return max(0.0, (observed - by_chance) / (1 - by_chance)) if by_chance < 1 else 1.0
