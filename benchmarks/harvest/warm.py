"""Every kernel of the stages that follow, compiled beforehand by many processes that run the steps once."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.harvest import plan
from benchmarks.harvest.run import Harvest

PROCESSES = 14
SMOKE_CHECKS = 24  # len(smoke.CHECKS), without its imports
DRY_JOBS, DRY_PROCESSES = 4, 2  # interpreted kernels need no warmth: this shows only that the jobs run


def jobs() -> list[tuple]:
    """What takes longest to compile first."""
    launches = [
        ("launch", kernel, d, given) for (kernel, d), candidates in plan.CANDIDATES.items() for given in candidates
    ]
    problems = [("problem", problem) for problem in (*plan.PROBLEMS, *plan.LARGE)]
    return problems + launches + [("smoke", i) for i in range(SMOKE_CHECKS)]


def run(harvest: Harvest) -> None:
    given = jobs()[:: len(jobs()) // DRY_JOBS] if harvest.dry_run else jobs()
    processes = DRY_PROCESSES if harvest.dry_run else min(PROCESSES, max(1, (os.cpu_count() or 1) - 2))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(warm, given))


def warm(job: tuple) -> None:
    """In a process of the pool: a line for what was run."""
    harvest, start, note = Harvest.of_environment("warm"), time.monotonic(), ""
    try:
        KINDS[job[0]](harvest, *job[1:])
    except Exception as error:
        note = f"{type(error).__name__}: {error}"[:300]
    harvest.line(case="warm", name=str(job), seconds=time.monotonic() - start, note=note)
    if note and harvest.device_is_lost():
        time.sleep(harvest.left)  # this process can do nothing more, and must not take jobs from the others


def _problem(harvest: Harvest, problem: plan.Problem) -> None:
    from benchmarks.harvest.losses import Work, take_the_path_of_large_batches

    take_the_path_of_large_batches(harvest)
    _ = Work(harvest, problem).error


def _launch(harvest: Harvest, kernel: str, d: int, given: tuple[int, ...]) -> None:
    from benchmarks.harvest.launches import chosen

    with chosen(kernel, given):
        _problem(harvest, plan.Problem(plan.ROWS_OF_LAUNCHES, d))


def _smoke(harvest: Harvest, index: int) -> None:
    from benchmarks.harvest.losses import take_the_path_of_large_batches
    from benchmarks.harvest.smoke import CHECKS

    take_the_path_of_large_batches(harvest)
    CHECKS[index].outputs(harvest)


KINDS: dict[str, Callable] = {"problem": _problem, "launch": _launch, "smoke": _smoke}
