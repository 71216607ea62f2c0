"""What is launched on a GPU, at sizes of a GPU, where there is none: tensors that have a device and a shape but no
numbers, and kernels that note how they are called.

A host that reads a number, for a branch or a size, is an error of such tensors; a GPU would only be slow.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from ccl_fast.kernels import streaming_logsumexp as kernels
from ccl_fast.kernels.launch import ARCHITECTURES, launch_on
from ccl_fast.ops.logsumexp import triton as launcher

MAX_GRID = (2**31 - 1, 65_535, 65_535)
MEMORY = 141 * 10**9
N = 65_536


class Gpu:
    """One with 132 multiprocessors; `launched` has a (kernel, grid, arguments by name) for every launch, `products`
    the operands of every product by the library."""

    def __init__(self, monkeypatch, architecture):
        self.launched, self.products = [], []
        noted = SimpleNamespace(**{name: self.kernel(name) for name in dir(kernels)})
        monkeypatch.setattr(
            launcher,
            "_kernels",
            lambda: (noted, lambda kernel, dtype, d, ids, _: launch_on(architecture, kernel, dtype.itemsize, d, ids)),
        )
        monkeypatch.setattr(
            launcher,
            "takes",
            lambda kernel, dtype, d, ids, _: launch_on(architecture, kernel, dtype.itemsize, d, ids) is not None,
        )
        monkeypatch.setattr(launcher, "on_device_of", lambda x: contextlib.nullcontext())
        monkeypatch.setattr(launcher, "_processors", lambda device: 132)
        monkeypatch.setattr(launcher, "_memory", lambda device: MEMORY)
        monkeypatch.setattr(launcher, "_add_product", lambda *operands: self.products.append(operands))

    def kernel(self, name):
        names = getattr(getattr(kernels, name), "arg_names", ())

        def at(grid):
            return lambda *given, **named: self.launched.append((name, grid, dict(zip(names, given)) | named))  # noqa: B905

        return type("Kernel", (), {"__getitem__": lambda _, grid: at(grid)})()

    def of(self, kernel):
        return [(grid, arguments) for name, grid, arguments in self.launched if name == kernel]


@pytest.fixture
def gpu(request, monkeypatch):
    """Indirectly by its architecture; sm_90 if none is named."""
    with FakeTensorMode():
        yield Gpu(monkeypatch, getattr(request, "param", 90))


def log_sum_exp(n=N, m=None, d=128, ids=False, bias=False, dtype=torch.bfloat16):
    """Forward and backward of all that can be asked for: the gradients of the queries, keys, scale and bias."""

    def rows(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="cuda")

    q, k, keys = rows(n, d, dtype=dtype), None if m is None else rows(m, d, dtype=dtype), m or n
    key_bias = rows(keys) if bias else None
    q_ids, k_ids = (rows(x, dtype=torch.int64) if ids else None for x in (n, keys))
    problem = q, k, rows(), key_bias, q_ids, None if k is None else k_ids
    same, other, bounded = launcher.forward(*problem, False, True)
    gradients = rows(len(same)), rows(len(other))
    return launcher.backward(*problem, same, other, bounded, *gradients, (True, k is not None, True, bias))


PROBLEMS = {
    "self": {},
    "ids": {"ids": True},
    "a few rows": {"n": 1000, "m": N},
    "bias": {"m": 8192, "bias": True},
    "ids, bias": {"m": 8192, "bias": True, "ids": True},
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
# Multiples of 16 or not; on chip backward, and in strips.
widths = pytest.mark.parametrize("d", (100, 128, 256, 770, 1024))


@widths
@every_problem
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
@pytest.mark.parametrize("gpu", ARCHITECTURES, indirect=True)
def test_the_host_reads_no_number_and_every_grid_is_one(problem, d, dtype, gpu):
    gradient, *_ = log_sum_exp(d=d, dtype=dtype, **problem)
    assert gradient.shape == (problem.get("n", N), d) and gradient.dtype == dtype
    assert gpu.of("forward_rows") and (gpu.of("backward_rows") or gpu.of("backward_weights"))
    for name, grid, _ in gpu.launched:
        assert all(0 < size <= limit for size, limit in zip(grid, MAX_GRID, strict=False)), (name, grid)


def test_a_number_that_the_host_reads_is_an_error(gpu, monkeypatch):
    monkeypatch.setattr(launcher, "logits_are_bounded", lambda q, *_: torch.tensor(bool(q.sum() > 0)))
    with pytest.raises(DataDependentOutputException):
        log_sum_exp()


@widths
@every_problem
def test_rows_begin_where_wide_loads_and_fast_products_want_them(problem, d, gpu):
    """As the offline compilation of the kernels assumes; an odd distance makes a library's product slow."""
    log_sum_exp(d=d, **problem | ({"m": problem["m"] - 1} if "m" in problem else {"n": N - 1}))
    distances = [
        (name, argument, value)
        for name, _, arguments in gpu.launched
        for argument, value in arguments.items()
        if argument in ("q_row", "k_row", "a_row", "b_row", "z_row") or (name, argument) == ("backward_rows", "out_row")
    ]
    assert distances
    assert all(value % 16 == 0 and value >= d for *_, value in distances), distances
    assert all(arguments["out_row"] % 8 == 0 for _, arguments in gpu.of("backward_weights"))
    assert bool(gpu.products) == (d > 256)
    for operands in gpu.products:
        assert all(max(x.stride()) % 8 == 0 for x in operands)
