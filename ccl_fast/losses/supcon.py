"""Supervised contrastive learning."""

import functools
from typing import Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor

from ccl_fast.checks import check_choice, check_tensor
from ccl_fast.distributed import NO_GROUP, Group
from ccl_fast.errors import ArgumentError
from ccl_fast.losses import processes
from ccl_fast.losses.base import CommonOptions
from ccl_fast.losses.batch import Batch, check_unassigned, ids_of_references, labels_as_ids
from ccl_fast.losses.ccl import CCLLoss, if_any, logsumexp_and_positives, logsumexp_by_id, loss_of_mean
from ccl_fast.losses.mask import check_mask, masked_similarity
from ccl_fast.losses.pairs import positive_and_negative_pairs
from ccl_fast.ops import cross_entropy, logaddexp, streaming_logsumexp
from ccl_fast.ops.ids import groups_of, same_group_count
from ccl_fast.ops.logsumexp.positives import contrast_with_positives

Form = Literal["outside", "inside"]
FORMS: tuple[Form, ...] = get_args(Form)
ContrastMode = Literal["all", "one"]
CONTRAST_MODES: tuple[ContrastMode, ...] = get_args(ContrastMode)


class _Rows(NamedTuple):
    """What anchors are compared with: each other, or further rows."""

    ids: Tensor
    z: Tensor | None = None


