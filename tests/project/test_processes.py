"""The processes of the tests: what becomes of one that fails."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from ccl_fast.ops.logsumexp import blocked
from tests.processes import ProcessFailure, run

pytestmark = pytest.mark.xdist_group("test_processes")


def total(x):
    x = x * (dist.get_rank() + 1)
    dist.all_reduce(x)
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), x


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_results_come_by_rank(processes):
    expected = sum(range(1, processes + 1))
    for rank, (own_rank, size, threads, x) in enumerate(run(total, processes, torch.ones(3))):
        assert (own_rank, size, threads) == (rank, processes, 1)
        assert x.tolist() == [expected] * 3


def fail(how):
    if dist.get_rank() == 1:
        if how == "raise":
            raise KeyError("here")
        if how == "leave":
            blocked.BLOCK = 16
            return
        if how == "die":
            os._exit(3)
        time.sleep(100)
    if how != "leave":
        dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", r"process 1 of 2 raised\nTraceback[\s\S]*in fail[\s\S]*KeyError: 'here'"),
        ("die", r"process 1 of 2 died, exit code 3"),
        ("leave", r"left changed[\s\S]*logsumexp.blocked.BLOCK"),
        ("hang", r"process 1 of 2 did not come to an end"),
    ],
)
def test_a_failure_fails_the_test_and_nothing_after_it(how, message):
    with pytest.raises(ProcessFailure, match=message):
        run(fail, 2, how, timeout=2 if how == "hang" else 30)
    assert len(run(total, 2, torch.ones(1))) == 2


def test_tests_of_a_group_are_run_by_one(request):
    """pytest-xdist marks them so, unless the version of pytest keeps it from doing so; both would start processes."""
    by_group = getattr(request.config.option, "loadgroup", False)  # of --dist loadgroup, as a worker sees it
    assert request.node.nodeid.endswith("@test_processes") == by_group
