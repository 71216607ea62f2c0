"""Supervised contrastive learning."""

from typing import Literal, Unpack, get_args

from torch import Tensor

from ccl_fast.checks import check_choice
from ccl_fast.losses.base import CommonOptions
from ccl_fast.losses.batch import check_unassigned, labels_as_ids
from ccl_fast.losses.ccl import CCLLoss

Form = Literal["outside", "inside"]
FORMS: tuple[Form, ...] = get_args(Form)


class SupConLoss(CCLLoss):
    r"""Contrast with all views of the same label as positives: CCL without centres.

    .. math::
        \text{outside:}\quad & \ell_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{e^{s_{ip}}}{\sum_{j \in A(i)} e^{s_{ij}}} \\
        \text{inside:}\quad & \ell_i = -\log \frac{\sum_{p \in P(i)} e^{s_{ip}}}{\sum_{j \in A(i)} e^{s_{ij}}}

    with :math:`s_{ij} = \langle z_i, z_j \rangle / T`, A(i) all other views and P(i) those of the same label. The
    mean is over the anchors that have a positive. (The paper's "inside" adds the constant log |P(i)|, which has no
    gradient.) Khosla et al., "Supervised Contrastive Learning" (arXiv:2004.11362).

    Args:
        temperature: T, > 0; the initial value if learnable.
        form: "outside" (the paper's L_out) or "inside" (L_in) of the logarithm.
        unassigned: the label of rows that have none, -1: their only positives are their own views, and they are
            negatives of all others. With None every label is a class, also those below 0, as in
            pytorch-metric-learning and SupContrast.
        learnable_temperature, normalize, reduction, backend, process_group, exchange: as in `Loss`.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast import SupConLoss
        >>> loss = SupConLoss(temperature=0.1)(torch.randn(8, 2, 16), torch.arange(8) % 3)
        >>> loss.shape
        torch.Size([])
    """

    _ids_name = "labels"

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        form: Form = "outside",
        unassigned: int | None = -1,
        **common: Unpack[CommonOptions],
    ):
        check_choice("form", form, FORMS)
        super().__init__(temperature, form="joint" if form == "outside" else form, **common)
        check_unassigned(unassigned)
        self.form, self.unassigned = form, unassigned

    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the loss.

        Args:
            embeddings: ``[n, d]`` (one row per view) or ``[n, views, d]``.
            labels: ``[n]``, integers, -1 for unlabelled (see ``unassigned``); None (with [n, views, d]) is NT-Xent.

        Returns:
            The loss, float32 (float64 for float64 embeddings).

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
            IndexError: a label is below -1 while ``unassigned`` is -1 (on a GPU: an assertion on the device).
        """
        if labels is not None:
            labels = labels_as_ids(labels, self.unassigned, self.process_group is None)
        return super().forward(embeddings, labels)
