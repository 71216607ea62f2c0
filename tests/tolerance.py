"""The one tolerance rule: measured against float64, at most twice the error of plain torch in the same dtype."""

import torch
from torch import Tensor

# Of a process's peak memory: what the oldest torch that is supported takes more for the same.
OF_TORCH_2_11 = 8 * 2**20 if torch.__version__.startswith("2.11.") else 0
# What a result may be off by where plain torch happens to be exact, relative to its magnitude.
FLOOR = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def assert_as_accurate(
    actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, what: str = "", magnitude: float | None = None
) -> None:
    """`actual` may err twice as much as `plain` (the reference run in `dtype`); infinities must agree.

    `magnitude` is the norm of the result, or for a sum that cancels that of its terms.
    """
    actual, exact, plain = (x.detach().double().cpu() for x in (actual, exact, plain))
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    infinite = exact.isinf()
    assert torch.equal(actual[infinite], exact[infinite]), f"{what}: infinities differ"
    assert actual[~infinite].isfinite().all(), f"{what}: not finite where the exact value is"
    actual, exact, plain = actual[~infinite], exact[~infinite], plain[~infinite]
    allowed = 2 * (plain - exact).norm() + FLOOR[dtype] * (exact.norm() if magnitude is None else magnitude) + 1e-30
    error = (actual - exact).norm()
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e} (plain {(plain - exact).norm():.3e})"
