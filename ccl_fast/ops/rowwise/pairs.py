"""Functions of all pairs of rows and keys that no matrix product gives: attributes, masks, windows. Linear memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ccl_fast.checks import check_count, check_floating, check_matrix, check_same, check_scale, check_tensor
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.differentiable import Differentiable, refuse_double_backward
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast
from ccl_fast.ops.rowwise.blocks import block_rows, blocks_of

# Of some rows and all keys, each as it was given, what is known of every row: [r] or [r, ...].
OfRows = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
# Of attributes [r, p] of some rows and [m, ...] of all keys a number for each pair, [r, m].
Term = Callable[[Tensor, Tensor], Tensor]
# Arrays [r, m] that live at once: logits, terms, and what autograd keeps of both.
ARRAYS = 6


def map_row_blocks(
    function: OfRows, rows: Sequence[Tensor], keys: Sequence[Tensor] = (), *, size: int | None = None
) -> Tensor:
    r"""Apply a function of rows and all keys to some rows at a time.

    .. math::
        \mathrm{result}_i = f(\mathrm{rows}_i, \mathrm{keys})

    Whatever [r, m] numbers the function has of r rows and m keys, memory is linear in the rows and in the keys: nothing
    of a block of rows is kept, and the backward computes it anew. Gradients flow to all tensors that are given; a
    second derivative raises. It does not compile into one graph.

    Args:
        function: of a sequence of tensors ``[r, ...]``, the same rows of each of ``rows``, and of ``keys``, in plain
            torch. It must treat each row by itself. Floating tensors come in float32 or float64.
        rows: tensors ``[n, ...]``, at least one.
        keys: tensors of any shape, of which a function sees the whole: keys ``[m, ...]`` first, or a temperature.
        size: how many rows at a time; None: so many that some arrays of them by the keys are small.

    Returns:
        ``[n, ...]``, of the function's dtype.

    Raises:
        ValueError: the rows are not as many in every tensor, the function returns another number of them, or it depends
            on a tensor that it was not given but that requires a gradient, which would be lost.

    Example:
        >>> import torch
        >>> from ccl_fast.ops import map_row_blocks
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
        >>> map_row_blocks(lambda rows, keys: torch.cdist(rows[0], keys[0]).sum(1), [x], [x])
        tensor([5., 5.])
    """
    for i, x in enumerate((*rows, *keys)):
        check_tensor(f"rows[{i}]" if i < len(rows) else f"keys[{i - len(rows)}]", x)
    if not callable(function):
        raise ArgumentError(f"function: expected a function of rows and keys, got {type(function).__name__}")
    if not rows:
        raise ArgumentError("rows: expected at least one tensor, got none")
    for i, x in enumerate(rows):
        if x.ndim == 0 or x.shape[0] != rows[0].shape[0]:
            raise ArgumentError(f"rows[{i}]: expected {rows[0].shape[0]} rows, got shape {list(x.shape)}")
    if size is None:
        size = block_rows(max((x.shape[0] for x in keys if x.ndim), default=1), rows[0].device, ARRAYS)
    else:
        check_count("size", size)
    return _MAP(*rows, *keys, function, len(rows), size)


def pair_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    term: Term,
    q_attributes: Tensor,
    k_attributes: Tensor | None = None,
) -> Tensor:
    r"""Log-sum-exp of scaled similarities and a term of each pair, row by row, without a matrix of either.

    .. math::
        \mathrm{LSE}_i = \log \sum_j e^{\mathrm{scale} \cdot \langle q_i, k_j \rangle + t(a_i, b_j)}

    The term is a function of attributes of both rows, such as their positions, labels or ages: a mask where it is -inf,
    a window, a decay with the distance, a weight by its logarithm. It is computed for some rows and all keys at a time:
    memory is linear in n and m. Gradients flow to ``q``, ``k``, ``scale`` and to attributes that require one; a second
    derivative raises. (`streaming_logsumexp` is faster where a bias of each key and ids say it all.)

    Dong et al., "Flex Attention: A Programming Model for Generating Optimized Attention Kernels" (arXiv:2412.05496) has
    such functions in attention.

    Args:
        q: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        k: ``[m, d]``, same dtype and device. None is self-contrast: the keys are ``q`` and j = i is left out.
        scale: the inverse temperature, a number or a tensor of one element (it may require a gradient).
        term: t, of attributes ``[r, ...]`` of some rows and ``[m, ...]`` of all keys, in plain torch: ``[r, m]``, or
            what broadcasts to it; never +inf. Floating attributes come in float32 or float64.
        q_attributes: ``[n, ...]``, of any dtype.
        k_attributes: ``[m, ...]``; with ``k`` only, and then required.

    Returns:
        ``[n]`` float32 (float64 for float64 input); -inf, with zero gradient, where all keys are masked.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value, or the term depends on a tensor that
            requires a gradient and is no attribute.

    Example:
        >>> import torch
        >>> from ccl_fast.ops import pair_logsumexp
        >>> def within_two_steps(i, j):  # of each other
        ...     return torch.where((i[:, None] - j).abs() <= 2, 0.0, -torch.inf)
        >>> pair_logsumexp(torch.randn(8, 16), scale=10.0, term=within_two_steps, q_attributes=torch.arange(8)).shape
        torch.Size([8])
    """
    _check(q, k, scale, term, q_attributes, k_attributes)
    q = in_autocast_dtype(q)
    k = q if (itself := k is None) else k.to(q.dtype)
    numbers = torch.arange(q.shape[0], device=q.device)
    rows = [q, q_attributes, *([numbers] if itself else [])]
    keys = [k, q_attributes if k_attributes is None else k_attributes, scale_tensor(scale, q)]

    def logsumexp(rows: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        logits = rows[0] @ keys[0].T * keys[2] + term(rows[1], keys[1])
        if itself:
            logits = logits.masked_fill(rows[2][:, None] == numbers, -torch.inf)
        return masked_logsumexp(logits)

    return map_row_blocks(logsumexp, rows, keys)


def masked_logsumexp(logits: Tensor) -> Tensor:
    """Log-sum-exp [r] of logits [r, m]; -inf, with zero gradient, where all are -inf."""
    if logits.shape[1] == 0:
        return logits.sum(1) - torch.inf
    largest = logits.detach().amax(1)
    empty = largest == -torch.inf
    largest = largest.masked_fill(empty, 0.0)
    total = (logits - largest[:, None]).exp().sum(1)
    return (total.masked_fill(empty, 1.0).log() + largest).masked_fill(empty, -torch.inf)


def _check(q, k, scale, term, q_attributes, k_attributes) -> None:
    check_matrix("q", q)
    check_floating("q", q)
    if k is not None:
        check_matrix("k", k, columns=q.shape[1])
        check_same("k", k, "q", q)
    check_scale("scale", scale)
    if not callable(term):
        raise ArgumentError(f"term: expected a function of attributes, got {type(term).__name__}")
    if (k_attributes is None) != (k is None):
        raise ArgumentError("k_attributes: expected attributes [m, ...] exactly when k is given")
    for name, x, of in (("q_attributes", q_attributes, q), ("k_attributes", k_attributes, k)):
        if of is not None:
            check_tensor(name, x)
            check_same(name, x, "q", q, dtype=False)
            if x.ndim == 0 or x.shape[0] != of.shape[0]:
                raise ArgumentError(f"{name}: expected {of.shape[0]} rows, got shape {list(x.shape)}")


# ---- forward and backward ----


def _leaf(x: Tensor, need: bool = False) -> Tensor:
    """Return what the function is given, apart from all that was before."""
    x = x.detach()
    return x.to(accumulation_dtype(x)).requires_grad_(need) if x.is_floating_point() else x


def _blocks(n: int, size: int) -> list[slice]:
    return list(blocks_of(n, size)) or [slice(0, 0)]


def _forward(*inputs) -> Tensor:
    *tensors, function, count, size = inputs
    rows, keys = tensors[:count], [_leaf(x) for x in tensors[count:]]
    n, device, result = rows[0].shape[0], rows[0].device, None
    with without_autocast(device):
        for block in _blocks(n, size):
            some = [_leaf(x[block]) for x in rows]
            with torch.enable_grad():
                value = function(some, keys)
            _check_rows_of(value, some[0].shape[0])
            if value.requires_grad:
                raise ArgumentError(
                    "function: expected one of the tensors that it is given alone, got one that depends on another "
                    "that requires a gradient, which would be lost (give it as an attribute, or detach it)"
                )
            if result is None:
                # Small results between large arrays that are freed would keep memory in pieces.
                result = value.new_empty(n, *value.shape[1:])
            result[block] = value
    assert result is not None
    return result


def _check_rows_of(value, count: int) -> None:
    """Check that there is one of each row: what has none of its own would be spread over all."""
    if not isinstance(value, Tensor) or value.ndim == 0 or value.shape[0] != count:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ArgumentError(f"function: expected a tensor with a row for each of {count} rows, got {got}")


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.function, ctx.count, ctx.size = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx, grad: Tensor):
    tensors = ctx.saved_tensors
    needs = [need and x.is_floating_point() for need, x in zip(ctx.needs_input_grad, tensors, strict=False)]
    arguments = grad, *tensors, ctx.function, ctx.count, ctx.size, needs
    wanted = iter(_GRADIENT(*arguments) if torch.is_grad_enabled() else _backward(*arguments))
    return (*(next(wanted) if need else None for need in needs), None, None, None)


def _backward(*inputs) -> tuple[Tensor, ...]:
    """Gradients of the tensors that need one."""
    grad, *tensors, function, count, size, needs = inputs
    n, device = tensors[0].shape[0], tensors[0].device
    of_rows, of_keys = needs[:count], needs[count:]
    keys = [_leaf(x, need) for x, need in zip(tensors[count:], of_keys, strict=True)]
    # All at once, as small results between large arrays that are freed would keep memory in pieces.
    given = [x for x, need in zip(tensors, needs, strict=True) if need]
    gradients = [x.new_zeros(x.shape, dtype=accumulation_dtype(x)) for x in given]
    to_rows, to_keys = gradients[: sum(of_rows)], gradients[sum(of_rows) :]
    with without_autocast(device):
        for block in _blocks(n, size):
            rows = [_leaf(x[block], need) for x, need in zip(tensors[:count], of_rows, strict=True)]
            with torch.enable_grad():
                value = function(rows, keys)
            if not value.requires_grad:
                continue
            wanted = [x for x in (*rows, *keys) if x.requires_grad]
            found = torch.autograd.grad(value, wanted, grad[block], allow_unused=True, materialize_grads=True)
            for total, part in zip(to_rows, found, strict=False):
                total[block] = part
            for total, part in zip(to_keys, found[len(to_rows) :], strict=True):
                total.add_(part)
    return tuple(total.to(x.dtype) for total, x in zip(gradients, given, strict=True))


def _save_nothing(ctx, inputs, output) -> None:
    pass


# No operators of torch.library: those take no functions.
_MAP = Differentiable("map_row_blocks", _forward, _save, _gradients)
_REFUSE = refuse_double_backward("map_row_blocks, pair_logsumexp")
_GRADIENT = Differentiable("map_row_blocks_backward", _backward, _save_nothing, _REFUSE)
