"""Blocks of rows on several threads."""

import multiprocessing
import threading

import pytest
import torch

from ccl_fast.ops import threads as threads_module
from ccl_fast.ops.threads import for_each_block

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(threads_module, "MIN_BLOCKS_PER_THREAD", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize(("rows", "size"), [(0, 4), (1, 4), (4, 4), (103, 4), (1000, 1)])
def test_every_row_is_visited_once(threads, rows, size):
    visits = torch.zeros(rows)

    def work(part):
        visits[part] += 1
        assert part.stop - part.start <= size

    for_each_block(rows, size, work, CPU)
    assert visits.eq(1).all()
    assert torch.get_num_threads() == threads


def test_torch_has_one_thread_in_each_and_no_gradients_or_autocast(threads):
    seen = []
    meet = threading.Barrier(threads)

    def work(part):
        meet.wait(10)  # so that every thread takes a block
        seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))

    with torch.autocast("cpu"):
        for_each_block(threads, 1, work, CPU)
        assert torch.is_autocast_enabled("cpu")
    assert seen == [(1, False, False)] * threads
    assert torch.is_grad_enabled()


def test_few_blocks_stay_in_the_calling_thread(threads, monkeypatch):
    monkeypatch.setattr(threads_module, "MIN_BLOCKS_PER_THREAD", 2)
    names = []
    for_each_block(2 * threads, 1, lambda part: names.append(threading.current_thread()), CPU)
    assert names == [threading.current_thread()] * 2 * threads


def test_errors_arrive(threads):
    def work(part):
        raise ValueError(f"block {part.start}")

    with pytest.raises(ValueError, match="block"):
        for_each_block(100, 1, work, CPU)


def _sum(queue):
    total = torch.zeros(8)
    for_each_block(8, 1, lambda part: total[part].add_(1), CPU)
    queue.put(total.sum().item())


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_process_makes_its_own_threads(threads):
    for_each_block(8, 1, lambda part: None, CPU)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_sum, args=(queue,))
    child.start()
    assert queue.get(timeout=30) == 8
    child.join()
