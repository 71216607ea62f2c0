"""Discrimination among many clusters, of which each sample belongs to several."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import (
    check_choice,
    check_count,
    check_floating,
    check_matrix,
    check_not_negative,
    check_same,
    check_share,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import ceil_of_share, check_id_range, check_integers, check_some
from ccl_fast.ops import edge_similarity, logaddexp, logsumexp_excluding, streaming_topk
from ccl_fast.ops.normalize import normalize_embeddings

MARGIN_FORMS = ("arcface", "cosface")


class MLCDLoss(Loss):
    r"""Draws each row to all prototypes on its list of clusters, away from a sample of the others.

    .. math::
        \ell_i = \log \Big( 1 + \sum_{j \in P_i} e^{-s_{ij}} \Big)
            + \log \Big( 1 + \sum_{j \in S \setminus P_i} e^{s_{ij}} \Big), \qquad s_{ij} = \langle z_i, c_j \rangle / T

    with z unit embeddings, c unit prototypes, a learned matrix of up to millions of rows, :math:`P_i` the clusters of
    row i and S the prototypes that take part: those of all clusters in the batch, and of the others as many, drawn at
    random, as make up a share r of all. What is not in S gets no gradient in this step. Memory is linear in the rows
    and in the prototypes; a second derivative raises.

    An et al., "Multi-label Cluster Discrimination for Visual Representation Learning" (arXiv:2407.17331): a million
    clusters of k-means, 8 of them for each row (`nearest_centers` finds them), r = 0.1. Its formula has no margin and
    no temperature; with a margin m the positives' similarity is, as in the authors' code, :math:`\cos(\theta + m)`
    (ArcFace) or :math:`\cos \theta - m` (CosFace), whose gradient is that without it. The default 1 / 32 is the scale
    in the authors' code of single-label UNICOM, on which it builds. S is drawn as there (Partial FC,
    arXiv:2203.15565), once for the batch.

    Args:
        temperature: T, > 0; the initial value if learnable.
        sample: r, 0 < r <= 1; with 1 nothing is drawn.
        margin: m, >= 0, which the positives are to be more similar by; an angle in radians, or a cosine.
        margin_form: "arcface" or "cosface".
        learnable_temperature, normalize, reduction: as in `Loss`. (It has one backend, and runs on one process.)

    Cost:
        operators: `edge_similarity` of the row's clusters, `logsumexp_excluding` them.
        units: 4 of N x r K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import MLCDLoss, nearest_centers
        >>> embeddings, centers = torch.randn(8, 16), torch.randn(20, 16)
        >>> cluster_ids = nearest_centers(embeddings, centers, num_centers=2)
        >>> prototypes = torch.nn.Parameter(centers)
        >>> MLCDLoss(sample=0.5)(embeddings, cluster_ids, prototypes).backward()
    """

    unsupported = ("backend", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 1 / 32,
        *,
        sample: float = 0.1,
        margin: float = 0.0,
        margin_form: str = "arcface",
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_share("sample", sample)
        check_not_negative("margin", margin)
        check_choice("margin_form", margin_form, MARGIN_FORMS)
        if margin and not self.normalize:
            raise ArgumentError(f"margin: expected 0 with normalize=False (there are no angles), got {margin}")
        self.sample, self.margin, self.margin_form = sample, margin, margin_form

    def forward(
        self,
        embeddings: Tensor,
        cluster_ids: Tensor,
        prototypes: Tensor,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]``; float64, float32, bfloat16 or float16.
            cluster_ids: ``[n, l]``, integers from 0 to k - 1, different within a row; -1 is none. A row of -1
                contributes 0 and does not count in the mean.
            prototypes: ``[k, d]``, such as an nn.Parameter; they get a gradient.
            generator: of the draw of prototypes, on their device; None is torch's own. With ``sample=1`` it is not
                used.

        Returns:
            The loss, float32 (float64 for float64 embeddings); with reduction "none" ``[n]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is out of range (on a GPU torch's assertion on the device).
        """
        self._check(embeddings, cluster_ids, prototypes)
        ids = cluster_ids.long()
        if self.sample < 1:
            drawn = draw_prototypes(ids, prototypes.shape[0], self.sample, generator)
            number = torch.arange(drawn.shape[0], device=ids.device)
            place = ids.new_zeros(prototypes.shape[0]).index_copy_(0, drawn, number)
            prototypes, ids = prototypes[drawn], place[ids.clamp(min=0)].masked_fill(ids < 0, -1)
        scale = 1.0 / self.temperature
        z = self.unit(embeddings)
        c = self.unit(prototypes).to(z.dtype)

        (n, width), is_cluster = ids.shape, ids >= 0
        edges = torch.arange(n + 1, device=ids.device) * width
        own = edge_similarity(z, c, edges, ids.clamp(min=0).flatten()).view(n, width)
        own = (own + (self._with_margin(own.detach()) - own.detach())) * scale
        zero = own.new_zeros(n, 1)
        positives = torch.cat((zero, (-own).masked_fill(~is_cluster, -torch.inf)), dim=1).logsumexp(1)
        negatives = logaddexp(logsumexp_excluding(z, c, ids, scale=scale), zero[:, 0])
        return self.reduce(positives + negatives, is_cluster.any(1))

    def _with_margin(self, cosines: Tensor) -> Tensor:
        if not self.margin:
            return cosines
        if self.margin_form == "cosface":
            return cosines - self.margin
        return (cosines.clamp(-1, 1).acos() + self.margin).cos()

    @staticmethod
    def _check(embeddings: Tensor, cluster_ids: Tensor, prototypes: Tensor) -> None:
        check_matrix("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        check_matrix("prototypes", prototypes, columns=embeddings.shape[1])
        check_floating("prototypes", prototypes)
        check_same("prototypes", prototypes, "embeddings", embeddings, dtype=False)
        check_some("prototypes", prototypes)
        check_matrix("cluster_ids", cluster_ids)
        check_integers("cluster_ids", cluster_ids, embeddings)
        if cluster_ids.shape[0] != embeddings.shape[0] or cluster_ids.shape[1] == 0:
            expected = f"shape [{embeddings.shape[0]}, l] with l of at least 1"
            raise ArgumentError(f"cluster_ids: expected {expected}, got {list(cluster_ids.shape)}")
        check_id_range("cluster_ids", cluster_ids, prototypes.shape[0], "prototypes")


def draw_prototypes(ids: Tensor, k: int, share: float, generator: torch.Generator | None) -> Tensor:
    """The prototypes of a batch, ascending: those of all its clusters, and others at random up to ``share * k``."""
    own = ids[ids >= 0].unique()  # the host waits: it must know how many
    priority = torch.rand(k, generator=generator, device=ids.device, dtype=torch.float32).index_fill_(0, own, 2.0)
    count = max(own.shape[0], ceil_of_share(share, k))
    return priority.topk(count, sorted=False).indices.sort().values


def nearest_centers(embeddings: Tensor, centers: Tensor, *, num_centers: int = 8) -> Tensor:
    """Find the most similar centres of every row, by cosine: cluster ids for `MLCDLoss`. Memory is linear in both.

    Args:
        embeddings: ``[n, d]``; float64, float32, bfloat16 or float16.
        centers: ``[k, d]``, same dtype and device, such as those of `ccl_fast.clustering.KMeans`.
        num_centers: how many of each row.

    Returns:
        ``[n, num_centers]`` int64, the most similar first; -1 where there are fewer centres. No gradient flows.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import nearest_centers
        >>> nearest_centers(torch.eye(3), torch.eye(3)[[2, 1, 0]], num_centers=1).flatten()
        tensor([2, 1, 0])
    """
    check_matrix("embeddings", embeddings)
    check_floating("embeddings", embeddings)
    check_matrix("centers", centers, columns=embeddings.shape[1])
    check_same("centers", centers, "embeddings", embeddings)
    check_count("num_centers", num_centers)
    units = [normalize_embeddings(x.detach()).to(x.dtype) for x in (embeddings, centers)]
    return streaming_topk(*units, topk=num_centers)[1]
