"""One case at one size: every contender admitted, checked, timed in turns with the others."""

import torch

from benchmarks.cases import Case, Size
from benchmarks.ceilings import two_products
from benchmarks.contenders import CONTENDERS
from benchmarks.correctness import is_wrong, relative_error
from benchmarks.results import Row
from benchmarks.timing import Clock, Step, interleave, paired_ratio, percentiles, step_of

PRODUCTS = "two products"


def measure(
    case: Case,
    size: Size,
    device: torch.device,
    clock: Clock,
    seconds: float,
    contenders: tuple[str, ...] | None = None,
    skip: dict[str, str] | None = None,
) -> tuple[list[Row], dict[str, Step]]:
    """Rows for all contenders (those of the case if not named), and the steps of those that were timed.

    `skip` maps contenders to the reason for leaving them out. A contender that cannot run, is wrong or raises
    is a row with a note.
    """
    inputs = case.inputs(size, device)
    dtype = str(size.dtype).removeprefix("torch.")
    rows, steps = {}, {}
    for name in contenders or case.contenders:
        contender = CONTENDERS[name]
        row = rows[name] = Row(case.name, name, size.n, size.d, dtype)
        row.note = (skip or {}).get(name) or contender.obstacle(size, device) or ""
        if row.note:
            continue
        try:
            row.error = relative_error(contender, case, size, device)
            if is_wrong(row.error, size):
                row.note = f"wrong: relative error {row.error:.1e} against float64"
                continue
            step = step_of(contender.build(case), case, inputs)
            clock(step)  # compiles and allocates
            steps[name] = step
        except Exception as error:  # a rival's failure is a result
            row.note = "out of memory" if _is_out_of_memory(error) else f"{type(error).__name__}: {error}"[:200]
        if contender.ignores_centers and case.centers:
            row.note = row.note or "without centres"

    rows[PRODUCTS] = Row(case.name, PRODUCTS, size.n, size.d, dtype, note="does not fit")
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
        row = rows[name]
        row.p20, row.p50, row.p80 = percentiles(t)
        row.repetitions = len(t)
        row.to_ours = paired_ratio(together[name], together["ours"]) if {name, "ours"} <= together.keys() else None
    return list(rows.values()), steps


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
