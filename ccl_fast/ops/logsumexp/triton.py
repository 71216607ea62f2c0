"""The streaming log-sum-exp on Triton: which kernels run, over which buffers."""

import contextlib
import copy
import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from ccl_fast.kernels.launch import takes
from ccl_fast.ops.ids import groups_of, groups_of_single_positives, int32_ids
from ccl_fast.ops.logsumexp.bound import logits_are_bounded
from ccl_fast.ops.row_dot import row_dot
from ccl_fast.ops.same_id_similarity import mutual_similarity_gradient, same_group_gradients

# Looked for once: the compiler of torch 2.11 does not follow the search.
IS_INSTALLED = importlib.util.find_spec("triton") is not None
# Below this the time is that of the launches: one kernel that is always right beats two and a flag.
TRIANGLE_MIN_ROWS = 4096
# The weights that the backward writes for a library's matrix product, where D does not fit on chip: at least so many
# bytes, and on a device with more memory this share of it. A strip reads and writes a whole gradient.
STRIP_BYTES = 256 << 20
STRIP_SHARE = 32
_ALIGNMENT = 128
# Elements between two rows: offsets within a tile have 32 bits.
MAX_STRIDE = 1 << 22
# Few rows leave multiprocessors idle: then the keys are divided, into parts of at least so many.
KEYS_OF_A_PART = 1024


class Anchors(NamedTuple):
    """What the kernels read of rows that are anchors: (reference, weight) over the same id and over the others.

    See `kernels.prepare_anchors`; None where not wanted.
    """

    ref_same: Tensor | None = None
    weight_same: Tensor | None = None
    ref_other: Tensor | None = None
    weight_other: Tensor | None = None

    @property
    def wanted(self) -> dict[str, bool]:
        return {"WANT_SAME": self.weight_same is not None, "WANT_OTHER": self.weight_other is not None}


