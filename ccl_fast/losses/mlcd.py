"""Discrimination among many clusters, of which each sample belongs to several."""

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_integer, check_matrix, check_same, check_share
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.contrast import ContrastiveLoss, check_id_range, number_of
from ccl_fast.ops import edge_similarity, logaddexp, logsumexp_excluding, streaming_topk
from ccl_fast.ops.normalize import normalize_embeddings


class MLCDLoss(ContrastiveLoss):
    r"""Each row towards all centres on its list of labels, away from a sample of the others.

    .. math::
        \ell_i = \log \Big( 1 + \sum_{j \in P_i} e^{-s_{ij}} \Big)
            + \log \Big( 1 + \sum_{j \in S \setminus P_i} e^{s_{ij}} \Big), \qquad s_{ij} = \langle z_i, c_j \rangle / T

    with z unit embeddings, c unit centres, a learned matrix of up to millions of rows, :math:`P_i` the labels of row i
    and S the centres that take part: the labels of the whole batch, and of the others as many, drawn at random, as
    make up a share r of all centres. What is not in S gets no gradient in this step. Memory is linear in the rows and
    in the centres; a second derivative raises.

    An et al., "Multi-label Cluster Discrimination for Visual Representation Learning" (arXiv:2407.17331): a million
    clusters of k-means, 8 labels (`nearest_centers` finds them), r = 0.1. Its formula has no margin and no temperature;
    the default 1 / 32 is the scale in the authors' code of single-label UNICOM, on which it builds. S is drawn as
    there (Partial FC, arXiv:2203.15565), once for the batch.

    Args:
        temperature: T, > 0; the initial value if learnable.
        sample: r, 0 < r <= 1; with 1 nothing is drawn.
        learnable_temperature, normalize, reduction, backend: as in `CCLLoss`; the backend is without effect.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """

    def __init__(
        self,
        temperature: float = 1 / 32,
        sample: float = 0.1,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ):
        super().__init__(temperature, learnable_temperature, normalize, reduction, backend)
        check_share("sample", sample)
        self.sample = sample

    def extra_repr(self) -> str:
        return f"sample={self.sample:.4g}, {super().extra_repr()}"

    def forward(
        self, embeddings: Tensor, centers: Tensor, labels: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """
        Args:
            embeddings: ``[n, d]``; float64, float32, bfloat16 or float16.
            centers: ``[k, d]``, such as an nn.Parameter; they get a gradient.
            labels: ``[n, l]``, int32 or int64, from 0 to k - 1 and different within a row; -1 is none. A row of -1
                contributes 0 and does not count in the mean.
            generator: of the draw of centres, on their device; None is torch's own. With ``sample=1`` it is not used.

        Returns:
            The loss, float32 (float64 for float64 embeddings); with reduction "none" ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is out of range (on a GPU torch's assertion on the device).
        """
        self._check(embeddings, centers, labels)
        labels = labels.long()
        if self.sample < 1:
            drawn = draw_centers(labels, len(centers), self.sample, generator)
            place = labels.new_zeros(len(centers)).index_copy_(0, drawn, torch.arange(len(drawn), device=labels.device))
            centers, labels = centers[drawn], place[labels.clamp(min=0)].masked_fill(labels < 0, -1)
        scale = 1.0 / self.temperature
        z = self.unit(embeddings)
        c = self.unit(centers).to(z.dtype)

        (n, width), is_label = labels.shape, labels >= 0
        edges = torch.arange(n + 1, device=labels.device) * width
        own = edge_similarity(z, c, edges, labels.clamp(min=0).flatten()).view(n, width) * scale
        zero = own.new_zeros(n, 1)
        positives = torch.cat((zero, (-own).masked_fill(~is_label, -torch.inf)), dim=1).logsumexp(1)
        negatives = logaddexp(logsumexp_excluding(z, c, labels, scale=scale), zero[:, 0])
        return self.reduce(positives + negatives, is_label.any(1), labels.shape[:1])

    @staticmethod
    def _check(embeddings: Tensor, centers: Tensor, labels: Tensor) -> None:
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        check_matrix("centers", centers, columns=embeddings.shape[1])
        check_floating("centers", centers)
        check_same("centers", centers, "embeddings", embeddings, dtype=False)
        if len(centers) == 0:
            raise ArgumentError("centers: expected at least one row, got none")
        check_matrix("labels", labels)
        check_integer("labels", labels)
        check_same("labels", labels, "embeddings", embeddings, dtype=False)
        if len(labels) != len(embeddings) or labels.shape[1] == 0:
            raise ArgumentError(
                f"labels: expected shape [{len(embeddings)}, l] with l of at least 1, got {list(labels.shape)}"
            )
        check_id_range("labels", labels, len(centers))


def draw_centers(labels: Tensor, k: int, share: float, generator: torch.Generator | None) -> Tensor:
    """The centres of a batch, ascending: all its labels, and others at random up to ``share * k``."""
    own = labels[labels >= 0].unique()  # the host waits: it must know how many
    priority = torch.rand(k, generator=generator, device=labels.device).index_fill_(0, own, 2.0)
    count = max(len(own), number_of(share, k))
    return priority.topk(count, sorted=False).indices.sort().values


def nearest_centers(features: Tensor, centers: Tensor, labels: int = 8) -> Tensor:
    """The most similar centres of every row, by cosine: labels for `MLCDLoss`. Memory is linear in both.

    Args:
        features: ``[n, d]``; float64, float32, bfloat16 or float16.
        centers: ``[k, d]``, same dtype and device, such as those of `ccl_fast.clustering.KMeans`.
        labels: how many of each row.

    Returns:
        ``[n, labels]`` int64, the most similar first; -1 where there are fewer centres. No gradient flows.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
    """
    check_matrix("features", features)
    check_floating("features", features)
    check_matrix("centers", centers, columns=features.shape[1])
    check_same("centers", centers, "features", features)
    check_count("labels", labels)
    units = [normalize_embeddings(x.detach()).to(x.dtype) for x in (features, centers)]
    return streaming_topk(*units, topk=labels)[1]
