"""How probably an item is among the largest of its list, by a sorting network that swaps softly."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_positive, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, GradientOperator
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.rowwise.blocks import blocks_of, device_memory, workspace_bytes

# Numbers of all layers that live at once on a CPU: differences, probabilities, what the indicator differs by. Layers
# are computed one after the other, so that it takes many lists to keep them busy.
CPU_NUMBERS, MIN_LISTS = 1 << 21, 64


def soft_rank_mass(s: Tensor, n_top: int, *, steepness: float = 1.0) -> Tensor:
    r"""Of every item of a list, the probability to land in the last ``n_top`` places of the ascending order.

    An odd-even network of m layers compares neighbours, which stay as they are with the probability

    .. math::
        \alpha = \tfrac{1}{2} + \tfrac{1}{\pi} \arctan(\beta (b - a)), \qquad
        (a, b) \mapsto \big( \alpha a + (1 - \alpha) b,\ (1 - \alpha) a + \alpha b \big)

    The product of all layers is a matrix of probabilities, rows items, columns places, whose last ``n_top`` columns are
    summed up. The matrix is not built: these columns' indicator goes back through the layers, so that time is O(b m^2)
    instead of O(b m^3). Memory, beside what is returned, is linear in the numbers of all lists: some of these are
    computed at a time. The order of a list matters where values are near each other, as swaps are soft. The gradient
    flows to ``s``; a second derivative raises.

    Petersen, Borgelt, Kuehne, Deussen, "Monotonic Differentiable Sorting Networks" (arXiv:2203.09630), whose package
    is diffsort: its network "odd_even", of the Cauchy distribution.

    Args:
        s: ``[..., m]``, lists of m numbers; float64, float32, bfloat16 or float16.
        n_top: how many places, 0 to m.
        steepness: beta, > 0: of the swaps; the larger, the harder.

    Returns:
        ``[..., m]``, float32 (float64 for float64 input). Each list sums to ``n_top``.

    Raises:
        ValueError: an argument has the wrong shape, dtype or value.

    Example:
        >>> import torch
        >>> from ccl_fast.ops import soft_rank_mass
        >>> soft_rank_mass(torch.tensor([0.1, 0.2, 0.9]), 1, steepness=100.0)
        tensor([1.4361e-04, 4.3829e-03, 9.9547e-01])
    """
    check_tensor("s", s)
    check_floating("s", s)
    if s.ndim == 0:
        raise ArgumentError("s: expected lists [..., m], got a number")
    check_count("n_top", n_top, least=0)
    if n_top > s.shape[-1]:
        raise ArgumentError(f"n_top: expected at most {s.shape[-1]}, the length of a list, got {n_top}")
    check_positive("steepness", steepness)
    lists = s.reshape(s.shape[:-1].numel(), s.shape[-1])  # told how many, as of empty ones -1 is not known
    return _MASS(lists, n_top, float(steepness)).view(s.shape)


# ---- layers: every place a row, [m, lists], so that neighbours are rows too ----


def _pairs(x: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Views of the lower and of the upper place of each comparison of a layer."""
    start = layer % 2
    return x[start:-1:2], x[start + 1 :: 2]


