"""Pixels grouped by prototypes alike in two views, and contrast of the groups (SlotCon)."""

from collections.abc import Callable
from typing import Unpack

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ccl_fast.checks import (
    check_floating,
    check_matrix,
    check_number,
    check_same,
    check_tensor,
    check_vector,
    checked_temperature,
)
from ccl_fast.errors import ArgumentError
from ccl_fast.losses.base import CommonOptions, Loss
from ccl_fast.losses.batch import check_some
from ccl_fast.ops import cross_entropy, distilled_prediction, row_dot, streaming_logsumexp, streaming_topk
from ccl_fast.ops.differentiable import are_transforms_active, is_traced
from ccl_fast.ops.precision import accumulation_dtype, without_autocast


class SlotConLoss(Loss):
    r"""Groups the pixels of an image by prototypes as a teacher does in another view, and contrasts the groups.

    With x, y unit rows of the student's and the teacher's pixels, c, c' unit prototypes and p a pixel of the overlap,

    .. math::
        \mathcal{L} = w \Big\langle -\sum_k q_{pk} \log \mathrm{softmax}_k(\langle x_p, c_k \rangle / T) \Big\rangle_p
            + (1 - w)\, 2 t \Big\langle \log \sum_{a, j} e^{\langle u_{bk}, v_{aj} \rangle / t}
            - \langle u_{bk}, v_{bk} \rangle / t \Big\rangle_{b, k}, \qquad
        q_p = \mathrm{softmax}_k((\langle y_p, c'_k \rangle - m_k) / T')

    where the slots u of image b are the means of its pixels (as they come), each with its softmax at T' as weight, then
    predicted and of unit length, and v those of the teacher, a constant. Slots to which no pixel is nearest are left
    out: as v those of the teacher, as u those of either. The mean is over the slots that are left. One direction: the
    loss of both views is the sum of both.

    Wen, Zhao, Zheng, Zhang, Qi, "Self-supervised visual representation learning with semantic grouping"
    (arXiv:2205.15288), with 256 prototypes. Their centre m is a moving average (0.9) of the teacher's mean similarities
    to each prototype, and their 1e-6 beside a slot's weights is left out.

    Args:
        temperature: T, of the student, > 0; the initial value if learnable.
        teacher_temperature: T', > 0.
        slot_temperature: t, > 0.
        distillation_weight: w, 0 to 1.
        learnable_temperature, normalize, backend: as in `Loss`; the backend is that of the log-sum-exps. (Means over
            pixels and over slots have no other reduction. It runs on one process.)

    Cost:
        operators: `distilled_prediction`; for the slots LSE over prototypes and torch's attention, image by image;
            `streaming_topk`, `topk=1`, for those that win a pixel; LSE of slots, `candidates="other_id"`.
        units: about 22 of N x K x D for N pixels; 4 of S x S x D for the S slots that are left.

    Raises:
        ValueError: an argument has the wrong type, shape, dtype, device or value.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import SlotConLoss
        >>> student, teacher, prototypes = torch.randn(4, 49, 16), torch.randn(4, 49, 16), torch.randn(8, 16)
        >>> SlotConLoss()(student, teacher, prototypes, predictor=torch.nn.Linear(16, 16)).shape
        torch.Size([])
    """

    unsupported = ("reduction", "process_group", "exchange")

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        teacher_temperature: float = 0.07,
        slot_temperature: float = 0.2,
        distillation_weight: float = 0.5,
        **common: Unpack[CommonOptions],
    ):
        super().__init__(temperature, **common)
        self.teacher_temperature = checked_temperature("teacher_temperature", teacher_temperature)
        self.slot_temperature = checked_temperature("slot_temperature", slot_temperature)
        check_number("distillation_weight", distillation_weight, "a number from 0 to 1", lambda x: 0 <= x <= 1)
        self.distillation_weight = distillation_weight

    def forward(
        self,
        queries: Tensor,
        keys: Tensor,
        prototypes: Tensor,
        *,
        teacher_prototypes: Tensor | None = None,
        teacher_center: Tensor | None = None,
        overlap: tuple[Tensor, Tensor] | None = None,
        predictor: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            queries: ``[b, p, d]``, the student's pixels of b images; float64, float32, bfloat16 or float16.
            keys: ``[b, p', d]``, the teacher's pixels of the other view. They get no gradient.
            prototypes: c ``[k, d]``, which learn.
            teacher_prototypes: c' ``[k, d]``, without a gradient; None: the same.
            teacher_center: m ``[k]``; None: 0.
            overlap: the student's and the teacher's rows ``[n, d]`` of the pixels that both views show, such as what
                ``torchvision.ops.roi_align`` makes of maps of unit rows, as they come. None: pixels correspond by their
                place.
            predictor: of the student's slots ``[s, d]`` that are left (in what torch traces or transforms, of all).
                None: the slots themselves.

        Returns:
            The loss, float32 (float64 for float64 input). Where no slot is left, the first term.

        Raises:
            ValueError: an argument has the wrong type, shape, dtype, device or value.
        """
        self._check(queries, keys, prototypes, teacher_prototypes, teacher_center, overlap)
        x, y = (self.unit(pixels.flatten(0, 1)).view(pixels.shape) for pixels in (queries, keys.detach()))
        c = self.unit(prototypes).to(x.dtype)
        of_teacher = c.detach() if teacher_prototypes is None else self.unit(teacher_prototypes.detach()).to(x.dtype)
        rows, targets = (x.flatten(0, 1), y.flatten(0, 1)) if overlap is None else overlap
        losses = distilled_prediction(
            rows.to(x.dtype),
            c,
            targets.to(x.dtype),
            of_teacher,
            scale=1.0 / self.temperature,
            teacher_scale=1.0 / self.teacher_temperature,
            potentials=None if teacher_center is None else -teacher_center / self.teacher_temperature,
        )
        distillation = losses.sum() / max(losses.shape[0], 1)
        slots = self._slots(queries, x, c).flatten(0, 1)
        with torch.no_grad():
            fixed = self.unit(self._slots(keys, y, of_teacher).flatten(0, 1).to(x.dtype))
            of_keys = _winners(y, of_teacher).flatten()
            of_both = _winners(x, c).flatten() & of_keys
        contrast = self._contrast(slots.to(x.dtype), fixed, of_both, of_keys, predictor or torch.nn.Identity())
        return self.distillation_weight * distillation + (1 - self.distillation_weight) * contrast

    def _slots(self, pixels: Tensor, unit: Tensor, centers: Tensor) -> Tensor:
        """Means [b, k, d] of each image's pixels by their softmax over prototypes, in accumulation precision.

        Of a prototype the pixels' weights are a softmax over them, with what each divides by as its bias.
        """
        scale, wide = 1.0 / self.teacher_temperature, accumulation_dtype(unit)
        logsumexp = streaming_logsumexp(unit.flatten(0, 1), centers, scale=scale, backend=self.backend)
        bias = -logsumexp.view(*unit.shape[:2], 1)
        prototypes = torch.cat((scale * centers.to(wide), torch.ones_like(centers[:, :1], dtype=wide)), dim=1)
        keys = torch.cat((unit.to(wide), bias), dim=2)
        values = torch.cat((pixels.to(wide), torch.zeros_like(bias)), dim=2)
        queries = prototypes.expand(unit.shape[0], -1, -1)
        with without_autocast(unit.device):
            return _attention(queries, keys, values)[..., :-1]

    def _contrast(
        self, slots: Tensor, fixed: Tensor, of_both: Tensor, of_keys: Tensor, predictor: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """InfoNCE of the slots that won a pixel of both views, against the teacher's that won one."""
        ids, scale = torch.arange(slots.shape[0], device=slots.device), 1.0 / self.slot_temperature
        if are_transforms_active() or is_traced(slots):  # where shapes cannot depend on what wins
            own, own_ids, keys, key_ids, counted = fixed, ids, fixed, ids, of_both
            bias = torch.zeros(of_keys.shape, device=slots.device).masked_fill(~of_keys, -torch.inf)
        else:
            slots, own, own_ids, counted = slots[of_both], fixed[of_both], ids[of_both], None
            keys, key_ids, bias = fixed[of_keys], ids[of_keys], None
        slots = self.unit(predictor(slots).to(fixed.dtype))
        among = {"q_ids": own_ids, "k_ids": key_ids, "candidates": "other_id"}
        others = streaming_logsumexp(slots, keys, scale=scale, key_bias=bias, **among, backend=self.backend)
        losses = cross_entropy(others, row_dot(slots, own) * scale)
        return 2 * self.slot_temperature * self.reduce(losses, counted)

    def _check(self, queries, keys, prototypes, teacher_prototypes, teacher_center, overlap) -> None:
        for name, x in (("queries", queries), ("keys", keys)):
            check_tensor(name, x)
            if x.ndim != 3:
                raise ArgumentError(f"{name}: expected shape [b, pixels, d], got {list(x.shape)}")
        check_floating("queries", queries)
        check_same("keys", keys, "queries", queries)
        images, pixels, width = queries.shape
        if (keys.shape[0], keys.shape[2]) != (images, width) or (overlap is None and keys.shape[1] != pixels):
            expected = f"[{images}, {pixels if overlap is None else 'pixels'}, {width}]"
            raise ArgumentError(f"keys: expected shape {expected}, got {list(keys.shape)}")
        fixed = prototypes if teacher_prototypes is None else teacher_prototypes
        for name, x in (("prototypes", prototypes), ("teacher_prototypes", fixed)):
            check_matrix(name, x, columns=width)
            check_floating(name, x)
            check_same(name, x, "queries", queries, dtype=False)
        check_some("prototypes", prototypes)
        if fixed.shape != prototypes.shape:
            expected = f"{list(prototypes.shape)} (that of prototypes)"
            raise ArgumentError(f"teacher_prototypes: expected shape {expected}, got {list(fixed.shape)}")
        if teacher_center is not None:
            check_vector("teacher_center", teacher_center, prototypes.shape[0])
            check_floating("teacher_center", teacher_center)
        for place, x in enumerate(overlap or ()):
            check_matrix(f"overlap[{place}]", x, columns=width)


def _attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Softmax over keys of inner products, times values, without the matrix."""
    if are_transforms_active() or queries.is_meta:  # torch's kernels have no rule for these
        return (queries @ keys.transpose(1, 2)).softmax(2) @ values
    return scaled_dot_product_attention(queries[:, None], keys[:, None], values[:, None], scale=1.0)[:, 0]


def _winners(unit: Tensor, centers: Tensor) -> Tensor:
    """Which prototypes [b, k] are the nearest of a pixel of each image."""
    nearest = streaming_topk(unit.flatten(0, 1), centers, topk=1)[1].view(unit.shape[:2])
    wins = torch.zeros(unit.shape[0], centers.shape[0], dtype=torch.bool, device=unit.device)
    return wins.scatter(1, nearest, True)
