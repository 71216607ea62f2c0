"""Cluster-aware contrastive learning."""

from typing import Literal, NamedTuple, Unpack, get_args

import torch
from torch import Tensor, nn

from ccl_fast.checks import check_choice, check_not_negative, check_number, host_knows
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import Batch, check_center_temperature
from ccl_fast.losses.centers import center_logits
from ccl_fast.ops import cross_entropy, logaddexp, row_dot, streaming_logsumexp
from ccl_fast.ops.backends import ContrastBackend
from ccl_fast.ops.contrast_rows import contrast_rows
from ccl_fast.ops.contrast_tile import self_contrast, views_contrast
from ccl_fast.ops.ids import groups_of, same_group_count
from ccl_fast.ops.logsumexp.distributed import Wanted, global_contrast
from ccl_fast.ops.logsumexp.operator import log_of_one_more
from ccl_fast.ops.logsumexp.positives import contrast_with_positives
from ccl_fast.ops.precision import accumulation_dtype

Form = Literal["joint", "split", "inside"]
FORMS: tuple[Form, ...] = get_args(Form)


# Losses; of the instance alone, if it has a weight; who has a positive.
_Parts = tuple[Tensor, Tensor | None, Tensor]


class _ToCenters(NamedTuple):
    """Of every row: log-sum-exp over the centres but its own, the logit of its own (0 if unassigned), its weight."""

    others: Tensor
    own: Tensor
    weight: Tensor


