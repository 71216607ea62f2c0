"""Work on blocks of rows, on a CPU by threads that each do a block from beginning to end.

torch's own threads share every single operation and meet after it. With the small operations of a block that fits into
the cache, they wait for each other more than they work, above all where another program wants the cores too.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait

import torch

from ccl_fast.ops.precision import without_autocast

# Blocks for each thread below which the calling thread does them, with torch's threads in every operation: those spin
# for some milliseconds after what came before, and would keep ours from the cores (benchmarks/LOG.md).
MIN_BLOCKS_PER_THREAD = 8


def for_each_block(rows: int, size: int, work: Callable[[slice], None], device: torch.device) -> None:
    """Call ``work`` with slices of ``size`` or less that cover ``range(rows)``; many on a CPU from many threads.

    The calls must not depend on each other. Gradients and autocast are off in them.
    """
    starts = iter(range(0, rows, size))
    inference = torch.is_inference_mode_enabled()  # of this thread alone

    def work_on() -> None:
        # Entering a context costs as much as a small operation.
        without_gradients = torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()
        with without_gradients, without_autocast(device):
            for start in starts:  # shared: whoever is free takes the next
                work(slice(start, min(start + size, rows)))

    def work_in_thread() -> None:
        with torch.inference_mode(inference):
            work_on()

    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1 or rows <= size * MIN_BLOCKS_PER_THREAD * threads:
        work_on()
        return
    with _creation:
        pool = _single_threaded(threads)
    for done in wait([pool.submit(work_in_thread) for _ in range(threads)]).done:
        done.result()


_creation = threading.Lock()


@functools.cache
def _single_threaded(threads: int) -> ThreadPoolExecutor:
    """Threads whose torch operations run on them alone."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ccl_fast")
    all_here = threading.Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # a thread takes over the number that is set when it first asks, and keeps it
        all_here.wait()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for done in [pool.submit(start) for _ in range(threads)]:
            done.result()
    finally:
        torch.set_num_threads(before)
    return pool


# A forked process has none of the threads.
os.register_at_fork(after_in_child=_single_threaded.cache_clear)
