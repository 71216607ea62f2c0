"""A step of a small batch dispatches no more operations than these, on any machine."""

import pytest

from benchmarks.losses.dispatches import count_all
from ccl_fast.kernels import cpu_extension

# All are counted at once.
pytestmark = pytest.mark.xdist_group("test_dispatches")
# By loss: on a CPU with the extension, and without.
MAX_OPERATIONS = {"CCL": (21, 58), "SupCon": (18, 53), "NT-Xent": (16, 46), "CLIP": (23, 52)}
# A few of them are views, which launch nothing.
ON_A_GPU = {"CCL": 70, "SupCon": 63, "NT-Xent": 38, "CLIP": 44}
# Of the path of Triton's kernels, whatever the loss.
MAX_OPERATIONS_OF_KERNELS = 60


@pytest.fixture(scope="module")
def counts():
    return count_all()


@pytest.mark.parametrize("loss", MAX_OPERATIONS)
def test_one_tile(counts, loss):
    on_cpu = MAX_OPERATIONS[loss][cpu_extension.module is None]
    found = counts[loss]
    assert found["cpu"].operations <= min(on_cpu, found["plain"].operations)
    assert found["gpu"].operations <= ON_A_GPU[loss]
    assert (found["cpu"].kernels, found["gpu"].kernels) == (0, 2)  # rows of length 1, and their gradient


@pytest.mark.parametrize("loss", MAX_OPERATIONS)
def test_several_tiles(counts, loss):
    """What a larger batch takes; on a GPU its launches would else take longer than its products."""
    blocked, kernels = {"CCL": (300, 10), "SupCon": (155, 6), "NT-Xent": (140, 5), "CLIP": (190, 10)}[loss]
    assert counts[loss]["blocked"].operations <= blocked
    assert counts[loss]["triton"].operations <= MAX_OPERATIONS_OF_KERNELS
    assert counts[loss]["triton"].kernels == kernels
