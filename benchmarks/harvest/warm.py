"""Every kernel of the stages that follow, compiled beforehand by many processes that run the steps once."""

import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
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
        running = {pool.submit(warm, job): job for job in given}
        for done in as_completed(running):
            error = done.exception()
            note = "" if error is None else f"{type(error).__name__}: {error}"[:300]
            seconds = done.result() if error is None else None
            harvest.line(case="warm", name=str(running[done]), seconds=seconds, note=note)


def warm(job: tuple) -> float:
    """In a process of the pool."""
    start = time.monotonic()
    harvest = Harvest.of_environment("warm")
    KINDS[job[0]](harvest, *job[1:])
    return time.monotonic() - start


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
