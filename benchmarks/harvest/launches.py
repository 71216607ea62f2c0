"""Candidate launches beside the shipped ones, in turns: what the launch table's next version is made of."""

import contextlib
from collections.abc import Iterable

from benchmarks.harness.timing import Step
from benchmarks.harvest import plan
from benchmarks.harvest.losses import Work, take_the_path_of_large_batches
from benchmarks.harvest.plan import Problem
from benchmarks.harvest.run import Harvest, read_lines
from benchmarks.losses.correctness import TOLERANCE
from ccl_fast.kernels import launch as table

SECONDS = 2.0  # for each kernel and D
BEST = 2  # candidates of each that the second call measures again
SHIPPED = "shipped"


def run(harvest: Harvest) -> None:
    for (kernel, d), candidates in plan.CANDIDATES.items():
        compare(harvest, kernel, d, candidates)


def run_best(harvest: Harvest) -> None:
    """Of the second call: the best of the first one, once more."""
    from benchmarks.harvest.device_tests import FIRST

    lines = [x for x in read_lines(FIRST / "results.jsonl") if x["stage"] == "launches" and x.get("p50")]
    for kernel, d in plan.CANDIDATES:
        tried = [x for x in lines if (x["kernel"], x["d"]) == (kernel, d) and x["tried"] != SHIPPED]
        best = sorted(tried, key=lambda x: x["p50"])[:BEST]
        compare(harvest, kernel, d, [tuple(x["launch"][:5]) for x in best])


def compare(harvest: Harvest, kernel: str, d: int, candidates: Iterable[tuple[int, ...]]) -> None:
    """A line for the shipped launch and one for each candidate. All are captured first, then replayed in turns."""
    take_the_path_of_large_batches(harvest)
    keys, steps, found = {}, {}, {}
    for name, given in {SHIPPED: None, **{str(c): c for c in candidates}}.items():
        key = {"kernel": kernel, "n": plan.ROWS_OF_LAUNCHES, "d": d, "tried": name}
        if harvest.may_start(key):
            try:
                steps[name], found[name] = prepare(harvest, kernel, d, given)
                keys[name] = key
            except Exception as error:
                harvest.failed(key, error)
    if not steps:
        return
    try:
        times = harvest.times(steps, harvest.clock, SECONDS)
    except Exception as error:  # of any of them: none is tried again
        *others, last = keys.values()
        for key in others:
            harvest.line(**key, note=f"one of these launches: {error}"[:300])
        harvest.failed(last, error)
    else:
        for name, key in keys.items():
            harvest.line(**key | found[name] | times[name])


def prepare(harvest: Harvest, kernel: str, d: int, given: tuple[int, ...] | None) -> tuple[Step, dict]:
    """The captured step with a launch of its own, and what its line says besides the times."""
    work = Work(harvest, Problem(plan.ROWS_OF_LAUNCHES, d))
    with chosen(kernel, given) as used:
        error = work.error
        if not error <= TOLERANCE[harvest.half]:
            raise ArithmeticError(f"wrong: relative error {error:.1e} against float64")
        step = harvest.captured(work.step("forward" if kernel.startswith("forward") else "backward", "graph"))
    return step, {"launch": list(used[0]), "error": error, "note": ""}


@contextlib.contextmanager
def chosen(kernel: str, given: tuple[int, ...] | None):
    """The launch table with `given` for this kernel (as it is for None); a list of the launches that were used."""
    original, used = table.launch, []

    def launch(name: str, *arguments, **options):
        found = original(name, *arguments, **options)
        if name != kernel:
            return found
        if given:
            block_m, block_n, block_d, num_warps, num_stages = given
            found = found._replace(
                block_m=block_m, block_n=block_n, block_d=block_d, num_warps=num_warps, num_stages=num_stages
            )
        used.append(found)
        return found

    table.launch = launch
    try:
        yield used
        if not used:
            raise LookupError(f"the step does not launch {kernel}")
    finally:
        table.launch = original
