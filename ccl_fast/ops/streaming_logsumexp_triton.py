"""The streaming log-sum-exp on Triton: which kernels run, over which buffers."""

import contextlib
import importlib.util
import os

import torch
from torch import Tensor

from ccl_fast.ops.ids import consecutive_ids
from ccl_fast.ops.logit_bound import logits_are_bounded
from ccl_fast.ops.row_dot import row_dot

# Below this the time is that of the launches: one kernel that is always right beats two and a flag.
TRIANGLE_MIN_ROWS = 4096
# The weights that the backward writes for a library's matrix product, where D does not fit on chip.
STRIP_BYTES = 256 << 20
_ALIGNMENT = 128


def obstacles(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why these kernels cannot run on a device and dtype; empty if they can."""
    reasons = []
    if importlib.util.find_spec("triton") is None:
        reasons.append("the package triton is not installed")
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        reasons.append(f"no kernel for {dtype}")
    if _interpreted():
        if dtype == torch.bfloat16:
            reasons.append("Triton's interpreter has no bfloat16 arithmetic")
    elif device.type != "cuda":
        reasons.append(f"needs a CUDA device, the tensors are on {device.type} (TRITON_INTERPRET=1 interprets there)")
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("needs compute capability 8.0 or later")
    return reasons


def forward(q, k, scale, key_bias, q_ids, k_ids, want_same, want_other) -> tuple[Tensor, Tensor, Tensor]:
    kernels, launch = _kernels()
    is_self = k is None
    n, d = q.shape
    q_ids, k_ids = _int32_ids(q_ids, k_ids)
    k, k_ids = (q, q_ids) if is_self else (k, k_ids)
    same = q.new_empty(n if want_same else 0, dtype=torch.float32)
    other = q.new_empty(n if want_other else 0, dtype=torch.float32)
    # Where the flag is not worth its launches it is down.
    use_flag = is_self and key_bias is None and n >= TRIANGLE_MIN_ROWS
    bounded = logits_are_bounded(q, None, scale, None) if use_flag else scale.new_zeros((), dtype=torch.bool)
    if n == 0:
        return same, other, bounded
    flag = sums = None
    with _device_of(q):
        if use_flag and not _deterministic():
            flag, sums = bounded.to(torch.int32), (torch.zeros_like(same), torch.zeros_like(other))
            table = launch("forward_triangle", q.dtype, d, q_ids is not None)
            blocks = _blocks(n, table.block_m)
            chunk = _triangle_chunk(blocks, q.device)
            kernels.forward_triangle[(blocks * _blocks(blocks, chunk),)](
                q, scale, q_ids, *sums, flag, n, *q.stride(), chunk,
                WANT_SAME=want_same, WANT_OTHER=want_other,
                D=d, BLOCK_D=table.block_d, BLOCK=table.block_m, PRECISION=_precision(), **table.options,
            )  # fmt: skip
        table = launch("forward_rows", q.dtype, d, q_ids is not None)
        kernels.forward_rows[(_blocks(n, table.block_m),)](
            q, k, scale, key_bias, q_ids, k_ids, same, other, flag, n, k.shape[0], *q.stride(), *k.stride(),
            IS_SELF=is_self, WANT_SAME=want_same, WANT_OTHER=want_other,
            D=d, BLOCK_D=table.block_d, BLOCK_M=table.block_m, BLOCK_N=table.block_n, PRECISION=_precision(),
            **table.options,
        )  # fmt: skip
        if sums is not None:
            same, other = (torch.where(bounded, s.log(), lse) for s, lse in zip(sums, (same, other), strict=True))
    return same, other, bounded


def backward(
    q, k, scale, key_bias, q_ids, k_ids, same, other, bounded, grad_same, grad_other, needs, dtype=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """``dtype``: of the gradients of q and k; that of q if not named."""
    q_ids, k_ids = _int32_ids(q_ids, k_ids)
    anchors, gain = _anchors(q, same, other, grad_same, grad_other)
    flag = bounded.to(torch.int32) if q.shape[0] >= TRIANGLE_MIN_ROWS else None
    on_chip = _kernels()[1]("backward_rows", q.dtype, q.shape[1], q_ids is not None) is not None
    run = _backward_on_chip if on_chip else _backward_in_strips
    with _device_of(q):
        grad_q, grad_k, grad_scale, grad_bias = run(
            q, k, scale, _divided(scale, gain), key_bias, q_ids, k_ids, anchors, flag, needs, dtype or q.dtype
        )
    return grad_q, grad_k, _divided(grad_scale, gain), _divided(grad_bias, gain)


def pair_forward(q, k, scale, q_ids, k_ids, want_same, want_other) -> tuple[tuple[Tensor, Tensor], ...]:
    """Log-sum-exps over the same id and the others: of the rows of q over those of k, and of those of k over q."""
    return (
        forward(q, k, scale, None, q_ids, k_ids, want_same, want_other)[:2],
        forward(k, q, scale, None, k_ids, q_ids, want_same, want_other)[:2],
    )


def pair_backward(q, k, scale, q_ids, k_ids, of_q, of_k) -> tuple[Tensor, Tensor]:
    """Of two blocks of rows that are anchors of each other: the gradient of q, from its own sums and from those of k,
    in accumulation precision, and half the products' share of the gradient of the scale: the other half is k's.

    ``of_q``, ``of_k``: (same, other, grad_same, grad_other), with the log-sum-exps over all blocks.
    """
    q_ids, k_ids = _int32_ids(q_ids, k_ids)
    wide = torch.float32
    # Those of k begin at a multiple of 16, so that they too are loaded several at a time.
    start = _blocks(q.shape[0], 16) * 16
    rows = (torch.nn.functional.pad(x, (0, start - len(x) if len(x) else 0)) for x in of_q)
    anchors, gain = _anchors(q, *(torch.cat(part) for part in zip(rows, of_k, strict=True)))
    with _device_of(q):
        if _kernels()[1]("backward_rows", q.dtype, q.shape[1], q_ids is not None) is None:
            needs = (True, False, True, False)
            grad, _, to_scale, _ = _backward_in_strips(
                q, k, scale, _divided(scale, gain), None, q_ids, k_ids, anchors, None, needs, wide, col_anchor=start
            )
            return grad, _divided(to_scale, gain)
        flag = None
        if min(q.shape[0], k.shape[0]) >= TRIANGLE_MIN_ROWS:
            flag = logits_are_bounded(q, k, scale, None).to(torch.int32)
        grad, to_scale, _ = _backward_pass(
            q, k, q_ids, k_ids, scale, _divided(scale, gain), None, anchors,
            "both", False, True, True, False, wide, flag, start,
        )  # fmt: skip
    return grad, _divided(to_scale.sum() / 2, gain)


def _anchors(q: Tensor, same: Tensor, other: Tensor, grad_same: Tensor, grad_other: Tensor):
    """What the kernels read of the anchors, and what their results have to be divided by."""
    gain = 1.0
    if q.dtype == torch.float16 and q.shape[0]:
        # A weight of the size of 1/n^2 would vanish in float16: the gradients are raised to 2^14 at most, and back.
        largest = torch.cat((grad_same, grad_other)).abs().amax()
        gain = torch.where(largest > 0, 2.0**14 / largest.clamp(min=1e-30), 1.0)
        grad_same, grad_other = grad_same * gain, grad_other * gain
    return (same, other, grad_same.contiguous(), grad_other.contiguous()), gain


def _divided(x: Tensor | None, gain: Tensor | float) -> Tensor | None:
    return x if x is None or isinstance(gain, float) else x / gain


def _backward_on_chip(q, k, scale, out_scale, key_bias, q_ids, k_ids, anchors, flag, needs, dtype):
    """A pass for each operand, as anchors and as keys; one for both roles of self-contrast without a key bias."""
    need_q, need_k, need_scale, need_bias = needs
    is_self = k is None
    shared = (scale, out_scale, key_bias, anchors)
    if is_self and key_bias is None:
        grad, to_scale, _ = _backward_pass(
            q, q, q_ids, q_ids, *shared, "both", True, need_q, need_scale, False, dtype, flag
        )
        return grad, None, to_scale.sum() / 2 if need_scale else None, None
    need_k = need_q if is_self else need_k
    k, k_ids = (q, q_ids) if is_self else (k, k_ids)
    grad_q = grad_k = to_scale = grad_bias = None
    if need_q or need_scale:
        grad_q, to_scale, _ = _backward_pass(
            q, k, q_ids, k_ids, *shared, "rows", is_self, need_q, need_scale, False, dtype
        )
    if need_k or need_bias:
        grad_k, _, grad_bias = _backward_pass(
            k, q, k_ids, q_ids, *shared, "columns", is_self, need_k, False, need_bias, dtype
        )
    if is_self and need_q:
        grad_q, grad_k = grad_q + grad_k, None
    return grad_q, grad_k, to_scale.sum() if need_scale else None, grad_bias


def _backward_pass(
    a, b, a_ids, b_ids, scale, out_scale, key_bias, anchors, roles, is_self,
    need_out, need_scale, need_bias, dtype, flag=None, col_anchor=0,
):  # fmt: skip
    """Rows of a against all of b: gradient of a, and per row the shares of the gradients of scale and of the bias.

    Where both are anchors, but not the same ones, those of b follow those of a in ``anchors``, from ``col_anchor`` on.
    """
    kernels, launch = _kernels()
    n, d = a.shape
    same, other = anchors[:2]
    out = torch.empty((n, d), dtype=dtype, device=a.device) if need_out else None
    to_scale = torch.empty(n, dtype=torch.float32, device=a.device) if need_scale else None
    to_bias = torch.empty(n, dtype=torch.float32, device=a.device) if need_bias else None
    table = launch("backward_rows", a.dtype, d, a_ids is not None)
    if n:
        for run_if_bounded in (False,) if flag is None else (False, True):
            kernels.backward_rows[(_blocks(n, table.block_m),)](
                a, b, scale, out_scale, key_bias, a_ids, b_ids, *anchors, out, to_scale, to_bias, flag,
                n, b.shape[0], col_anchor, *a.stride(), *b.stride(), d,
                IS_SELF=is_self, ROW_ANCHORS=roles != "columns", COL_ANCHORS=roles != "rows",
                RUN_IF_BOUNDED=run_if_bounded, WANT_SAME=same.numel() > 0, WANT_OTHER=other.numel() > 0,
                D=d, BLOCK_D=table.block_d, BLOCK_M=table.block_m, BLOCK_N=table.block_n, PRECISION=_precision(),
                **table.options,
            )  # fmt: skip
    return out, to_scale, to_bias


def _backward_in_strips(
    q, k, scale, out_scale, key_bias, q_ids, k_ids, anchors, _flag, needs, dtype, col_anchor=None
):  # fmt: skip
    """Strips of weights in a bounded workspace, multiplied by a library; of self-contrast the upper triangle only.

    ``col_anchor``: the keys are anchors too, as in `_backward_pass`.
    """
    kernels, launch = _kernels()
    need_q, need_k, need_scale, need_bias = needs
    is_self = k is None
    symmetric = is_self and key_bias is None
    mutual = symmetric or col_anchor is not None
    k, k_ids = (q, q_ids) if is_self else (k, k_ids)
    (n, d), m = q.shape, k.shape[0]
    to_q = torch.zeros((n, d), dtype=torch.float32, device=q.device) if need_q or need_scale else None
    to_k = None
    if need_k or (is_self and need_q and not symmetric):
        to_k = torch.zeros((m, d), dtype=torch.float32, device=q.device)
    grad_bias = torch.zeros(m, dtype=torch.float32, device=q.device) if need_bias else None
    table = launch("backward_weights", q.dtype, d, q_ids is not None)
    rows = STRIP_BYTES // max(1, m * q.element_size()) // _ALIGNMENT * _ALIGNMENT
    rows = min(max(rows, _ALIGNMENT), n)
    workspace = torch.empty(rows * m, dtype=q.dtype, device=q.device)
    for start in range(0, n if m else 0, max(rows, 1)):
        stop, first = min(start + rows, n), start if symmetric else 0
        weights = workspace[: (stop - start) * (m - first)].view(stop - start, m - first)
        kernels.backward_weights[(_blocks(m - first, table.block_n), _blocks(stop - start, table.block_m))](
            q, k, scale, key_bias, q_ids, k_ids, *anchors, weights, n, m, col_anchor or 0, start, first, stop,
            *q.stride(), *k.stride(), m - first,
            IS_SELF=is_self, COL_ANCHORS=mutual,
            WANT_SAME=anchors[0].numel() > 0, WANT_OTHER=anchors[1].numel() > 0,
            D=d, BLOCK_D=table.block_d, BLOCK_M=table.block_m, BLOCK_N=table.block_n, PRECISION=_precision(),
            **table.options,
        )  # fmt: skip
        if to_q is not None:
            _add_product(to_q[start:stop], weights, k[first:])
            if symmetric:
                _add_product(to_q[stop:], weights[:, stop - start :].T, q[start:stop])
        if to_k is not None:
            _add_product(to_k, weights.T, q[start:stop])
        if need_bias:
            grad_bias += weights.sum(0, dtype=torch.float32)
    grad_scale = row_dot(to_q, q).sum() / (2 if mutual else 1) if need_scale else None
    if is_self and to_k is not None:
        to_q += to_k
    grad_q = (to_q * out_scale).to(dtype) if need_q else None
    return grad_q, (to_k * out_scale).to(dtype) if need_k else None, grad_scale, grad_bias


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b with a float32 result also of half-precision operands."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        out += torch.mm(a, b, out_dtype=torch.float32)
    else:
        out.addmm_(a.float(), b.float())


def _kernels():
    """The kernels and their launch table; imported on first use, as they need Triton."""
    from ccl_fast.kernels import streaming_logsumexp
    from ccl_fast.kernels.launch import launch

    return streaming_logsumexp, launch


def _int32_ids(q_ids: Tensor | None, k_ids: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Only equality matters: wide ids are relabelled, as a tile compares 32 bits with fewer registers."""
    if q_ids is None or (q_ids.dtype == torch.int32 and (k_ids is None or k_ids.dtype == torch.int32)):
        return q_ids, k_ids
    if k_ids is None:
        return consecutive_ids(q_ids).int(), None
    ids = consecutive_ids(torch.cat((q_ids, k_ids))).int()
    return ids[: len(q_ids)], ids[len(q_ids) :]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def _device_of(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _triangle_chunk(blocks: int, device: torch.device) -> int:
    """Blocks a program of the triangle takes: few enough programs to amortise their rows, some waves of them."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(4, blocks * (blocks + 1) // 2 // (processors * 16))


def _precision() -> str:
    """Of float32 products, as torch.set_float32_matmul_precision has it (no effect on half precision)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
