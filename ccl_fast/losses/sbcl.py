"""Supervised contrast on subclasses of equal size and on the classes that they make up."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_flag, check_not_negative, check_positive, check_same, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_center_temperature, check_ids, labels_as_ids
from ccl_fast.ops import cross_entropy, logaddexp, streaming_logsumexp
from ccl_fast.ops.ids import joint_ids, separate_unassigned
from ccl_fast.ops.logsumexp.distributed import Wanted, global_contrast, global_same_id_similarity
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class SBCLLoss(Loss):
    r"""SupCon on subclasses, plus SupCon on classes among the rows of other subclasses.

    With z unit embeddings of all views, :math:`s_{ij} = \langle z_i, z_j \rangle / T`, A(i) all other rows, M(i) those
    of the same subclass, P(i) those of the same class, :math:`\beta` the weight of the class:

    .. math::
        \ell_i = -\frac{1}{|M(i)|} \sum_{p \in M(i)} \log \frac{e^{s_{ip}}}{\sum_{j \in A(i)} e^{s_{ij}}}
            - \frac{\beta}{|R(i)|} \sum_{p \in R(i)}
              \log \frac{e^{s_{ip}}}{\sum_{j \in (A(i) \setminus M(i)) \cup V(i)} e^{s_{ij}}}, \qquad
        R(i) = (P(i) \setminus M(i)) \cup V(i)

    with V(i) the other views of the anchor's sample, which are of its subclass, or with ``own_views=False`` none. With
    a base temperature :math:`T_0` the first term is times :math:`T / T_0`. A term without positives is 0; the mean is
    over the anchors that have a positive. Where subclasses are classes it is SupCon, with ``own_views=False``. One pass
    gives both log-sum-exps. Memory is linear in n; a second derivative raises.

    Hou et al., "Subclass-balancing Contrastive Learning for Long-tailed Recognition" (arXiv:2306.15925), where the
    subclasses of head classes are clusters of about the size of a tail class, and the second term has a temperature
    for each class (``class_temperature``).

    Args:
        temperature: T, > 0; the initial value if learnable.
        class_weight: beta, >= 0; the default is that of the authors' code.
        base_temperature: :math:`T_0`, > 0, in the weight of the first term; 0.07 in the authors' code. None: T.
        own_views: embeddings ``[n, views, d]`` have their own views in the second term too, as in the authors' code.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`.

    Cost:
        operators: one LSE with both sums (`return_same`), two `same_id_similarity`.
        units: 2 of N x N x D.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SBCLLoss
        >>> labels, cluster_ids = torch.arange(8) % 2, torch.arange(8) % 4
        >>> loss = SBCLLoss(temperature=0.1)(torch.randn(8, 2, 16), labels, cluster_ids)
        >>> loss.shape
        torch.Size([])
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        class_weight: float = 0.25,
        base_temperature: float | None = None,
        own_views: bool = True,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_not_negative("class_weight", class_weight)
        check_flag("own_views", own_views)
        if base_temperature is not None:
            check_positive("base_temperature", base_temperature)
        self.class_weight, self.base_temperature, self.own_views = class_weight, base_temperature, own_views

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        cluster_ids: Tensor,
        *,
        class_temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` (one row per view) or ``[n, views, d]``; float64, float32, bfloat16, float16.
            labels: ``[n]``, whole numbers of any dtype: the classes; -1 is unlabelled, a class of its own.
            cluster_ids: ``[n]``, integers: the subclasses, found within each class: the same number in two classes is
                two subclasses. -1: a subclass of its own.
            class_temperature: ``[k]``, positive, T of the second term for each class, whose labels are then below k;
                None: T. It takes a pass of its own, on one process.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per row: ``[n]`` or
            ``[n, views]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label or a cluster id is below -1 (on a GPU: an assertion on the device).
        """
        labels = labels_as_ids(labels, embeddings)

        def check() -> None:
            check_ids("cluster_ids", cluster_ids, embeddings)
            if class_temperature is not None:
                self._check_class_temperature(class_temperature, embeddings, labels)

        z, classes, shape, exchange, _first = self.prepare(embeddings, labels, "labels", check=check)
        views = 1 if embeddings.ndim == 2 else embeddings.shape[1]
        scale = 1.0 / self.shared(self.temperature, exchange.group)
        # No sample of another process gets a number from that of the first row here to that of the last.
        subclasses = separate_unassigned(cluster_ids.long(), exchange.first).repeat_interleave(views)
        subclasses = exchange.own(joint_ids(exchange.gather(classes), exchange.gather(subclasses)))
        wanted = Wanted(same=True, other=True, positives=True)
        found = global_contrast(z, subclasses, scale=scale, wanted=wanted, exchange=exchange, backend=self.backend)
        outside, inside, own, own_count = (found[name] for name in ("other", "same", "positives", "count"))
        mates, mates_count = global_same_id_similarity(z, classes, exchange)
        rest, rest_count = mates - own / scale, mates_count - own_count
        own = own / own_count.clamp(min=1)
        by_subclass = torch.where(own_count == 1, cross_entropy(outside, own), logaddexp(outside, inside) - own)
        if self.base_temperature is not None:
            by_subclass = by_subclass / (scale * self.base_temperature)
        if class_temperature is not None:
            temperature = class_temperature.to(outside.dtype)[classes.clamp(min=0)]
            queries = (z / temperature[:, None]).to(z.dtype)
            among = {"q_ids": subclasses, "k_ids": subclasses, "candidates": "other_id"}
            outside, scale = streaming_logsumexp(queries, z, scale=1.0, backend=self.backend, **among), 1 / temperature
        by_class = self._by_class(outside, rest * scale, rest_count, z, views, scale)
        rest_count = rest_count + (views - 1 if self.own_views else 0)
        losses = by_subclass.masked_fill(own_count == 0, 0.0)
        losses = losses + self.class_weight * by_class.masked_fill(rest_count == 0, 0.0)
        return self.reduce(losses, mates_count > 0, shape, exchange.group)

    def _by_class(
        self, outside: Tensor, rest: Tensor, count: Tensor, z: Tensor, views: int, scale: float | Tensor
    ) -> Tensor:
        """Return the second term of every row.

        It is made of the log-sum-exp over other subclasses and the sum over the ``count`` rows of its class there.
        """
        if not self.own_views or views == 1:
            return outside - rest / count.clamp(min=1)
        itself = torch.eye(views, dtype=torch.bool, device=z.device).repeat(z.shape[0] // views, 1)
        logits = _products_of_views(z, views) * (scale[:, None] if isinstance(scale, Tensor) and scale.ndim else scale)
        mean = (rest + logits.masked_fill(itself, 0.0).sum(1)) / (count + views - 1)
        of_views = logits.masked_fill(itself, -torch.inf).logsumexp(1)
        single = count == (0 if views == 2 else -1)
        return torch.where(single, cross_entropy(outside, mean), logaddexp(outside, of_views) - mean)

    def _check_class_temperature(self, value: Tensor, embeddings: Tensor, labels: Tensor) -> None:
        check_tensor("class_temperature", value)
        check_center_temperature(value, "class_temperature")
        check_same("class_temperature", value, "embeddings", embeddings, dtype=False)
        if value.ndim != 1:
            raise ArgumentError(f"class_temperature: expected shape [k], got {list(value.shape)}")
        if self.process_group is not None:
            raise ArgumentError("class_temperature: expected None with process_group, got a tensor")
        check_ids("labels", labels, embeddings, value.shape[0], "class temperatures")


def _products_of_views(z: Tensor, views: int) -> Tensor:
    """Of every row the inner products with the views of its sample, itself among them."""
    wide = z.unflatten(0, (-1, views)).to(accumulation_dtype(z))
    with without_autocast(z.device):
        return (wide @ wide.mT).flatten(0, 1)
