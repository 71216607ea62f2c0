"""The product of rows with rows on a CPU."""

import pytest
import torch

from ccl_fast.ops import matmul

ROWS, D = 300, 32
# A factor of other strides than these of a matrix, or of its transpose, is what oneDNN has no fast product for.
WEIGHTS = {
    "rows": lambda: torch.randn(ROWS, D),
    "columns": lambda: torch.randn(D, ROWS).T,
    "a view of two": lambda: torch.randn(ROWS, 2, D)[:, 0],
    "every other column": lambda: torch.randn(ROWS, 2 * D)[:, ::2],
    "some columns of columns": lambda: torch.randn(D, 2 * ROWS)[:, ROWS:].T,
    "one row": lambda: torch.randn(1, D).expand(ROWS, D),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_onednn_gets_weights_without_gaps(weight, monkeypatch):
    given = []

    def linear(x, weight, *options):
        given.append(weight)
        return x @ weight.T

    monkeypatch.setattr(matmul, "_onednn_linear", lambda: linear)
    x, w = torch.randn(100, 2 * D)[:, :D], weight()
    torch.testing.assert_close(matmul.matmul_nt(x, w), x @ w.T)
    (passed,) = given
    assert passed.is_contiguous() or passed.T.is_contiguous()