def obstacles(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why these kernels cannot run on a device and dtype; empty if they can."""
    reasons = []
    if not IS_INSTALLED:
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


def forward(
    q, k, scale, key_bias, q_ids, k_ids, want_same, want_other, has_runs=True, bounded=None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exps over the same id and over the others, and whether all logits are bounded.

    Args:
        has_runs: keys of one id may be so many, one after the other, that it pays to look for blocks of them.
        bounded: bool, what `logits_are_bounded` would say, if the host knows it; else None.
    """
    kernels, launch = _kernels()
    is_self = k is None
    n, m = q.shape[0], (q if is_self else k).shape[0]
    # Where the flag is not worth its launches it is down.
    use_flag = is_self and key_bias is None and n >= TRIANGLE_MIN_ROWS
    if not use_flag:
        bounded = scale.new_zeros((), dtype=torch.bool)
    elif bounded is None:
        bounded = logits_are_bounded(q, None, scale, None)
    else:
        bounded = scale.new_full((), bounded, dtype=torch.bool)
    if n == 0:
        return *(q.new_empty(0, dtype=torch.float32) for _ in range(2)), bounded
    q_ids, k_ids = int32_ids(q_ids, k_ids)
    k_ids = q_ids if is_self else k_ids
    q = _aligned(q)
    k = q if is_self else _aligned(k)
    wanted = {"WANT_SAME": want_same, "WANT_OTHER": want_other}
    skip = _skippable(q_ids, k_ids, is_self) if has_runs and not want_same else None
    flag, sums = None, (None, None)
    with on_device_of(q):
        if use_flag and not _deterministic():
            flag = bounded.to(torch.int32)
            sums = [torch.zeros(n if want else 0, dtype=torch.float32, device=q.device) for want in wanted.values()]
            table = launch("forward_triangle", q.dtype, q.shape[1], q_ids is not None, q.device)
            blocks, across = _blocks(n, table.block_n), table.block_m // table.block_n
            chunk = _triangle_chunk(blocks, across, q.device)
            kernels.forward_triangle[(_blocks(n, table.block_m) * _blocks(blocks, chunk),)](
                q, scale, q_ids, skip, *sums, flag, n, q.stride(0), chunk, **wanted, **_tile(table, q),
            )  # fmt: skip
        table = launch("forward_rows", q.dtype, q.shape[1], q_ids is not None, q.device)
        row_blocks = _blocks(n, table.block_m)
        parts = _parts(row_blocks, m, q.device)
        sizes = [parts * n if want else 0 for want in wanted.values()]
        found = [torch.empty(size, dtype=torch.float32, device=q.device) for size in sizes]
        kernels.forward_rows[(row_blocks, parts)](
            q, k, scale, key_bias, q_ids, k_ids, skip, *found, flag, n, m, q.stride(0), k.stride(0),
            IS_SELF=is_self, **wanted, **_tile(table, q),
        )  # fmt: skip
        same, other = (_combined(lse, parts, of_triangle, flag) for lse, of_triangle in zip(found, sums, strict=True))
    return same, other, bounded


def _combined(lse: Tensor, parts: int, sums: Tensor | None, flag: Tensor | None) -> Tensor:
    """Of log-sum-exps over parts of the keys, [parts * n], those over all; of the triangle's sums if the flag is up."""
    n = lse.shape[0] // parts
    if n == 0 or (parts == 1 and flag is None):
        return lse
    result = lse.new_empty(n)
    _kernels()[0].combine_parts[(_blocks(n, 256),)](lse, sums, flag, result, n, parts, BLOCK=256)
    return result


def backward(
    q, k, scale, key_bias, q_ids, k_ids, same, other, bounded, grad_same, grad_other, needs, dtype=None, positives=None,
    has_runs=True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """``dtype``: of the gradients of q and k; that of q if not named. ``has_runs``: as in `forward`.

    ``positives``: gradients of a further number of each row, the sum of its logits with the keys of its id.
    """
    sums = (same, other, bounded, grad_same, grad_other)
    grads = _backward(q, k, scale, key_bias, q_ids, k_ids, *sums, needs, dtype or q.dtype, has_runs)
    if positives is None:
        return grads
    more = same_group_gradients(q, k, *groups_of(q_ids, k_ids), scale, positives, needs)
    return _sum(grads[0], more[0]), _sum(grads[1], more[1]), _sum(grads[2], more[2]), grads[3]


def positives_backward(
    q, k, scale, group, k_group, single, same, other, bounded, grad_same, grad_other, grad_positives, needs
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of `contrast_with_positives`, by two products: where positives are equal but for some per cent they cancel.

    One would need the ids where most batches do without.
    """
    kinds = (group, k_group) if same.numel() else groups_of_single_positives(group, k_group, single)
    sums = (same, other, bounded, grad_same, grad_other)
    grads = _backward(q, k, scale, None, *kinds, *sums, [*needs, False], torch.float32)
    more = same_group_gradients(q, k, group, k_group, scale, grad_positives, needs)
    to_q, to_k, to_scale = (_sum(*both) for both in zip(grads[:3], more, strict=True))
    return None if to_q is None else to_q.to(q.dtype), None if to_k is None else to_k.to(q.dtype), to_scale


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return None if a is None or b is None else a + b.to(a.dtype)


def _backward(
    q, k, scale, key_bias, q_ids, k_ids, same, other, bounded, grad_same, grad_other, needs, dtype, has_runs=True
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    d = q.shape[1]
    q_ids, k_ids = int32_ids(q_ids, k_ids)
    gain = _gain(q, grad_same, grad_other)
    q, k = _aligned(q), None if k is None else _aligned(k)
    on_chip = _fits_on_chip(q, q_ids)
    flag = None
    if on_chip and k is None and key_bias is None and q.shape[0] >= TRIANGLE_MIN_ROWS:
        flag = bounded.to(torch.int32)
    run = _backward_on_chip if on_chip else _backward_in_strips
    with on_device_of(q):
        anchors = _anchors(same, other, grad_same, grad_other, gain, flag)
        grad_q, grad_k, grad_scale, grad_bias = run(
            q, k, scale, _divided(scale, gain), key_bias, q_ids, k_ids, anchors, flag, needs, dtype, has_runs=has_runs
        )
    grad_q, grad_k = (None if g is None else _first_columns(g, d) for g in (grad_q, grad_k))
    return grad_q, grad_k, _divided(grad_scale, gain), _divided(grad_bias, gain)


def mutual_forward(
    q, k, scale, q_ids, k_ids, want_same, want_other
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exps over the same id and the others: of the rows of q over those of k, and of those of k over q."""
    return (
        forward(q, k, scale, None, q_ids, k_ids, want_same, want_other)[:2],
        forward(k, q, scale, None, k_ids, q_ids, want_same, want_other)[:2],
    )


def mutual_gradients(
    q, k, scale, q_ids, k_ids, of_q, of_k, needs, dtype=None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of two blocks of rows that are anchors of each other, and of nothing else: the gradients of q, k and the scale.

    ``of_q``, ``of_k``: (same, other, grad_same, grad_other).
    """
    if not (len(q) and len(k)):
        return torch.zeros_like(q, dtype=dtype), torch.zeros_like(k, dtype=dtype), scale.new_zeros(())
    need_q, need_k, need_scale = needs
    dtype, pair = dtype or q.dtype, _Pair(q, k, scale, q_ids, k_ids, of_q, of_k)
    grad_q, to_scale = pair.gradients(need_scale) if need_q or need_scale else (None, None)
    grad_k, more = pair.swapped().gradients(need_scale) if need_k or need_scale else (None, None)
    if to_scale is not None and more is not None:
        to_scale = to_scale + more
    return None if grad_q is None else grad_q.to(dtype), None if grad_k is None else grad_k.to(dtype), to_scale


def mutual_backward(q, k, scale, q_ids, k_ids, of_q, of_k, positives=None) -> tuple[Tensor, Tensor]:
    """Of two blocks of rows that are anchors of each other: gradients of q, and of half the scale.

    That of q is from its own sums and from those of k, in accumulation precision; of the products' share of the
    gradient of the scale it is half: the other half is k's.

    ``of_q``, ``of_k``: (same, other, grad_same, grad_other), with the log-sum-exps over all blocks.
    ``positives``: those of `backward`, of q and of k.
    """
    grad, to_scale = _Pair(q, k, scale, q_ids, k_ids, of_q, of_k).gradients(True)
    assert to_scale is not None
    if positives is None:
        return grad, to_scale
    more = mutual_similarity_gradient(q, q_ids, positives[0], k, k_ids, positives[1])
    return grad + more * scale, to_scale + row_dot(more, q).sum() / 2


class _Pair:
    """Two blocks of rows that are anchors of each other, as the kernels read them."""

    def __init__(self, q, k, scale, q_ids, k_ids, of_q, of_k):
        self.d = q.shape[1]
        self.ids = int32_ids(q_ids, k_ids)
        self.gain = _gain(q, *of_q[2:], *of_k[2:])
        self.on_chip, self.flag = _fits_on_chip(q, self.ids[0]), None
        if self.on_chip and min(q.shape[0], k.shape[0]) >= TRIANGLE_MIN_ROWS:
            self.flag = logits_are_bounded(q, k, scale, None).to(torch.int32)
        self.rows = _aligned(q), _aligned(k)
        self.scales = scale, _divided(scale, self.gain)
        with on_device_of(q):
            self.anchors = tuple(_anchors(*of, gain=self.gain, flag=self.flag) for of in (of_q, of_k))

    def swapped(self) -> "_Pair":
        other = copy.copy(self)
        other.rows, other.ids, other.anchors = self.rows[::-1], self.ids[::-1], self.anchors[::-1]
        return other

    def gradients(self, need_scale: bool) -> tuple[Tensor, Tensor | None]:
        """Of the first block's rows, in float32, and its half of the scale's."""
        (q, k), (q_ids, k_ids), (anchors, k_anchors) = self.rows, self.ids, self.anchors
        scale, out_scale = self.scales
        with on_device_of(q):
            if self.on_chip:
                grad, to_scale, _ = _backward_pass(
                    q, k, q_ids, k_ids, scale, out_scale, None, anchors, k_anchors,
                    False, True, need_scale, False, torch.float32, self.flag,
                )  # fmt: skip
                to_scale = None if to_scale is None else to_scale.sum() / 2
            else:
                grad, _, to_scale, _ = _backward_in_strips(
                    q, k, scale, out_scale, None, q_ids, k_ids, anchors, None,
                    (True, False, need_scale, False), torch.float32, k_anchors,
                )  # fmt: skip
        assert grad is not None
        return _first_columns(grad, self.d), _divided(to_scale, self.gain)


def _anchors(same, other, grad_same, grad_other, gain, flag) -> Anchors:
    kernels, found = _kernels()[0], []
    for lse, grad in ((same, grad_same), (other, grad_other)):
        n = lse.numel()
        if n == 0:
            found += [None, None]
            continue
        grad = (grad if isinstance(gain, float) else grad * gain).contiguous()
        reference, weight = torch.empty_like(lse), torch.empty_like(lse)
        kernels.prepare_anchors[(_blocks(n, 256),)](lse, grad, flag, reference, weight, n, BLOCK=256)
        found += [reference, weight]
    return Anchors(*found)


def _gain(q: Tensor, *grads: Tensor) -> Tensor | float:
    """What gradients are multiplied by on their way in, and divided by on their way out."""
    if q.dtype != torch.float16 or not q.shape[0]:
        return 1.0
    # A weight of the size of 1/n^2 would vanish in float16: the gradients are raised to 2^14 at most, and back.
    largest = torch.cat(grads).abs().amax()
    return torch.where(largest > 0, 2.0**14 / largest.clamp(min=1e-30), 1.0)


def _divided(x: Tensor | None, gain: Tensor | float) -> Tensor | None:
    return x if x is None or isinstance(gain, float) else x / gain


def _fits_on_chip(q: Tensor, q_ids: Tensor | None) -> bool:
    return takes("backward_rows", q.dtype, q.shape[1], q_ids is not None, q.device)


def _backward_on_chip(q, k, scale, out_scale, key_bias, q_ids, k_ids, anchors, flag, needs, dtype, has_runs=True):
    """A pass for each operand, as anchors and as keys; one for both roles of self-contrast without a key bias."""
    need_q, need_k, need_scale, need_bias = needs
    is_self = k is None
    shared = (scale, out_scale, key_bias)
    if is_self and key_bias is None:
        grad, to_scale, _ = _backward_pass(
            q, q, q_ids, q_ids, *shared, anchors, anchors, True, need_q, need_scale, False, dtype, flag, has_runs
        )
        return grad, None, None if to_scale is None else to_scale.sum() / 2, None
    need_k = need_q if is_self else need_k
    k, k_ids = (q, q_ids) if is_self else (k, k_ids)
    grad_q = grad_k = to_scale = grad_bias = None
    if need_q or need_scale:
        grad_q, to_scale, _ = _backward_pass(
            q, k, q_ids, k_ids, *shared, anchors, None, is_self, need_q, need_scale, False, dtype, None, has_runs
        )
    if need_k or need_bias:
        grad_k, _, grad_bias = _backward_pass(
            k, q, k_ids, q_ids, *shared, None, anchors, is_self, need_k, False, need_bias, dtype, None, has_runs
        )
    if is_self and grad_q is not None and grad_k is not None:
        grad_q, grad_k = grad_q + grad_k, None
    return grad_q, grad_k, None if to_scale is None else to_scale.sum(), grad_bias


def _backward_pass(
    a, b, a_ids, b_ids, scale, out_scale, key_bias, a_anchors, b_anchors, is_self,
    need_out, need_scale, need_bias, dtype, flag=None, has_runs=True,
):  # fmt: skip
    """Rows of a against all of b: gradient of a, and per row the shares of the gradients of scale and of the bias.

    ``a_anchors``, ``b_anchors``: None if these rows are no anchors, but keys alone.
    """
    kernels, launch = _kernels()
    n, d = a.shape
    table = launch("backward_rows", a.dtype, d, a_ids is not None, a.device)
    row_blocks = _blocks(n, table.block_m)
    parts = _parts(row_blocks, b.shape[0], a.device)
    like = {"device": a.device, "dtype": torch.float32}
    out = (
        torch.empty((parts, n, d), device=a.device, dtype=dtype if parts == 1 else torch.float32) if need_out else None
    )
    to_scale = torch.empty((parts, n), **like) if need_scale else None
    to_bias = torch.empty((parts, n), **like) if need_bias else None
    wanted = (a_anchors or b_anchors).wanted
    skip = _skippable(a_ids, b_ids, is_self) if has_runs and not wanted["WANT_SAME"] else None
    if n:
        for run_if_bounded in (False,) if flag is None else (False, True):
            kernels.backward_rows[(row_blocks, parts)](
                a, b, scale, out_scale, key_bias, a_ids, b_ids, skip, *(a_anchors or Anchors()),
                *(b_anchors or Anchors()), out, to_scale, to_bias, flag, n, b.shape[0], a.stride(0), b.stride(0), d,
                IS_SELF=is_self, ROW_ANCHORS=a_anchors is not None, COL_ANCHORS=b_anchors is not None,
                RUN_IF_BOUNDED=run_if_bounded, **wanted, **_tile(table, a),
            )  # fmt: skip
    out, to_scale, to_bias = (x if x is None else x[0] if parts == 1 else x.sum(0) for x in (out, to_scale, to_bias))
    return None if out is None else out.to(dtype), to_scale, to_bias


def _backward_in_strips(
    q, k, scale, out_scale, key_bias, q_ids, k_ids, anchors, _flag, needs, dtype, k_anchors=None, has_runs=True
):  # fmt: skip
    """Strips of weights in a bounded workspace, multiplied by a library; of self-contrast the upper triangle only.

    ``k_anchors``: of keys that are anchors too.
    """
    kernels, launch = _kernels()
    need_q, need_k, need_scale, need_bias = needs
    is_self = k is None
    symmetric = is_self and key_bias is None
    mutual = symmetric or k_anchors is not None
    k, k_ids = (q, q_ids) if is_self else (k, k_ids)
    k_anchors = anchors if symmetric else k_anchors or Anchors()
    (n, d), m = q.shape, k.shape[0]
    to_q = torch.zeros((n, d), dtype=torch.float32, device=q.device) if need_q or need_scale else None
    to_k = None
    if need_k or (is_self and need_q and not symmetric):
        to_k = torch.zeros((m, d), dtype=torch.float32, device=q.device)
    grad_bias = torch.zeros(m, dtype=torch.float32, device=q.device) if need_bias else None
    table = launch("backward_weights", q.dtype, d, q_ids is not None, q.device)
    skip = _skippable(q_ids, k_ids, is_self) if has_runs and not anchors.wanted["WANT_SAME"] else None
    rows = strip_rows(n, m, q.element_size(), _memory(q.device))
    workspace = torch.empty(rows, _row_stride(m), dtype=q.dtype, device=q.device)
    for start in range(0, n if m else 0, max(rows, 1)):
        stop, first = min(start + rows, n), start if symmetric else 0
        stride = _row_stride(m - first)
        weights = workspace
        if (stop - start, stride) != workspace.shape:
            weights = workspace.view(-1)[: (stop - start) * stride].view(stop - start, stride)
        weights = _first_columns(weights, m - first)
        kernels.backward_weights[(_blocks(m - first, table.block_n), _blocks(stop - start, table.block_m))](
            q, k, scale, key_bias, q_ids, k_ids, skip, *anchors, *k_anchors, weights, n, m, start, first, stop,
            q.stride(0), k.stride(0), stride, IS_SELF=is_self, COL_ANCHORS=mutual, **anchors.wanted, **_tile(table, q),
        )  # fmt: skip
        if to_q is not None:
            is_whole = stop - start == n
            _add_product(to_q if is_whole else to_q[start:stop], weights, k if first == 0 else k[first:])
            if symmetric and stop < n:
                _add_product(to_q[stop:], weights[:, stop - start :].T, q[start:stop])
        if to_k is not None:
            _add_product(to_k, weights.T, q[start:stop])
        if grad_bias is not None:
            grad_bias += weights.sum(0, dtype=torch.float32)
    grad_q = grad_k = grad_scale = None
    if to_q is not None:
        if need_scale:
            grad_scale = row_dot(to_q, q).sum() / (2 if mutual else 1)
        if is_self and to_k is not None:
            to_q += to_k
        if need_q:
            grad_q = (to_q * out_scale).to(dtype)
    if to_k is not None and need_k:
        grad_k = (to_k * out_scale).to(dtype)
    return grad_q, grad_k, grad_scale, grad_bias


def _first_columns(x: Tensor, number: int) -> Tensor:
    return x if x.shape[1] == number else x[:, :number]


def strip_rows(n: int, m: int, element_size: int, memory: int) -> int:
    """Rows of a strip of weights [rows, m] on a device with so much memory: a multiple of 128, or all n."""
    limit = max(STRIP_BYTES, memory // STRIP_SHARE)
    rows = limit // max(1, _row_stride(m) * element_size) // _ALIGNMENT * _ALIGNMENT
    return min(max(rows, _ALIGNMENT), n)


def _row_stride(m: int) -> int:
    """Of the weights: with an odd one the library's products are slow."""
    return _blocks(m, 8) * 8


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a b with a float32 result also of half-precision operands."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif a.is_cuda:
        # In place: the sum is the product's own, not a second pass over out.
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float())


def _aligned(x: Tensor) -> Tensor:
    """The same rows, contiguous and 16 elements or a multiple apart; with zeros at the end if D is no such multiple.

    Wide loads and asynchronous copies need them so.
    """
    missing = -x.shape[1] % 16
    if missing == 0 and x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.stride(0) <= MAX_STRIDE:
        return x
    return torch.nn.functional.pad(x, (0, missing)).contiguous()


def _skippable(q_ids: Tensor | None, k_ids: Tensor | None, is_self: bool) -> Tensor | None:
    """The kernels' ``skip_ptr``, int32 [2, n]: for every row keys [first, last) in a sequence that have its id.

    In self-contrast the row is among them, else they begin with the first key of that id. None where it is not worth
    its launches.
    """
    if q_ids is None or k_ids is None or not len(k_ids) or max(len(q_ids), len(k_ids)) < TRIANGLE_MIN_ROWS:
        return None
    m, index = len(k_ids), torch.arange(len(k_ids), dtype=torch.int32, device=k_ids.device)
    begins = k_ids != k_ids.roll(1)
    begins[0] = True
    first = torch.where(begins, index, 0).cummax(0).values
    last = torch.where(begins.roll(-1), index + 1, m).flip(0).cummin(0).values.flip(0)
    keys = torch.stack((first, last))
    if is_self:
        return keys
    ordered, order = k_ids.sort(stable=True)
    at = order[torch.searchsorted(ordered, q_ids).clamp(max=m - 1)]
    return torch.where(k_ids[at] == q_ids, keys[:, at], 0)


def _tile(table, q: Tensor) -> dict:
    """What every kernel over tiles of q is told when it is compiled."""
    return {
        "D": q.shape[1], "BLOCK_D": table.block_d, "BLOCK_M": table.block_m, "BLOCK_N": table.block_n,
        "PRECISION": _precision(), **table.options,
    }  # fmt: skip


def _kernels():
    """The kernels and their launch table; imported on first use, as they need Triton."""
    from ccl_fast.kernels import streaming_logsumexp
    from ccl_fast.kernels.launch import launch

    return streaming_logsumexp, launch


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _deterministic() -> bool:
    return torch.are_deterministic_algorithms_enabled()


def on_device_of(x: Tensor):
    """Launch on the device of x, whichever is the current one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def _triangle_chunk(blocks: int, across: int, device: torch.device) -> int:
    """Column blocks a program of the triangle takes, a multiple of the `across` of its diagonal.

    Few enough programs to amortise their rows, some waves of them.
    """
    chunk = max(4, blocks * (blocks + 1) // 2 // across // (_processors(device) * 16))
    return _blocks(chunk, across) * across


def _parts(row_blocks: int, keys: int, device: torch.device) -> int:
    """Parts of the keys, each for programs of its own: about two for each multiprocessor, but no tiny parts."""
    return max(1, min(2 * _processors(device) // max(row_blocks, 1), keys // KEYS_OF_A_PART))


def _precision() -> str:
    """Of float32 products, as torch.set_float32_matmul_precision has it (no effect on half precision).

    "highest" is three products of tf32 on tensor cores, which err like a float32 product.
    """
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"
