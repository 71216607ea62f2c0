"""The streaming log-sum-exp: its contract, its gradient, its registration with torch, its backends."""

import functools
from typing import Literal, overload

import torch
from torch import Tensor

from ccl_fast.checks import Candidates, check_candidates, check_flag, check_logits
from ccl_fast.errors import ArgumentError
from ccl_fast.ops.backends import BACKENDS, ContrastBackend, choose_backend
from ccl_fast.ops.differentiable import USE_REFERENCE, Differentiable, GradientOperator, is_traced
from ccl_fast.ops.ids import int32_ids
from ccl_fast.ops.logsumexp.bound import bounded_on_cpu
from ccl_fast.ops.logsumexp.reference import logsumexp_by_relation, mutual_by_relation
from ccl_fast.ops.precision import accumulation_dtype, in_autocast_dtype, scale_tensor, without_autocast


@overload
def streaming_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    key_bias: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
    return_same: Literal[False] = False,
    backend: ContrastBackend = "auto",
) -> Tensor: ...


@overload
def streaming_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    key_bias: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
    return_same: Literal[True],
    backend: ContrastBackend = "auto",
) -> tuple[Tensor, Tensor]: ...


def streaming_logsumexp(
    q: Tensor,
    k: Tensor | None = None,
    *,
    scale: float | Tensor,
    key_bias: Tensor | None = None,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: Candidates = "all",
    return_same: bool = False,
    backend: ContrastBackend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Log-sum-exp of scaled similarities, row by row, without the matrix of similarities.

    .. math::
        \mathrm{LSE}_i = \log \sum_{j \in A(i)} e^{s_{ij}}, \qquad
        s_{ij} = \mathrm{scale} \cdot \langle q_i, k_j \rangle + \mathrm{bias}_j

    Memory is linear in n and m, forward and backward. Gradients flow to ``q``, ``k``, ``scale`` and
    ``key_bias``; a second derivative raises (only ``backend="reference"`` has one).

    Args:
        q: ``[n, d]``, float64, float32, bfloat16 or float16. Under autocast it is cast to autocast's dtype.
        k: ``[m, d]``, same dtype and device. None is self-contrast: the keys are ``q`` and j = i is left out.
        scale: the inverse temperature, a number or a tensor of one element (it may require a gradient).
        key_bias: ``[m]``, added to the logits of a key; -inf removes the key.
        q_ids: ``[n]``, integers: the cluster (or class, or tower) of each row.
        k_ids: ``[m]``, integers; with ``k`` only.
        candidates: A(i). "all" keys, those of an "other_id" than the row's, or those of the "same_id".
        return_same: return also the log-sum-exp over the keys of the same id, from the same pass.
        backend: "auto", "triton" (CUDA), "blocked" (plain torch, any device) or "reference" (dense).

    Returns:
        ``[n]`` float32 (float64 for float64 input); -inf, with zero gradient, where A(i) is empty. With
        ``return_same`` a pair: this, and the log-sum-exp over the same id.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    _check(q, k, scale, key_bias, q_ids, k_ids, candidates, return_same)
    q = in_autocast_dtype(q)
    k = None if k is None else k.to(q.dtype)
    chosen_backend = choose_backend("streaming_logsumexp", backend, q.device, q.dtype)
    scale = scale_tensor(scale, q)
    if key_bias is not None:
        key_bias = key_bias.to(scale.dtype)

    q_ids, k_ids = _compared(q_ids, k_ids, chosen_backend)
    want_same = return_same or (q_ids is not None and candidates != "other_id")
    want_other = candidates != "same_id"
    if chosen_backend == "reference":
        same, other = logsumexp_by_relation(q, k, scale, key_bias, q_ids, k_ids)
    else:
        wanted = (want_same, want_other, False)
        same, other, _bounded = _LOGSUMEXP(q, k, scale, key_bias, q_ids, k_ids, *wanted, chosen_backend)
    if q_ids is None:
        return other
    chosen = {"all": lambda: logaddexp(same, other), "other_id": lambda: other, "same_id": lambda: same}
    result = chosen[candidates]()
    return (result, same) if return_same else result


def mutual_logsumexp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | Tensor,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    candidates: str = "all",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""`streaming_logsumexp` of two sets of rows that contrast with each other, in both directions by one pass.

    .. math::
        \mathrm{LSE}_i = \log \sum_{j \in A(i)} e^{s_{ij}}, \qquad
        \mathrm{LSE}_j = \log \sum_{i:\ j \in A(i)} e^{s_{ij}}

    Args:
        q: ``[n, d]``.
        k: ``[m, d]``.
        scale, q_ids, k_ids, candidates, backend: as in `streaming_logsumexp`.

    Returns:
        Those of the rows of q over the rows of k, ``[n]``, and those of the rows of k over the rows of q, ``[m]``.

    Raises:
        ValueError: an argument has the wrong shape, dtype, device or value; the backend cannot run here.
    """
    found = both_logsumexps(q, k, scale=scale, q_ids=q_ids, k_ids=k_ids, candidates=candidates, backend=backend)
    of_q, of_k = found.split((q.shape[0], k.shape[0]))
    return of_q, of_k


def both_logsumexps(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    candidates: str,
    backend: str,
) -> Tensor:
    """`mutual_logsumexp` as one tensor, [n + m]."""
    _check(q, k, scale, None, q_ids, k_ids, candidates, False)
    q = in_autocast_dtype(q)
    k = k.to(q.dtype)
    backend = choose_backend("streaming_logsumexp", backend, q.device, q.dtype)
    scale = scale_tensor(scale, q)
    q_ids, k_ids = _compared(q_ids, k_ids, backend)
    want_same, want_other = q_ids is not None and candidates != "other_id", candidates != "same_id"
    if backend == "reference":
        same, other = mutual_by_relation(q, k, scale, q_ids, k_ids)
    else:
        same, other, _bounded = _LOGSUMEXP(q, k, scale, None, q_ids, k_ids, want_same, want_other, True, backend)
    return other if not want_same else same if not want_other else logaddexp(same, other)


def _compared(q_ids: Tensor | None, k_ids: Tensor | None, backend: str) -> tuple[Tensor | None, Tensor | None]:
    """The ids as kernels compare them, forward and backward."""
    return int32_ids(q_ids, k_ids) if backend == "triton" else (q_ids, k_ids)


def softmax_sums(
    q: Tensor,
    k: Tensor,
    logsumexp: Tensor,
    weights: Tensor,
    *,
    scale: float | Tensor,
    key_bias: Tensor,
    of: Literal["keys", "queries"],
    backend: ContrastBackend,
) -> Tensor:
    r"""Weighted sums by the softmax whose logarithm's denominator is known: no forward pass.

    .. math::
        \text{keys:}\quad w_i \sum_j p_{ij} k_j, \qquad \text{queries:}\quad \sum_i w_i p_{ij} q_i, \qquad
        p_{ij} = e^{s_{ij} - \mathrm{LSE}_i}

    They are the gradients of :math:`\sum_i w_i \mathrm{LSE}_i / \mathrm{scale}` with respect to q and k. Linear memory;
    checks nothing.

    Args:
        q, k, scale, key_bias, backend: as in `streaming_logsumexp`; autocast is without effect.
        logsumexp: its result ``[n]``, over all keys.
        weights: w ``[n]``, of the dtype of ``logsumexp``.
        of: what is summed: "keys" for every query or "queries" for every key.

    Returns:
        ``[n, d]`` or ``[m, d]``, float32 (float64 for float64 input).
    """
    chosen = choose_backend("streaming_logsumexp", backend, q.device, q.dtype)
    scale = scale_tensor(scale, q)
    if chosen == "reference":
        with without_autocast(q.device):
            p = (scale * (q @ k.T).to(scale.dtype) + key_bias - logsumexp[:, None]).exp() * weights[:, None]
            return p @ k.to(p.dtype) if of == "keys" else p.T @ q.to(p.dtype)
    bounded = bounded_on_cpu(q, k, scale, key_bias)
    none = logsumexp.new_empty(0)
    needs = [of == "keys", of == "queries", False, False]
    known = (none, logsumexp, bounded, none, weights)
    sums = _GRADIENT(q, k, scale, key_bias, None, None, *known, needs, False, chosen)
    return sums[0 if of == "keys" else 1].to(scale.dtype) / scale


def logaddexp(*terms: Tensor) -> Tensor:
    r"""Return :math:`\log \sum_t e^{x_t}` of sums that may be empty (-inf): no derivative of any order is NaN there.

    Args:
        terms: two or more, of one shape and dtype.

    Returns:
        Of their shape.
    """
    # An exported program keeps the operations, and not the gradient that a Function brings.
    return functools.reduce(_traced_logaddexp, terms) if is_traced(terms[0]) else _LOG_OF_SUM(*terms)


def _traced_logaddexp(a: Tensor, b: Tensor) -> Tensor:
    a_empty, b_empty = a == -torch.inf, b == -torch.inf
    both = torch.logaddexp(a.masked_fill(a_empty, 0.0), b.masked_fill(b_empty, 0.0))
    return torch.where(a_empty, b, torch.where(b_empty, a, both))


def _log_of_sum(*terms: Tensor) -> Tensor:
    return functools.reduce(torch.logaddexp, terms)


def _save_terms(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output)


def _gradients_of_terms(ctx, grad: Tensor) -> tuple[Tensor, ...]:
    *terms, total = ctx.saved_tensors
    return ((torch.stack(terms) - total.masked_fill(total == -torch.inf, 0.0)).exp() * grad).unbind()


# The gradient of torch's own is NaN where terms are -inf.
_LOG_OF_SUM = Differentiable("logaddexp", _log_of_sum, _save_terms, _gradients_of_terms)


def cross_entropy(rest: Tensor, positive: Tensor) -> Tensor:
    r"""-log of a positive's softmax, given its logit and the log-sum-exp over all the rest.

    .. math::
        \log (1 + e^{\mathrm{rest} - \mathrm{positive}})

    Never below 0, and exact to rounding, with its gradient, also where the positive outweighs the rest by so much that
    the log-sum-exp over all is the positive's logit to rounding. The rest may be empty (-inf).
    """
    return log_of_one_more(rest - positive)


def log_of_one_more(x: Tensor) -> Tensor:
    """Return log(1 + e^x)."""
    # Up to the threshold the exponential is a float32 number; above it the result is x to rounding, also in float64.
    return torch.nn.functional.softplus(x, threshold=40.0)


def _check(q, k, scale, key_bias, q_ids, k_ids, candidates, return_same) -> None:
    check_candidates(q, k, q_ids, k_ids, candidates)
    check_logits(q, k, scale, key_bias)
    check_flag("return_same", return_same)
    if q_ids is None and return_same:
        raise ArgumentError("q_ids: expected integers [n] for return_same, got None")


# ---- one operator forward, one backward: two opaque nodes for what traces them ----


def _forward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    key_bias: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    want_same: bool,
    want_other: bool,
    mutual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps over the same id and over the others, and what `logit_bound` told (False if not asked).

    ``mutual``: also those of the keys over the rows, after those of the rows.
    """
    module = BACKENDS["streaming_logsumexp"][backend].module
    with without_autocast(q.device):
        if mutual:
            of_q, of_k = module.mutual_forward(q, k, scale, q_ids, k_ids, want_same, want_other)
            (same, more_same), (other, more_other) = zip(of_q, of_k, strict=True)
            same = torch.cat((same, more_same)) if want_same else same
            other = torch.cat((other, more_other)) if want_other else other
            return same, other, scale.new_zeros((), dtype=torch.bool)
        return module.forward(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other)


def _empty(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other, mutual, backend):
    n, dtype = q.shape[0] + (k.shape[0] if mutual else 0), accumulation_dtype(q)
    sizes = n if want_same else 0, n if want_other else 0
    return *(q.new_empty(size, dtype=dtype) for size in sizes), q.new_empty((), dtype=torch.bool)


def _backward(
    q: Tensor,
    k: Tensor | None,
    scale: Tensor,
    key_bias: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    same: Tensor,
    other: Tensor,
    bounded: Tensor,
    grad_same: Tensor,
    grad_other: Tensor,
    needs: list[bool],
    mutual: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module = BACKENDS["streaming_logsumexp"][backend].module
    with without_autocast(q.device):
        if mutual:
            assert k is not None
            sizes, numbers = (q.shape[0], k.shape[0]), (same, other, grad_same, grad_other)
            of_q, of_k = zip(*(x.split(sizes) if x.shape[0] else (x, x) for x in numbers), strict=True)
            grads = *module.mutual_gradients(q, k, scale, q_ids, k_ids, of_q, of_k, needs[:3]), None
            grads = [g if need else None for g, need in zip(grads, needs, strict=True)]
        else:
            numbers = (same, other, bounded, grad_same, grad_other)
            grads = module.backward(q, k, scale, key_bias, q_ids, k_ids, *numbers, needs)
    # Row-major whatever the strides of the inputs, as the fake promises to the compiler.
    to_q, to_k, to_scale, to_bias = (q.new_empty(0) if g is None else g.contiguous() for g in grads)
    return to_q, to_k, to_scale, to_bias


def _empty_gradients(
    q, k, scale, key_bias, q_ids, k_ids, same, other, bounded, grad_same, grad_other, needs, mutual, backend
):
    inputs = (q, k, scale, key_bias)
    shapes = [(x.shape, x.dtype) if n else ((0,), q.dtype) for x, n in zip(inputs, needs, strict=True)]
    return tuple(q.new_empty(shape, dtype=dtype) for shape, dtype in shapes)


def _save(ctx, inputs, output) -> None:
    *tensors, want_same, want_other, ctx.mutual, ctx.backend = inputs
    ctx.wanted = want_same, want_other
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[-1])
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx, *grads: Tensor | None):
    needs, saved = list(ctx.needs_input_grad[:4]), ctx.saved_tensors
    # What is not wanted is empty, and so is its gradient.
    given = (
        grad if grad is not None else torch.zeros_like(x) if want else x
        for grad, x, want in zip(grads[:2], saved[-3:-1], ctx.wanted, strict=True)
    )
    grads = _GRADIENT(*saved, *given, needs, ctx.mutual, ctx.backend)
    return (*(g if n else None for g, n in zip(grads, needs, strict=True)), *[None] * 6)


_LOGSUMEXP = Differentiable("streaming_logsumexp", _forward, _save, _gradients, _empty)
_GRADIENT = GradientOperator(
    "streaming_logsumexp_backward",
    _backward,
    _empty_gradients,
    of="streaming_logsumexp",
    instead=USE_REFERENCE,
)
