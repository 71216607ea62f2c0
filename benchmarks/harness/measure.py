"""One case at one size: every contender admitted, checked, timed in turns with the others."""

import contextlib

import torch

from benchmarks.cases import Case, Size
from benchmarks.ceilings import Ceilings, two_products
from benchmarks.contenders import CONTENDERS
from benchmarks.correctness import is_wrong, relative_error
from benchmarks.results import Row
from benchmarks.timing import Clock, Step, interleave, paired_ratio, percentiles

PRODUCTS = "two products"


def measure(
    case: Case,
    size: Size,
    device: torch.device,
    clock: Clock,
    seconds: float,
    contenders: tuple[str, ...] | None = None,
    skip: dict[str, str] | None = None,
    ceilings: Ceilings | None = None,
) -> tuple[list[Row], dict[str, Step]]:
    """Rows for all contenders (those of the case if not named), and the steps of those that were timed.

    `skip` maps contenders to the reason for leaving them out. A contender that cannot run, is wrong or raises
    is a row with a note. With `ceilings` ours has a floor.
    """
    inputs = case.inputs(size, device)
    dtype = str(size.dtype).removeprefix("torch.")
    rows, steps = {}, {}
    for name in contenders or case.contenders:
        contender = CONTENDERS[name]
        row = rows[name] = Row(case.name, name, size.n, size.d, dtype, clusters=size.clusters)
        if name == "ours" and ceilings:
            row.units, row.floor = case.units(size, device), ceilings.floor(case.work(size, device))
        row.note = (skip or {}).get(name) or contender.obstacle(size, device) or ""
        if row.note:
            continue
        with failure_noted(row):
            row.error = relative_error(contender, case, size, device)
            if is_wrong(row.error, size):
                row.note = f"wrong: relative error {row.error:.1e} against float64"
                continue
            step = case.step(contender.build(case), inputs)
            clock(step)  # compiles and allocates
            steps[name] = step
        if contender.ignores_centers and case.centers:
            row.note = row.note or "without centres"

    rows[PRODUCTS] = Row(case.name, PRODUCTS, size.n, size.d, dtype, clusters=size.clusters, note="does not fit")
    alone = {"ours": steps["ours"]} if "ours" in steps else {}
    if products := two_products(inputs, size):
        clock(products)
        alone[PRODUCTS], rows[PRODUCTS].note = products, ""
    # Ours against the yardstick by themselves, in the steady state of a training loop: a rival that allocates and
    # returns gigabytes between two steps would charge its page faults to its neighbours.
    times = interleave(alone, clock, seconds / 4, least=5)
    if products and "ours" in steps:
        rows["ours"].to_products = paired_ratio(times["ours"], times[PRODUCTS])
    together = interleave(steps, clock, seconds)
    for name, t in (together | times).items():
        record(rows[name], t)
    compare_with_ours(rows, together)
    return list(rows.values()), steps


@contextlib.contextmanager
def failure_noted(row: Row):
    """A rival's failure is a result."""
    try:
        yield
    except Exception as error:
        row.note = "out of memory" if _is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:200]


def record(row: Row, times: list[float]) -> None:
    row.p20, row.p50, row.p80 = percentiles(times)
    row.repetitions = len(times)


def compare_with_ours(rows: dict[str, Row], together: dict[str, list[float]]) -> None:
    """The ratios of times that were taken in turns."""
    if "ours" in together:
        for name, times in together.items():
            rows[name].to_ours = paired_ratio(times, together["ours"])


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
