"""Attraction weighted towards far positives, repulsion towards near negatives."""

import contextlib
from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_not_negative, check_positive
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import labels_as_ids
from ccl_fast.ops import expected_similarity, row_dot, streaming_logsumexp
from ccl_fast.ops.ids import consecutive_ids
from ccl_fast.ops.precision import accumulation_dtype, without_autocast

NEGATIVES = ("other views", "all views")


class CACRLoss(Loss):
    r"""Each row is drawn to its positives, most to the farthest, and driven from its negatives, most from the nearest.

    With z unit embeddings, P(i) the other views of the sample of row i (or, given labels, the other rows of its class)
    and N(i) the rows of other samples (or classes),

    .. math::
        \ell_i = \sum_{p \in P(i)} \pi^+_{ip} |z_i - z_p|^2 - \sum_{j \in N(i)} \pi^-_{ij} |z_i - z_j|^2, \qquad
        \pi^+_{ip} \propto e^{t_+ |z_i - z_p|^2}, \quad \pi^-_{ij} \propto e^{-t_- |z_i - z_j|^2}

    where both weights sum to 1, and gradients flow through them. At t = 0 they are uniform: the loss is alignment minus
    the mean distance. A single positive has the weight 1 whatever :math:`t_+`. Memory is linear in n.

    With an RBF cost, of which the authors' code has a second form of the repulsion, that is the same for all the rows I
    that share the candidates of their negatives (a pair of views, or all):

    .. math::
        \ell_i = \sum_{p \in P(i)} \pi^+_{ip} |z_i - z_p|^2
            + \log \frac{1}{|I|} \sum_{i' \in I} \sum_{j \in N(i')} \pi^-_{i'j} e^{-t |z_{i'} - z_j|^2}

    At :math:`t_- = 0` it is alignment and uniformity.

    Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning" (arXiv:2105.03746).
    The paper draws negatives from the data's distribution; which rows share a softmax is ``negatives_of``. The factors
    alpha and beta of the authors' code are 1 here as there.

    Args:
        temperature: it has none but :math:`t_+` and :math:`t_-`, so nothing but 1.
        t_positive: :math:`t_+`, >= 0.
        t_negative: :math:`t_-`, >= 0.
        negatives_of: without labels, "other views": a softmax of its own over the other samples' rows of each view but
            the anchor's, in the mean of these views, as in the authors' code; or "all views": one softmax over the rows
            of all views. Labels take the second one.
        rbf: t of the cost :math:`e^{-t |\cdot|^2}` of the repulsion, > 0 (the authors' is 2); None: the squared
            distance.
        normalize: scale embeddings to unit length; if not, distances are of the embeddings as they come.
        reduction: "mean", "sum", or "none" (a loss per row, ``[n]`` or ``[n, views]``). Of the other options of
            `Loss` it can honour none.

    Cost:
        operators: `expected_similarity`, `candidates="other_id"`; the positives' from products of a sample's views,
            or with labels `"same_id"`; for the RBF cost two LSEs.
        units: 4 of N x N x D, with the RBF cost 8; with labels 8 (as they come, not at unit length, 12).

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import CACRLoss
        >>> embeddings = torch.randn(8, 4, 16)  # four views of each image
        >>> CACRLoss(t_positive=1.0, t_negative=2.0, reduction="none")(embeddings).shape
        torch.Size([8, 4])
    """

    unsupported = (
        "temperature",
        "learnable_temperature",
        "backend",
        "process_group",
        "exchange",
    )

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        t_positive: float = 1.0,
        t_negative: float = 2.0,
        negatives_of: str = "other views",
        rbf: float | None = None,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        for name, t in (("t_positive", t_positive), ("t_negative", t_negative)):
            check_not_negative(name, t)
        check_choice("negatives_of", negatives_of, NEGATIVES)
        if rbf is not None:
            check_positive("rbf", rbf)
        self.t_positive, self.t_negative, self.negatives_of, self.rbf = t_positive, t_negative, negatives_of, rbf

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, views, d]``, or ``[n, d]`` with labels; float64, float32, bfloat16, float16.
            labels: ``[n]``, whole numbers of any dtype: the positives are the rows of the class, and the negatives
                those of other classes. -1 is unlabelled: a class of its own. None: each sample is a class.

        Returns:
            The loss, float32 (float64 for float64 embeddings). A row without a positive has the loss 0 and does not
            count in the mean; without a negative it is attracted alone.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is below -1 (on a GPU: an assertion on the device).
        """
        labels = None if labels is None else labels_as_ids(labels, embeddings)
        batch = self.prepare(embeddings, labels, "labels")
        z = batch.z
        if not self.normalize:
            # Distances are of the rows about their mean too, whose norms are smaller: less is lost by cancellation.
            z = z.to(accumulation_dtype(z))
            z = z - z.detach().mean(0)
        if labels is None:
            if embeddings.shape[1] < 2:
                raise ArgumentError(
                    f"embeddings: expected at least two views without labels, got {embeddings.shape[1]}"
                )
            attraction = _distance_between_views(z.view(embeddings.shape), self.t_positive).flatten()
            has_positive = torch.ones_like(batch.ids, dtype=torch.bool)
            has_negative = torch.full_like(has_positive, embeddings.shape[0] > 1)
        else:
            group = consecutive_ids(batch.ids)
            size = torch.zeros_like(group).index_add_(0, group, torch.ones_like(group))[group]
            has_positive, has_negative = size > 1, size < z.shape[0]
            attraction = self._distance(z, batch.ids, self.t_positive, "same_id", has_positive)
        if labels is None and self.negatives_of == "other views":
            repulsion = self._distance_to_other_views(z.view(embeddings.shape)).masked_fill(~has_negative, 0.0)
        elif self.rbf is not None:
            repulsion = self._log_of_costs(z, z, batch.ids, has_negative).masked_fill(~has_negative, 0.0)
        else:
            repulsion = self._distance(z, batch.ids, -self.t_negative, "other_id", has_negative)
        return self.reduce(attraction - repulsion, has_positive, batch.shape)

    def _distance_to_other_views(self, z: Tensor) -> Tensor:
        """Of every row, in the mean over the other views, the mean squared distance to their other samples [n views].

        Weights are e^(-t |.|^2) among the rows of one other view. With an RBF cost minus its logarithm.
        """
        samples, found = torch.arange(z.shape[0], device=z.device), []
        has_negative = torch.full_like(samples, z.shape[0] > 1, dtype=torch.bool)
        views = z.unbind(1)
        for v, anchors in enumerate(views):
            others = [keys for w, keys in enumerate(views) if w != v]
            if self.rbf is not None:
                of_views = [self._log_of_costs(anchors, keys, samples, has_negative) for keys in others]
            else:
                of_views = [self._mean_distance(anchors, keys, samples) for keys in others]
            found.append(sum(of_views) / len(others))
        return torch.stack(found, dim=1).flatten()

    def _log_of_costs(self, q: Tensor, k: Tensor, ids: Tensor, has_negative: Tensor) -> Tensor:
        """Minus the logarithm of the rows' mean cost, the same for all of them [n].

        A row's mean is the ratio of two sums: of e^(-(t_negative + t) |.|^2) and of the weights before they sum to 1.
        """
        assert self.rbf is not None
        norm = 2.0
        if not self.normalize:
            q, k, norm = _with_norms(q, k)
        among = {"q_ids": ids, "k_ids": ids, "candidates": "other_id"}
        with without_autocast(q.device) if not self.normalize else contextlib.nullcontext():
            costs = streaming_logsumexp(q, k, scale=2.0 * (self.t_negative + self.rbf), **among)
            weights = streaming_logsumexp(q, k, scale=2.0 * self.t_negative, **among)
        costs = (costs - weights - self.rbf * norm).masked_fill(~has_negative, -torch.inf)
        number = has_negative.sum().to(costs.dtype)
        return (number.log() - costs.masked_fill(number == 0, 0.0).logsumexp(0)).expand(len(q))

    def _mean_distance(self, q: Tensor, k: Tensor, samples: Tensor) -> Tensor:
        options = {"scale": 2.0 * self.t_negative, "q_ids": samples, "k_ids": samples, "candidates": "other_id"}
        if self.normalize:
            return 2.0 - 2.0 * expected_similarity(q, k, **options)
        q, k, norm = _with_norms(q, k)
        with without_autocast(q.device):
            return norm - 2.0 * expected_similarity(q, k, **options)

    def _distance(self, z: Tensor, ids: Tensor, t: float, candidates: str, has_candidate: Tensor) -> Tensor:
        """Of every row the mean squared distance to its candidates, weighted by e^(t |.|^2); 0 if there are none."""
        # Of what is the same for all candidates of a row the softmax is free, and |z - z'|^2 = 2 - 2 <z, z'>.
        options = {"scale": -2.0 * t, "q_ids": ids, "candidates": candidates}
        if self.normalize:
            mean = 2.0 - 2.0 * expected_similarity(z, **options)
            return mean.masked_fill(~has_candidate, 0.0)
        q, k, norm = _with_norms(z, z)
        with without_autocast(z.device):
            mean = norm - 2.0 * expected_similarity(q, k, k_ids=ids, **options)
            if candidates == "same_id":
                # Here a row is a candidate of itself: at distance 0, so nothing but its weight, e^0, is to be taken
                # away, which is the least of all.
                logsumexp = t * norm + streaming_logsumexp(q, k, k_ids=ids, **options)
                mean = mean / -torch.expm1(-logsumexp.masked_fill(~has_candidate, 1.0))
        return mean.masked_fill(~has_candidate, 0.0)


def _with_norms(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and |q|^2, such that |q - k|^2 = |q|^2 - 2 <(q, 1), (k, -|k|^2 / 2)>."""
    norm = row_dot(q, q)
    rows = torch.cat((q, torch.ones_like(norm)[:, None]), dim=1)
    return rows, torch.cat((k, row_dot(k, k)[:, None] / -2.0), dim=1), norm


def _distance_between_views(z: Tensor, t: float) -> Tensor:
    """Of every view [n, views, d] the mean squared distance to the sample's others, weighted by e^(t |.|^2)."""
    z = z.to(accumulation_dtype(z))
    with without_autocast(z.device):
        products = z @ z.mT
    norm = products.diagonal(dim1=1, dim2=2)
    distance = norm[:, :, None] + norm[:, None, :] - 2.0 * products
    itself = torch.eye(z.shape[1], dtype=torch.bool, device=z.device)
    weights = (t * distance).masked_fill(itself, -torch.inf).softmax(2)
    return (weights * distance).sum(2)
