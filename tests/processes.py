"""Functions run by real processes of a torch.distributed group (gloo, on this machine).

    def total(x):  # at the top of a test module: it travels by its name
        x = x * (dist.get_rank() + 1)
        dist.all_reduce(x)
        return x

    def test_total():
        first, second = run(total, 2, torch.ones(3))  # the results by rank
        assert first.equal(second)

While the function runs, the default group has just the processes asked for, so "world" is the right group; torch has
one thread, and its generator the seed 0. Arguments and results travel by pickle, the arguments to every process alike:
what differs, a function takes by its rank. An exception in a process fails the test with that process's traceback.

The processes stay, and every call makes a group of its own: what one call leaves undone does not reach the next, and a
constant of the package that it leaves changed is an error. After a failure all processes are killed, and the next call
starts new ones, which is cheap: they are forks of a server that has imported torch, and the modules of tests that are
collected and use this. Time limits count from when all processes are ready, however busy the machine.

The tests of a module share the processes of one pytest process by

    pytestmark = pytest.mark.xdist_group("test_of_this_module")

and other modules may be run beside it: processes that wait for each other leave the CPUs to them.
"""

import atexit
import contextlib
import datetime
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path

# Seconds that a collective waits for the other processes, and that those have to end after one has failed.
PATIENCE, AFTER_FAILURE = 30, 20
# Seconds that a new process has to become ready.
START = 300
READY = b"ready"


class ProcessFailure(AssertionError):
    """A process raised, died, or did not come to an end."""


def run(function: Callable, processes: int, *arguments, timeout: float = 60, patience: float = PATIENCE) -> list:
    """``function(*arguments)`` in every process of a group: what each returns, by rank.

    Args:
        timeout: seconds after which the processes are killed, from when all are ready.
        patience: seconds that a collective waits for the other processes (the timeout of the group).

    Raises:
        ProcessFailure: with the tracebacks of the processes that raised, or the ranks of those that died or hung.
    """
    task = pickle.dumps((function, arguments))
    _pool.grow(processes)
    answers = _pool.ask(task, processes, timeout, patience)
    failures = [f"process {rank} of {processes} {text}" for rank, (done, text) in enumerate(answers) if not done]
    if failures:
        _pool.kill()
        raise ProcessFailure("\n\n".join(failures))
    return [result for _, result in answers]


class _Pool:
    def __init__(self):
        self.workers: list[tuple[multiprocessing.Process, Connection]] = []
        self.calls = 0
        self.folder: tempfile.TemporaryDirectory | None = None

    def grow(self, processes: int) -> None:
        if not all(process.is_alive() for process, _ in self.workers):
            self.kill()
        self.folder = self.folder or tempfile.TemporaryDirectory(prefix="ccl_fast_processes_")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", *_users()])  # heeded before the first process alone
        known = len(self.workers)
        while len(self.workers) < processes:
            here, there = context.Pipe()
            process = context.Process(target=_work, args=(there,), daemon=True)
            process.start()
            there.close()
            self.workers.append((process, here))
        for _, connection in self.workers[known:]:
            if not connection.poll(START) or connection.recv_bytes() != READY:
                self.kill()
                raise ProcessFailure(f"a new process is not ready after {START} s")

    def ask(self, task: bytes, processes: int, timeout: float, patience: float) -> list[tuple[bool, object]]:
        """Of every process whether it is done, and its result or what became of it."""
        self.calls += 1
        store = str(Path(self.folder.name) / str(self.calls))
        asked = self.workers[:processes]
        for rank, (_, connection) in enumerate(asked):
            with contextlib.suppress(OSError):  # it has died: found below
                connection.send_bytes(pickle.dumps((task, rank, processes, store, patience)))
        ranks = {connection: rank for rank, (_, connection) in enumerate(asked)}
        answers: dict[int, tuple[bool, object]] = {}
        deadline = time.monotonic() + timeout
        while ranks and (ready := wait(list(ranks), max(0, deadline - time.monotonic()))):
            for connection in ready:
                rank = ranks.pop(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    asked[rank][0].join(10)
                    answers[rank] = False, f"died, exit code {asked[rank][0].exitcode}"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + AFTER_FAILURE)
        return [answers.get(rank, (False, "did not come to an end")) for rank in range(processes)]

    def kill(self) -> None:
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.join()
        self.workers = []
        if self.folder:
            self.folder.cleanup()
            self.folder = None


def _users() -> list[str]:
    """The modules of tests that have imported `run`."""
    tests = [(name, vars(module)) for name, module in sys.modules.items() if name.startswith("tests.")]
    return [name for name, of in tests if name != __name__ and any(value is run for value in of.values())]


_pool = _Pool()
atexit.register(_pool.kill)


def _work(connection: Connection) -> None:
    import torch

    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a machine's own name need not resolve

    torch.set_num_threads(1)
    connection.send_bytes(READY)
    while True:
        try:
            task, *place = pickle.loads(connection.recv_bytes())
        except EOFError:  # the tests have ended
            return
        try:
            answer = pickle.dumps((True, _call(task, *place)))
        except BaseException:
            answer = pickle.dumps((False, "raised\n" + traceback.format_exc()))
        connection.send_bytes(answer)


def _call(task: bytes, rank: int, processes: int, store: str, patience: float):
    import torch
    import torch.distributed as dist

    function, arguments = pickle.loads(task)
    timeout = datetime.timedelta(seconds=patience)
    dist.init_process_group("gloo", f"file://{store}", timeout, processes, rank)
    dist.barrier()  # who is done with the function at once must not leave while others are still connecting
    before = _constants()
    try:
        torch.manual_seed(0)
        result = function(*arguments)
    finally:
        dist.destroy_process_group()
    changed = [name for name, value in _constants().items() if before.get(name, value) is not value]
    assert not changed, f"left changed, for whoever comes next: {', '.join(changed)}"
    return result


def _constants() -> dict[str, object]:
    """The values of the package's constants, tile sizes for instance, on which rounding depends."""
    modules = [(name, module) for name, module in sys.modules.items() if name.split(".")[0] == "ccl_fast"]
    return {f"{m}.{name}": value for m, module in modules for name, value in vars(module).items() if name.isupper()}
