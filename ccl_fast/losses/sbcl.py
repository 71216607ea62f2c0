"""Supervised contrast on subclasses of equal size and on the classes that they make up."""

from typing import Unpack

import torch
from torch import Tensor

from ccl_fast.checks import check_not_negative
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_ids
from ccl_fast.ops import cross_entropy, logaddexp
from ccl_fast.ops.ids import joint_ids, separate_unassigned
from ccl_fast.ops.logsumexp.distributed import Wanted, global_contrast, global_same_id_similarity


class SBCLLoss(Loss):
    r"""SupCon on subclasses, plus SupCon on classes among the rows of other subclasses.

    With z unit embeddings of all views, :math:`s_{ij} = \langle z_i, z_j \rangle / T`, A(i) all other rows, M(i) those
    of the same subclass, P(i) those of the same class, :math:`\beta` the weight of the class:

    .. math::
        \ell_i = -\frac{1}{|M(i)|} \sum_{p \in M(i)} \log \frac{e^{s_{ip}}}{\sum_{j \in A(i)} e^{s_{ij}}}
            - \frac{\beta}{|P(i) \setminus M(i)|} \sum_{p \in P(i) \setminus M(i)}
              \log \frac{e^{s_{ip}}}{\sum_{j \in A(i) \setminus M(i)} e^{s_{ij}}}

    A term without positives is 0; the mean is over the anchors that have a positive. Where subclasses are classes it
    is SupCon. One pass gives both log-sum-exps. Memory is linear in n; a second derivative raises.

    Hou et al., "Subclass-balancing Contrastive Learning for Long-tailed Recognition" (arXiv:2306.15925), where the
    subclasses of head classes are clusters of about the size of a tail class. In this project's reading: one
    temperature for both terms (the paper sets the second one by class), and the other view of the anchor, which is of
    its subclass, is in the first term only (in the authors' code in both).

    Args:
        temperature: T, > 0; the initial value if learnable.
        class_weight: beta, >= 0; the default is that of the authors' code.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`.

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
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        check_not_negative("class_weight", class_weight)
        self.class_weight = class_weight

    def forward(self, embeddings: Tensor, labels: Tensor, cluster_ids: Tensor) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` (one row per view) or ``[n, views, d]``; float64, float32, bfloat16, float16.
            labels: ``[n]``, integers: the classes; -1 is unlabelled, a class of its own.
            cluster_ids: ``[n]``, integers: the subclasses, found within each class: the same number in two classes is
                two subclasses. -1: a subclass of its own.

        Returns:
            The loss, float32 (float64 for float64 embeddings). With reduction "none" a loss per row: ``[n]`` or
            ``[n, views]``.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label or a cluster id is below -1 (on a GPU: an assertion on the device).
        """
        z, classes, shape, exchange, _first = self.prepare(
            embeddings, labels, "labels", check=lambda: check_ids("cluster_ids", cluster_ids, embeddings)
        )
        views = 1 if embeddings.ndim == 2 else embeddings.shape[1]
        scale = 1.0 / self.shared(self.temperature, exchange.group)
        # No sample of another process gets a number from that of the first row here to that of the last.
        subclasses = separate_unassigned(cluster_ids.long(), exchange.first).repeat_interleave(views)
        subclasses = exchange.own(joint_ids(exchange.gather(classes), exchange.gather(subclasses)))
        wanted = Wanted(same=True, other=True, similarity=True)
        found = global_contrast(z, subclasses, scale=scale, wanted=wanted, exchange=exchange, backend=self.backend)
        outside, inside, own, own_count = (found[name] for name in ("other", "same", "similarity", "count"))
        mates, mates_count = global_same_id_similarity(z, classes, exchange)
        rest, rest_count = mates - own, mates_count - own_count

        own = own * scale / own_count.clamp(min=1)
        by_subclass = torch.where(own_count == 1, cross_entropy(outside, own), logaddexp(outside, inside) - own)
        by_class = outside - rest * scale / rest_count.clamp(min=1)
        losses = by_subclass.masked_fill(own_count == 0, 0.0)
        losses = losses + self.class_weight * by_class.masked_fill(rest_count == 0, 0.0)
        return self.reduce(losses, mates_count > 0, shape, exchange.group)