class SupConLoss(CCLLoss):
    r"""Contrast with all views of the same label as positives: CCL without centres.

    .. math::
        \text{outside:}\quad & \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{e^{s_{ip}}}{\sum_{j \in A(i)} e^{s_{ij}}} \\
        \text{inside:}\quad & \ell_i = -\log \frac{\sum_{p \in P(i)} e^{s_{ip}}}{\sum_{j \in A(i)} e^{s_{ij}}}

    with :math:`s_{ij} = \langle z_i, z_j \rangle / T`, A(i) all other views and P(i) those of the same label. The
    mean is over the anchors that have a positive. (The paper's "inside" adds the constant log |P(i)|, which has no
    gradient.) Khosla et al., "Supervised Contrastive Learning" (arXiv:2004.11362).

    Positives may also come by a mask, as in the authors' code, whose entries are weights:
    :math:`\ell_i = \log \sum_{j \in A(i)} e^{s_{ij}} - \sum_j m_{ij} s_{ij} / \sum_j m_{ij}`. And as in
    pytorch-metric-learning A(i) may be references, such as a memory of earlier batches, or what a miner lists, so that
    its trainers and wrappers take this loss as their own.

    Args:
        temperature: T, > 0; the initial value if learnable.
        form: "outside" (the paper's L_out) or "inside" (L_in) of the logarithm.
        contrast_mode: which views are anchors: "all", or "one", the first of each sample.
        unassigned: the label of rows that have none, -1: their only positives are their own views, and they are
            negatives of all others. With None every label is a class, also those below 0, as in
            pytorch-metric-learning and SupContrast.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`. Several processes
            take embeddings and labels alone.

    Cost:
        operators: LSE; `same_id_similarity`, or the mask times the rows; over M references a rectangular LSE; of E
            listed pairs `edge_similarity`.
        units: 2 of N x N x D; with references 4 of N x M x D; of pairs 3 E x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast import SupConLoss
        >>> loss_fn, labels = SupConLoss(temperature=0.1), torch.arange(8) % 3
        >>> loss_fn(torch.randn(8, 2, 16), labels).shape
        torch.Size([])
        >>> memory, labels_of_memory = torch.randn(32, 16), torch.arange(32) % 3
        >>> loss_fn(torch.randn(8, 16), labels, ref_emb=memory, ref_labels=labels_of_memory).shape
        torch.Size([])
    """

    _ids_name = "labels"

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: Form = "outside",
        contrast_mode: ContrastMode = "all",
        unassigned: int | None = -1,
        **common: Unpack[CommonOptions],
    ):
        check_choice("form", form, FORMS)
        super().__init__(temperature, form="joint" if form == "outside" else form, **common)
        check_choice("contrast_mode", contrast_mode, CONTRAST_MODES)
        check_unassigned(unassigned)
        self.form, self.contrast_mode, self.unassigned = form, contrast_mode, unassigned

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` (one row per view) or ``[n, views, d]`` (further dimensions are flattened);
                ``[n, d]`` with references or a miner's tuple.
            labels: ``[n]`` or ``[n, 1]``, of any integer dtype, bool, or whole numbers of a floating one; -1 for
                unlabelled (see ``unassigned``). None (with [n, views, d]) is NT-Xent.
            indices_tuple: a miner's (anchors, positives, anchors, negatives), or triplets (anchors, positives,
                negatives), int64 vectors: A(i) are the rows (or references) that are listed with anchor i, each once,
                and P(i) the positives among them, whatever the labels. Memory is linear in the tuple.
            ref_emb: ``[m, d]``, references, which get a gradient too: A(i) are these, and the rows are anchors alone.
            ref_labels: ``[m]``, as ``labels``; required with references, unless there is a tuple.
            mask: ``[n, n]``, dense or CSR, bool, integers or floating point, in the place of labels: row i has the
                weights, >= 0, of the samples whose views are i's positives (its own weight is that of its other views).
                It need not be symmetric, and gets no gradient. With CSR memory is linear in n and in its entries. For
                the form "outside".

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per anchor.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is below -1 while ``unassigned`` is -1 (on a GPU: an assertion on the device), or an
                index of the tuple is none of a row.
        """
        if isinstance(embeddings, Tensor) and embeddings.ndim > 3:
            embeddings = embeddings.flatten(2)
        given = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels, "mask": mask}
        given = {name: value for name, value in given.items() if value is not None}
        if self.process_group is not None and given:
            processes.refuse(self, next(iter(given)))
        if mask is not None:
            if labels is not None or len(given) > 1:
                others = ["labels"] if labels is not None else [name for name in given if name != "mask"]
                raise ArgumentError(f"mask: expected None with {others[0]}, got both")
            return self._of_mask(embeddings, mask)
        if indices_tuple is not None:
            return self._of_pairs(embeddings, indices_tuple, ref_emb)
        if given:
            return self._of_references(embeddings, labels, ref_emb, ref_labels)
        if labels is not None:
            labels = labels_as_ids(labels, embeddings, self.unassigned, self.process_group is None)
        if self.contrast_mode == "one":
            return self._of_first_views(embeddings, labels)
        return super().forward(embeddings, labels)

    def _of_first_views(self, embeddings: Tensor, labels: Tensor | None) -> Tensor:
        batch = self.prepare(embeddings, labels, self._ids_name)
        if not batch.exchange.group.is_null:
            return self._of_first_views_of_all(batch)
        if embeddings.ndim == 2:  # all rows are first views
            return self._of_ids(batch.z, batch.ids, _Rows(batch.ids))
        z, ids = batch.z.view(embeddings.shape), batch.ids.view(batch.shape)
        further = _Rows(ids[:, 1:].flatten(), z[:, 1:].flatten(0, 1))
        return self._of_ids(z[:, 0], ids[:, 0], _Rows(ids[:, 0]), further)

    def _of_first_views_of_all(self, batch: Batch) -> Tensor:
        """Of several processes: what every row would have, of which the first views' is taken."""
        group, views = batch.exchange.group, batch.shape[1] if len(batch.shape) == 2 else 1
        scale = 1.0 / self.shared(self.temperature, group)
        if self.form == "inside":
            other, same, _ = (x[::views] for x in logsumexp_by_id(batch, scale, self.backend))
            return self._reduced_inside(other, same, same != -torch.inf, group)
        rest, positives, count, single = (x[::views] for x in logsumexp_and_positives(batch, scale, self.backend))
        return self._reduced_outside(rest, positives, count, single, group)

    def _of_references(self, embeddings: Tensor, labels, ref_emb: Tensor | None, ref_labels) -> Tensor:
        if ref_emb is None:
            raise ArgumentError("ref_emb: expected rows [m, d] with ref_labels, got None")
        ids, ref_ids = ids_of_references(embeddings, labels, ref_emb, ref_labels, self.unassigned)
        return self._of_ids(self.unit(embeddings), ids, _Rows(ref_ids, self.unit(ref_emb)))

    def _of_pairs(self, embeddings: Tensor, indices_tuple: tuple[Tensor, ...], ref_emb: Tensor | None) -> Tensor:
        positive, negative = positive_and_negative_pairs(indices_tuple, embeddings, ref_emb, distinct=True)
        q = self.unit(embeddings)
        k = q if ref_emb is None else self.unit(ref_emb)
        n, scale = len(q), 1.0 / self.temperature
        logits = positive.logits(q, k, scale)
        other = negative.logsumexp(negative.logits(q, k, scale), n)
        count, same = positive.sums(torch.ones_like(logits), n), positive.logsumexp(logits, n)
        if self.form == "inside":
            return self._reduced_inside(other, same, count > 0)
        single = count == 1
        rest = torch.where(single, other, logaddexp(same, other))
        return self._reduced_outside(rest, positive.sums(logits, n), count, single)

    def _of_mask(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        if self.form != "outside":
            raise ArgumentError(f"mask: expected None with form={self.form!r}, got a mask")
        check_tensor("embeddings", embeddings)
        each = torch.arange(len(embeddings), device=embeddings.device) if embeddings.ndim else None
        batch = self.prepare(embeddings, each, "mask")
        check_mask(mask, embeddings)
        z = batch.z.view(embeddings.shape if embeddings.ndim == 3 else (len(embeddings), 1, embeddings.shape[1]))
        scale = 1.0 / self.temperature
        anchors = z if self.contrast_mode == "all" else z[:, :1]
        rest = streaming_logsumexp(anchors.flatten(0, 1), scale=scale, backend=self.backend)
        if self.contrast_mode == "one":
            further = streaming_logsumexp(z[:, 0], z[:, 1:].flatten(0, 1), scale=scale, backend=self.backend)
            rest = logaddexp(rest, further)
        positives, weight = masked_similarity(z, anchors, mask)
        shape = batch.shape if self.contrast_mode == "all" else batch.shape[:1]
        has_positive = weight > 0
        return self.reduce(rest - positives * scale / torch.where(has_positive, weight, 1.0), has_positive, shape)

    def _of_ids(self, q: Tensor, ids: Tensor, *compared: _Rows) -> Tensor:
        """Of anchors against each other, or against further rows, or both."""
        scale = 1.0 / self.temperature
        groups = [groups_of(ids, None if rows.z is None else rows.ids) for rows in compared]
        count = torch.stack([same_group_count(*of) for of in groups]).sum(0)
        if self.form == "inside":
            among = {"scale": scale, "candidates": "other_id", "return_same": True, "backend": self.backend}
            found = [
                streaming_logsumexp(q, rows.z, q_ids=group, k_ids=k_group, **among)
                for rows, (group, k_group) in zip(compared, groups, strict=True)
            ]
            other, same = (functools.reduce(logaddexp, sums) for sums in zip(*found, strict=True))
            return self._reduced_inside(other, same, count > 0)
        single = count == 1
        options = {"scale": scale, "single": if_any(single), "backend": self.backend}
        found = [
            contrast_with_positives(q, group, rows.z, k_group, **options)
            for rows, (group, k_group) in zip(compared, groups, strict=True)
        ]
        rests, _, positives = zip(*found, strict=True)
        total = torch.stack(positives).sum(0)
        return self._reduced_outside(functools.reduce(logaddexp, rests), total, count, single)

    def _reduced_inside(self, other: Tensor, same: Tensor, has_positive: Tensor, group: Group = NO_GROUP) -> Tensor:
        other, same = (x.masked_fill(~has_positive, 0.0) for x in (other, same))
        return self.reduce(cross_entropy(other, same), has_positive, group=group)

    def _reduced_outside(
        self, rest: Tensor, positives: Tensor, count: Tensor, single: Tensor, group: Group = NO_GROUP
    ) -> Tensor:
        """A single positive is not in the rest."""
        return self.reduce(loss_of_mean(rest, positives / count.clamp(min=1), single), count > 0, group=group)
