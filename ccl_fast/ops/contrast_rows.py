"""The contrast of a batch of any size as a single node of autograd, where Triton's kernels run.

The log-sum-exps stream, as everywhere; what is done with a row's sums, its positives and its centre is one kernel, and
what makes of their derivatives the gradient of a row is another. On a GPU the launches of some hundred small operations
would take longer than the products.
"""

from typing import Literal

import torch
from torch import Tensor

from ccl_fast.checks import product_dtype
from ccl_fast.ops import normalize_triton
from ccl_fast.ops.backends import ContrastBackend, choose_backend
from ccl_fast.ops.differentiable import differentiable_once, refuse_forward_mode, savable
from ccl_fast.ops.logsumexp import triton
from ccl_fast.ops.logsumexp.bound import UNSHIFTED_LIMIT
from ccl_fast.ops.normalize import unit_rows
from ccl_fast.ops.precision import scale_tensor, without_autocast

NAME = "contrast of rows"


def runs(x: Tensor, backend: ContrastBackend) -> bool:
    """Tell whether this node serves rows [n, d]: plain tensors, which nothing traces, where kernels normalise too."""
    if not normalize_triton.serves_rows(x) or x.shape[1] > normalize_triton.MAX_BLOCK:
        return False
    return choose_backend("streaming_logsumexp", backend, x.device, product_dtype(x)) == "triton"


