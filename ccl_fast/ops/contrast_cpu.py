"""What the CPU extension does with the logits of a tile, in one call: plain torch has some twenty small operations."""

import torch
from torch import Tensor

from ccl_fast.kernels import cpu_extension
from ccl_fast.kernels.extension import address


def serves(logits: Tensor) -> bool:
    """Tell whether the extension takes these logits."""
    return cpu_extension.module is not None and logits.device.type == "cpu" and logits.dtype == torch.float32


def contrast(logits: Tensor, *, shift: int, both: bool, factor: float) -> Tensor:
    """The sum of the losses of logits [n, n] times the factor; the logits become the derivatives of the sum.

    Args:
        logits: within -80 and 80, contiguous.
        shift: the positive of row i is in column i + shift, modulo n. If it is not 0, rows meet rows, and column i is
            no candidate; a derivative is then that by both logits of the pair.
        both: with shift 0, columns are contrasted with rows too.
        factor: of the result alone.
    """
    loss = logits.new_empty(())
    cpu_extension.best().contrast(address(logits), len(logits), shift, both, factor, address(loss))
    return loss


def supervised(logits: Tensor, ids: Tensor, *, center_weight: float, inside: bool, mean: bool) -> tuple[Tensor, float]:
    """The losses of `contrast_tile.self_contrast`, reduced, and what their sum is multiplied by for that.

    The logits [n, m], of rows with each other and with centres 0 to m - n - 1, become the derivatives of the sum.
    """
    (n, m), loss = logits.shape, logits.new_empty(())
    ids, call = ids.contiguous(), cpu_extension.best().supervised
    return loss, call(address(logits), n, m, address(ids), center_weight, inside, mean, address(loss))