def _blocks(s: Tensor) -> Iterator[slice]:
    on_cpu, of_a_list = s.device.type == "cpu", 3 * s.shape[1] * (s.shape[1] + 1) // 2
    numbers = CPU_NUMBERS if on_cpu else workspace_bytes(device_memory(s.device)) // 8
    return blocks_of(s.shape[0], max(MIN_LISTS, numbers // max(of_a_list, 1)))


def _sort(x: Tensor, steepness: float) -> tuple[list[Tensor], list[Tensor]]:
    """Sort places [m, lists] in place; return the differences and the probabilities to stay, of each layer."""
    differences, stays = [], []
    for layer in range(x.shape[0]):
        low, high = _pairs(x, layer)
        difference = high - low
        stay = torch.atan(steepness * difference).div_(math.pi).add_(0.5)
        moved = stay * difference
        low.copy_(high - moved)
        high.sub_(difference).add_(moved)
        differences.append(difference)
        stays.append(stay)
    return differences, stays


def _back(w: Tensor, stays: list[Tensor]) -> list[Tensor]:
    """Take an indicator of places [m, lists] back to the items, in place; return what it differed by, by layers."""
    differences = []
    for layer in reversed(range(w.shape[0])):
        low, high = _pairs(w, layer)
        difference = high - low
        moved = stays[layer] * difference
        low.copy_(high - moved)
        high.sub_(difference).add_(moved)
        differences.append(difference)
    return differences[::-1]


def _indicator(x: Tensor, n_top: int) -> Tensor:
    w = torch.zeros_like(x)
    w[x.shape[0] - n_top :] = 1.0
    return w


# ---- one operator forward, one backward: two opaque nodes for what traces them ----


def _forward(s: Tensor, n_top: int, steepness: float) -> Tensor:
    with without_autocast(s.device):
        mass = _empty(s, n_top, steepness)
        for lists in _blocks(s):
            x = _places(s[lists])
            _, stays = _sort(x, steepness)
            w = _indicator(x, n_top)
            _back(w, stays)
            mass[lists] = w.T
        return mass


def _places(s: Tensor) -> Tensor:
    """Return a copy of lists as places, in accumulation precision."""
    return s.T.to(accumulation_dtype(s), copy=True, memory_format=torch.contiguous_format)


def _backward(s: Tensor, grad: Tensor, n_top: int, steepness: float) -> Tensor:
    with without_autocast(s.device):
        to_s = torch.empty_like(s, memory_format=torch.contiguous_format)
        for lists in _blocks(s):
            x = _places(s[lists])
            differences, stays = _sort(x, steepness)
            of_indicator = _back(_indicator(x, n_top), stays)
            to_stays = _through_indicator(_places(grad[lists]), stays, of_indicator)
            to_s[lists] = _through_sort(torch.zeros_like(x), to_stays, differences, stays, steepness).T.to(s.dtype)
        return to_s


def _through_indicator(g: Tensor, stays: list[Tensor], differences: list[Tensor]) -> list[Tensor]:
    """Derivatives by the probabilities, given those by the items' mass, [m, lists]: the first layer was the last."""
    to_stays = []
    for layer, (stay, difference) in enumerate(zip(stays, differences, strict=True)):
        low, high = _pairs(g, layer)
        change = high - low
        to_stays.append(difference.mul_(change))
        moved = change.mul(stay)
        low.copy_(high - moved)
        high.sub_(change).add_(moved)
    return to_stays


def _through_sort(
    h: Tensor, to_stays: list[Tensor], differences: list[Tensor], stays: list[Tensor], steepness: float
) -> Tensor:
    """Derivatives by the items, [m, lists], given those by the probabilities of each layer, in h, which is 0."""
    for layer in reversed(range(len(stays))):
        low, high = _pairs(h, layer)
        change, difference = high - low, differences[layer]
        by_difference = steepness / math.pi / (steepness * difference).square().add_(1.0)
        moved = by_difference.mul_(to_stays[layer] + difference * change).add_(stays[layer] * change)
        low.copy_(high - moved)
        high.sub_(change).add_(moved)
    return h


def _empty(s: Tensor, n_top: int, steepness: float) -> Tensor:
    return s.new_empty(s.shape, dtype=accumulation_dtype(s))


def _empty_gradient(s: Tensor, grad: Tensor, n_top: int, steepness: float) -> Tensor:
    return torch.empty_like(s, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output) -> None:
    s, ctx.n_top, ctx.steepness = inputs
    ctx.save_for_backward(s)


def _gradients(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
    return _GRADIENT(*ctx.saved_tensors, grad, ctx.n_top, ctx.steepness), None, None


_MASS = Differentiable("soft_rank_mass", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator("soft_rank_mass_backward", _backward, _empty_gradient, of="soft_rank_mass")