def contrast_rows(
    x: Tensor,
    ids: Tensor,
    *,
    scale: float | Tensor,
    centers: Tensor | None = None,
    center_temperature: float | Tensor | None = None,
    center_weight: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    r"""`contrast_tile.self_contrast` with positives outside the logarithm, of any number of rows.

    Args:
        x: ``[n, d]``; see `runs`.
        ids: int64 ``[n]``; below 0 a row has no centre.
        scale: the inverse temperature.
        centers: ``[k, d]``; no gradient.
        center_temperature: a number or ``[k]``, without a gradient; None: that of the rows.
        center_weight: >= 0.
        reduction: "mean" of the rows that have a positive, "sum", or "none".

    Returns:
        A scalar, or ``[n]``, float32; 0 for rows without a positive.
    """
    if centers is not None:
        centers = centers.detach()
    return _ContrastRows.apply(savable(x), scale, ids, centers, center_temperature, center_weight, reduction)


class _ContrastRows(torch.autograd.Function):
    jvp = staticmethod(refuse_forward_mode(NAME))

    @staticmethod
    def forward(ctx, x, scale, ids, centers, center_temperature, center_weight, reduction):
        from ccl_fast.kernels.contrast_rows import row_losses  # needs Triton

        (n, d), dtype = x.shape, product_dtype(x)
        with without_autocast(x.device):
            unit, inverse = unit_rows(x.float())
            z, of_rows = unit.to(dtype), scale_tensor(scale, x)
            others, group, kinds = _groups(ids)
            # A row and its single positive are a kind of their own, so that the sum goes over all but those.
            none, rest, bounded = triton.forward(
                z, None, of_rows, None, kinds, None, False, True, has_runs=False, bounded=_are_bounded(scale)
            )
            to_centers = of_centers = numbers = own = None
            if centers is not None:
                centers, of_centers = _scaled(centers.float(), center_temperature, of_rows, dtype)
                own, numbers = ids.int(), torch.arange(len(centers), dtype=torch.int32, device=x.device)
                across = (z, centers, of_centers, None, own, numbers)
                _, to_centers, _ = triton.forward(*across, False, True, has_runs=False)
            sums = _sums_of_groups(z, group)
            found, slopes = (torch.empty(rows, n, dtype=torch.float32, device=x.device) for rows in (2, 4))
            ctx.learns_scale = ctx.needs_input_grad[1]
            dots = torch.zeros_like(found) if ctx.learns_scale else None
            with triton.on_device_of(x):
                row_losses[(n,)](
                    z, centers, sums, own, group, others, of_rows, of_centers, rest, to_centers, found, slopes, dots,
                    n, d, float(center_weight), **normalize_triton.launch_options(d),
                )  # fmt: skip
            losses, count = found, None
            if reduction == "mean":
                total, present = found.sum(1).unbind()
                count = present.clamp_(min=1.0)
                losses = total / count
            elif reduction == "sum":
                losses = found[0].sum()
            else:
                losses = found[0].clone()
        ctx.share_scale = centers is not None and center_temperature is None
        ctx.save_for_backward(
            x, z, unit, inverse, centers, of_rows, of_centers, own, numbers, group, kinds, none, rest,
            to_centers, bounded, slopes, dots, count, scale if isinstance(scale, Tensor) else None,
        )  # fmt: skip
        return losses

    @staticmethod
    def backward(ctx, grad):
        from ccl_fast.kernels.contrast_rows import row_gradients

        (
            x, z, unit, inverse, centers, of_rows, of_centers, own, numbers, group, kinds, none, rest,
            to_centers, bounded, slopes, dots, count, scale,
        ) = ctx.saved_tensors  # fmt: skip
        (n, d), to_scale = x.shape, None
        with torch.no_grad(), without_autocast(x.device):
            slopes = slopes * (grad if count is None else grad / count)
            by_rest, by_centers, by_positives, _ = slopes.unbind()
            wanted = (True, False, ctx.learns_scale, False)
            known = (none, rest, bounded, none, by_rest, wanted)
            to_z, _, to_scale, _ = triton.backward(
                z, None, of_rows, None, kinds, None, *known, dtype=torch.float32, has_runs=False
            )
            assert to_z is not None
            from_centers = None
            if centers is not None:
                wanted = (True, False, ctx.learns_scale and ctx.share_scale, False)
                known = (none, to_centers, bounded, none, by_centers, wanted)
                across = (z, centers, of_centers, None, own, numbers)
                from_centers, _, more, _ = triton.backward(*across, *known, dtype=torch.float32, has_runs=False)
            sums, weighted = (_sums_of_groups(rows, group) for rows in (z, z * by_positives[:, None]))
            is_like = to_z.dtype == x.dtype and to_z.is_contiguous()
            out = to_z if is_like else torch.empty(n, d, dtype=x.dtype, device=x.device)
            with triton.on_device_of(x):
                row_gradients[(n,)](
                    z, unit, inverse, centers, sums, weighted, own, group, slopes, to_z, from_centers, out,
                    n, d, to_z.stride(0), 0 if from_centers is None else from_centers.stride(0),
                    **normalize_triton.launch_options(d),
                )  # fmt: skip
            if ctx.learns_scale:
                with_scale = 2 if ctx.share_scale else 1
                to_scale = to_scale + (slopes[2 : 2 + with_scale] * dots[:with_scale]).sum() / of_rows
                if ctx.share_scale:
                    to_scale = to_scale + more
                to_scale = to_scale.to(scale.dtype).reshape(scale.shape)
        out, to_scale = differentiable_once(NAME, (x, scale, grad), out, to_scale)
        return out, to_scale, *[None] * 5


def _groups(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every row the number of others of its id; a number below n that is the same for them; see `row_losses`.

    The third is the second for rows that have a single other of their id, and else one of its own.
    """
    ids, n = ids.contiguous(), ids.shape[0]
    ordered = ids.sort().values
    group = torch.searchsorted(ordered, ids, out_int32=True)
    others = torch.searchsorted(ordered, ids, right=True, out_int32=True).sub_(group).sub_(1)
    own = torch.arange(n, 2 * n, dtype=torch.int32, device=ids.device)
    return others, group, torch.where(others == 1, group, own)


def _are_bounded(scale: float | Tensor) -> bool | None:
    """Whether logits of unit rows are in the bound of exponentials that need no shift; half rows round to 1.004."""
    return None if isinstance(scale, Tensor) else 1.01 * scale <= UNSHIFTED_LIMIT


def _sums_of_groups(x: Tensor, group: Tensor) -> Tensor:
    x = x.float()
    return torch.zeros_like(x).index_add_(0, group, x)


def _scaled(
    centers: Tensor, temperature: float | Tensor | None, of_rows: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Centres of length 1, and their inverse temperature; with one of each they are divided by them."""
    centers, _ = unit_rows(centers)
    if isinstance(temperature, Tensor):
        temperature = temperature.float()
    if temperature is None:
        return centers.to(dtype), of_rows
    if isinstance(temperature, Tensor) and temperature.ndim == 1:
        return (centers / temperature[:, None]).to(dtype), torch.ones_like(of_rows)
    return centers.to(dtype), scale_tensor(1.0 / temperature, of_rows)
