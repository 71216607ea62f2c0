"""When an exponential needs no shift: a bound on every logit, from O((n + m) d) work."""

import torch
from torch import Tensor

from ccl_fast.ops.precision import accumulation_dtype

# With |s| <= 55 every exp(s) and every sum of up to 1e9 of them is a normal float32 number, and so is a
# gradient of 1/n divided by such a sum for n up to a million. The maximum need not be subtracted then, and
# because exp(s_ij) = exp(s_ji) for self-contrast, one exponential serves both directions. Unit vectors are
# inside for temperatures of 0.0182 and above.
UNSHIFTED_LIMIT = 55.0
MAX_SCALED = 1e30


def logits_are_bounded(
    q: Tensor, k: Tensor | None, scale: Tensor, key_bias: Tensor | None, limit: float = UNSHIFTED_LIMIT
) -> Tensor:
    """Tell whether |scale <q_i, k_j> + key_bias_j| <= limit for all i, j, and scale q_i is far from overflow.

    A key bias of -inf is allowed. Returns a bool tensor of no dimensions on the device of ``q``: no host copy.
    Not-a-number gives False.
    """
    q_norm = _largest_norm(q)
    scaled = scale.abs() * q_norm
    bound = scaled * (q_norm if k is None else _largest_norm(k))
    if key_bias is not None and key_bias.numel():
        bound = bound + key_bias.masked_fill(key_bias == -torch.inf, 0.0).abs().amax()
    # The scale may be multiplied into q before the product with k: that must not overflow where k is tiny.
    return (bound <= limit) & (scaled <= MAX_SCALED)


def bounded_on_cpu(q: Tensor, k: Tensor | None, scale: Tensor, key_bias: Tensor | None) -> Tensor:
    """The same on a CPU, where a branch on a value is free; on a GPU it would stall the queue, and it is False."""
    if q.device.type == "cpu":
        return logits_are_bounded(q, k, scale, key_bias)
    return scale.new_zeros((), dtype=torch.bool)


def _largest_norm(x: Tensor) -> Tensor:
    dtype = accumulation_dtype(x)
    if x.shape[0] == 0:
        return torch.zeros((), dtype=dtype, device=x.device)
    return torch.linalg.vector_norm(x, dim=1, dtype=dtype).amax()
