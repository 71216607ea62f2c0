"""How clusters and instances share a step of CCL."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor, nn

from ccl_fast.losses import CCLLoss, CenterNegativesLoss, MEOWLoss

# Where clusters come from, and what instances are held against.
Labels = Literal["k-means", "classes", "random"]
Negatives = Literal["centers", "other-clusters", "all"]


class Clustering(NamedTuple):
    """What k-means found, as far as it concerns the images of a batch."""

    ids: Tensor  # [b]: their clusters, -1 where these are not believed
    centers: Tensor  # [k, d]: of all clusters
    temperatures: Tensor | None  # [k]: the clusters' own ones, if they have such
    all_ids: Tensor  # [b]: their clusters, believed or not
    believed: float  # share of all images whose clusters are


class CooperativeCCL(nn.Module):
    r"""Contrast images with their own views by a share :math:`\omega`, by the rest clusters that are believed.

    .. math::
        \ell_i = (1 - \omega)\, \mathrm{CCL}_i(\text{believed ids}, \text{centres}) + \omega \Big[
            \log \Big( \sum_{j \in A(i)} e^{s_{ij}} + \sum_{c \ne y_i} e^{s_{ic}} \Big) - s_{ii'} \Big]

    i' is the other view of i, y the cluster, believed or not. The bracket is `CenterNegativesLoss`: NT-Xent with the
    centres of the other clusters as further negatives, which are no false ones even if the clusters mean nothing. With
    ``instance_negatives="other-clusters"`` it is `MEOWLoss` with the positive in the sum, with "all" NT-Xent.

    Args:
        temperature: of both terms.
        process_group: of both terms.

    Attributes:
        instance_weight: :math:`\omega`, 0 to 1, or "agreement": the share of the images that are not believed.
        instance_negatives: "centers", "other-clusters" or "all".
        center_weight: of the centre among CCL's positives.
    """

    def __init__(self, temperature: float, process_group: str | None = None):
        super().__init__()
        self.clusters = CCLLoss(temperature, process_group=process_group)
        self.with_centers = CenterNegativesLoss(temperature, process_group=process_group)
        self.of_other_clusters = MEOWLoss(temperature, weigh_positive=False, process_group=process_group)
        self.instance_weight: float | Literal["agreement"] = "agreement"
        self.instance_negatives: Negatives = "centers"

    @property
    def center_weight(self) -> float:
        return self.clusters.center_weight

    @center_weight.setter
    def center_weight(self, value: float) -> None:
        self.clusters.center_weight = value

    def forward(self, embeddings: Tensor, of: Clustering) -> Tensor:
        """Return the loss of embeddings ``[b, 2, d]``."""
        share = 1 - of.believed if self.instance_weight == "agreement" else self.instance_weight
        if self.instance_negatives == "all":
            self.clusters.instance_weight = share  # NT-Xent shares CCL's log-sum-exp
            return self._of_clusters(embeddings, of)
        terms = []
        if share > 0:
            terms.append(share * self._of_instances(embeddings, of))
        if share < 1:
            terms.append((1 - share) * self._of_clusters(embeddings, of))
        first, *others = terms
        return sum(others, first)

    def _of_instances(self, embeddings: Tensor, of: Clustering) -> Tensor:
        if self.instance_negatives == "centers":
            return self.with_centers(embeddings, of.all_ids, of.centers)
        return self.of_other_clusters(embeddings, of.all_ids)

    def _of_clusters(self, embeddings: Tensor, of: Clustering) -> Tensor:
        return self.clusters(embeddings, of.ids, of.centers, center_temperature=of.temperatures)