class CCLLoss(Loss):
    r"""Contrast with cluster-mates (local relation) and the cluster's centre (global relation) as positives.

    With z unit embeddings of all views, y their cluster ids, :math:`\mu` unit centres (without gradient),
    :math:`s_{ij} = \langle z_i, z_j \rangle / T`, :math:`s_{ic} = \langle z_i, \mu_c \rangle / T_c`, A(i) all other
    views, P(i) those with :math:`y_j = y_i`, :math:`\lambda` the centre's weight:

    .. math::
        \text{joint:}\quad & \ell_i = \log\Big(\sum_{j \in A(i)} e^{s_{ij}} + \sum_c e^{s_{ic}}\Big)
            - \frac{\sum_{p \in P(i)} s_{ip} + \lambda s_{i y_i}}{|P(i)| + \lambda} \\
        \text{split:}\quad & \ell_i = \Big[\log \sum_{j \in A(i)} e^{s_{ij}}
            - \frac{1}{|P(i)|}\sum_{p \in P(i)} s_{ip}\Big] + \lambda \Big[\log \sum_c e^{s_{ic}} - s_{i y_i}\Big] \\
        \text{inside:}\quad & \ell_i = \log\Big(\sum_{j \in A(i)} e^{s_{ij}} + \sum_c e^{s_{ic}}\Big)
            - \log\Big(\sum_{p \in P(i)} e^{s_{ip}} + \lambda e^{s_{i y_i}}\Big)

    With an instance weight :math:`\omega`, and V(i) the other views of i's own sample,

    .. math::
        \ell_i \leftarrow (1 - \omega)\, \ell_i + \omega
            \Big[\log \sum_{j \in A(i)} e^{s_{ij}} - \frac{1}{|V(i)|} \sum_{v \in V(i)} s_{iv}\Big].

    Own views are among the positives P(i) already, but with m cluster-mates in the batch they have a 2m-th of the pull;
    where clusters err, what is certain, the sample itself, should keep a share of its own. It costs O(n d): the
    log-sum-exp is the same.

    The loss is the mean over the anchors that have a positive. An anchor without one (and, in "split", a bracket
    without one) contributes 0, never NaN. Without centres it is SupCon on the cluster ids; without cluster ids,
    NT-Xent (SimCLR). Memory is linear in n; a second derivative raises.

    This is the project's reading of Chen, Gui, Fan, "Cluster-aware Contrastive Learning for Unsupervised
    Out-of-distribution Detection" (arXiv:2302.02598).

    Args:
        temperature: T, > 0; the initial value if learnable.
        center_weight: lambda, >= 0.
        form: "joint", "split" or "inside".
        instance_weight: omega, 0 to 1; above 0 the embeddings must be [n, views, d] with two or more views.
        center_temperature: T_c of the centres: a number, a tensor ``[k]`` (one per cluster, such as PCL's
            concentration), or None for T. ``forward`` takes another one, as clusters change during training.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`; "none" gives a loss
            per row, ``[n]`` or ``[n, views]``.

    Cost:
        operators: LSE; LSE over centres; the positives by `same_id_similarity`, in the form "inside" by the same
            LSE (`return_same`).
        units: 2 of N x N x D, 3 of N x K x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.
        PeerError: (a RuntimeError) another process has ended or does not answer.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import CCLLoss
        >>> loss_fn = CCLLoss(temperature=0.1, center_weight=0.5)
        >>> embeddings = torch.randn(8, 2, 16, requires_grad=True)  # two views of each image
        >>> loss_fn(embeddings, torch.arange(8) % 3, torch.randn(3, 16)).backward()
        >>> embeddings.grad.shape
        torch.Size([8, 2, 16])
    """

    _ids_name = "cluster_ids"
    center_temperature: float | Tensor | None

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        center_weight: float = 1.0,
        form: Form = "joint",
        center_temperature: float | Tensor | None = None,
        instance_weight: float = 0.0,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_choice("form", form, FORMS)
        check_not_negative("center_weight", center_weight)
        check_center_temperature(center_temperature)
        check_number("instance_weight", instance_weight, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self.form, self.center_weight, self.instance_weight = form, center_weight, instance_weight
        self._given_center_temperature = None
        if isinstance(center_temperature, Tensor) and not isinstance(center_temperature, nn.Parameter):
            self._given_center_temperature = center_temperature
            self.register_buffer("center_temperature", center_temperature, persistent=False)
        else:
            self.center_temperature = center_temperature

    def reset_parameters(self) -> None:
        """Set what the module keeps in tensors to what was given, as after `torch.nn.Module.to_empty`."""
        super().reset_parameters()
        given, own = self._given_center_temperature, self.center_temperature
        if given is not None and not given.is_meta and isinstance(own, Tensor):
            self.center_temperature = given.to(device=own.device, dtype=own.dtype, copy=True)

    def forward(
        self,
        embeddings: Tensor,
        cluster_ids: Tensor | None = None,
        centers: Tensor | None = None,
        *,
        center_temperature: float | Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` (one row per view) or ``[n, views, d]``; float64, float32, bfloat16, float16.
            cluster_ids: ``[n]``, integers. -1 is unassigned: its only positives are its own views (it has
                those in the form [n, views, d]), and it stays a negative of all others. None: every sample is
                a cluster of its own, which needs [n, views, d].
            centers: ``[k, d]`` or None. Cluster ids are then rows of it. They get no gradient.
            center_temperature: replaces the module's for this call.

        Returns:
            The loss, float32 (float64 for float64 embeddings).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a cluster id is below -1 or not less than k (on a GPU: an assertion on the device).
        """
        if center_temperature is None:
            center_temperature = self.center_temperature
        batch = self.as_given(
            embeddings, cluster_ids, self._ids_name, centers, center_temperature, lambda: self._check_views(embeddings)
        )
        if centers is not None and centers.shape[0] == 0:  # before the first clustering: all unassigned
            centers = None
        scale = 1.0 / self.shared(self.temperature, batch.exchange.group)
        is_nt_xent = cluster_ids is None and batch.shape[1:] == (2,) and not self.instance_weight  # in every form
        if is_nt_xent and self.is_tile(batch.z, len(batch.z), scale):
            return views_contrast(embeddings, scale=scale, mean=self.reduction == "mean")
        in_one_node = self._in_one_node(batch, centers, center_temperature, scale)
        if in_one_node is not None:
            return in_one_node
        batch = batch._replace(z=self.unit(batch.z))
        to_centers = None
        if centers is not None:
            others, own = center_logits(self, batch, centers, center_temperature, scale)
            # An unassigned anchor has no centre of its own, but all centres are negatives of it.
            to_centers = _ToCenters(others, own, self.center_weight * batch.assigned.to(own.dtype))
        of_form = self._inside if self.form == "inside" else self._outside
        losses, of_instance, has_positive = of_form(batch, scale, to_centers)
        if of_instance is not None:
            losses = (1 - self.instance_weight) * losses + self.instance_weight * of_instance
        return self.reduce(losses, has_positive, batch.shape, batch.exchange.group)

    def _in_one_node(
        self, batch: Batch, centers: Tensor | None, center_temperature: float | Tensor | None, scale: float | Tensor
    ) -> Tensor | None:
        """The loss by a single node of autograd, of rows as they came; None where none serves."""
        learns = isinstance(center_temperature, Tensor) and center_temperature.requires_grad
        if self.form == "split" or self.instance_weight or (centers is not None and learns):
            return None
        in_one_tile = self._in_one_tile(batch, centers, center_temperature, scale)
        if in_one_tile is not None or self.form == "inside" or not self.is_of_rows(batch.z):
            return in_one_tile
        losses = contrast_rows(
            batch.z,
            batch.ids,
            scale=scale,
            centers=centers,
            center_temperature=None if centers is None else center_temperature,
            center_weight=self.center_weight,
            reduction=self.reduction,
        )
        return losses.view(batch.shape) if self.reduction == "none" else losses

    def _in_one_tile(
        self, batch: Batch, centers: Tensor | None, center_temperature: float | Tensor | None, scale: float | Tensor
    ) -> Tensor | None:
        """The same of a small batch."""
        inside, keys = self.form == "inside", batch.z.shape[0] + (0 if centers is None else centers.shape[0])
        center_scale = None
        if centers is not None:
            if self.center_weight == 0 or (inside and self.center_weight != 1):
                return None
            if isinstance(center_temperature, Tensor):
                center_scale = center_temperature.to(accumulation_dtype(batch.z)).reciprocal()
            elif center_temperature is not None:
                center_scale = 1.0 / center_temperature
        if not self.is_tile(batch.z, keys, scale, center_scale):
            return None
        return self_contrast(
            batch.z,
            batch.ids,
            scale=scale,
            centers=centers,
            center_scale=center_scale,
            center_weight=self.center_weight,
            inside=inside,
            mean=self.reduction == "mean",
        )

    def _outside(self, batch: Batch, scale: float | Tensor, to_centers: _ToCenters | None) -> _Parts:
        """Losses of "joint" and "split"; of the instance alone, if it has a weight; who has a positive."""
        rest, positives, count, single = logsumexp_and_positives(batch, scale, self.backend)
        of_instance = None
        if self.instance_weight:
            # A row with a single positive has one other view: it is that one.
            of_instance = loss_of_mean(rest, _mean_of_own_views(batch) * scale, single)
        mean = positives / count.clamp(min=1)
        if to_centers is None:
            return loss_of_mean(rest, mean, single), of_instance, count > 0
        weight = to_centers.weight
        if self.form == "split":
            local = loss_of_mean(rest, mean, single).masked_fill(count == 0, 0.0)
            losses = local + weight * cross_entropy(to_centers.others, to_centers.own)
            return losses, of_instance, count + weight > 0
        total = count + weight
        mean = (positives + weight * to_centers.own) / torch.where(total > 0, total, 1.0)
        # What was left out comes back to the sum, but for the one positive of a row that has no other.
        only = torch.where(single, weight == 0, (count == 0) & (weight > 0))
        partner = positives.masked_fill(~single | only, -torch.inf)
        center = to_centers.own.masked_fill(~batch.assigned | (only & ~single), -torch.inf)
        rest = logaddexp(rest, to_centers.others, partner, center)
        return loss_of_mean(rest, mean, only), of_instance, total > 0

    def _inside(self, batch: Batch, scale: float | Tensor, to_centers: _ToCenters | None) -> _Parts:
        """The same of "inside"."""
        rest, same, single = logsumexp_by_id(batch, scale, self.backend)
        of_instance = None
        if self.instance_weight:
            above = same - _mean_of_own_views(batch) * scale
            of_instance = cross_entropy(rest, same) + above.masked_fill(single, 0.0)
        positives = same
        if to_centers is not None:
            rest = logaddexp(rest, to_centers.others)
            positives = logaddexp(same, to_centers.own + to_centers.weight.log())
        has_positive = positives != -torch.inf
        rest, positives = (x.masked_fill(~has_positive, 0.0) for x in (rest, positives))
        if to_centers is None or self.center_weight == 1:
            return cross_entropy(rest, positives), of_instance, has_positive
        # In the denominator a centre counts as one whatever its weight.
        counted = logaddexp(same, to_centers.own.masked_fill(~batch.assigned, -torch.inf))
        counted = counted.masked_fill(~has_positive, 0.0)
        return cross_entropy(rest, counted) + (counted - positives), of_instance, has_positive

    def _check_views(self, embeddings: Tensor) -> None:
        if self.instance_weight and (embeddings.ndim != 3 or embeddings.shape[1] < 2):
            expected = "shape [n, views, d] with two views or more, for instance_weight"
            raise ArgumentError(f"embeddings: expected {expected}, got {list(embeddings.shape)}")


def logsumexp_and_positives(
    batch: Batch, scale: float | Tensor, backend: ContrastBackend
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every row, over all other rows: log-sum-exp of the logits, and what the positives bring.

    That is the sum of their logits, their number, and whether it is one: a single positive is left out of the
    log-sum-exp.
    """
    z, ids, _, exchange, _ = batch
    if not exchange.group.is_null:
        options = {"exchange": exchange, "backend": backend}
        found = global_contrast(z, ids, scale=scale, wanted=Wanted(same=True, other=True, positives=True), **options)
        positives, count = found["positives"], found["count"]
        single = count == 1
        return torch.where(single, found["other"], logaddexp(found["same"], found["other"])), positives, count, single
    group, _ = groups_of(ids)
    count = same_group_count(group).to(accumulation_dtype(z))
    single = count == 1
    rest, _, positives = contrast_with_positives(z, group, scale=scale, single=if_any(single), backend=backend)
    return rest, positives, count, single


def if_any(single: Tensor) -> Tensor | None:
    """On a CPU it is known whether there is such a row at all; None: there is not."""
    return None if host_knows(single) and not bool(single.any()) else single


def logsumexp_by_id(batch: Batch, scale: float | Tensor, backend: ContrastBackend) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps of every row over the rows of other ids and over the other rows of its own; whether that is one."""
    z, ids, _, exchange, _ = batch
    options = {"scale": scale, "backend": backend}
    if not exchange.group.is_null:
        wanted = Wanted(same=True, other=True, positives=True)
        found = global_contrast(z, ids, wanted=wanted, exchange=exchange, **options)
        return found["other"], found["same"], found["count"] == 1
    group, _ = groups_of(ids)
    other, same = streaming_logsumexp(z, q_ids=group, candidates="other_id", return_same=True, **options)
    return other, same, same_group_count(group) == 1


def loss_of_mean(rest: Tensor, mean: Tensor, only: Tensor) -> Tensor:
    """-log of the positives' softmax in the mean: the rest of the sum is without a positive that is the only one."""
    above = rest - mean
    return torch.where(only, log_of_one_more(above), above)


def _mean_of_own_views(batch: Batch) -> Tensor:
    """Of every row, the mean inner product with the other views of its sample."""
    n, views = batch.shape
    z = batch.z.unflatten(0, (n, views)).to(accumulation_dtype(batch.z))
    return row_dot(z.sum(1, keepdim=True) - z, z).flatten() / (views - 1)
