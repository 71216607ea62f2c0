"""One case at one size: every contender admitted, checked, timed in turns with the others."""

import torch

from benchmarks.harness.ceilings import Ceilings
from benchmarks.harness.contender import MEMORY_SHARE, Size, free_memory
from benchmarks.harness.measure import compare_with_ours, failure_noted, record
from benchmarks.harness.results import Row
from benchmarks.harness.timing import Clock, Step, interleave, paired_ratio
from benchmarks.losses.cases import Case, Inputs
from benchmarks.losses.contenders import CONTENDERS
from benchmarks.losses.correctness import is_wrong, relative_error

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


def two_products(inputs: Inputs, size: Size) -> Step | None:
    """The yardstick: z z' twice into one preallocated N x N array; None where that array does not fit."""
    z = inputs.embeddings.detach().reshape(size.n, size.d)
    if size.n**2 * z.element_size() > MEMORY_SHARE * free_memory(z.device):
        return None
    out = z.new_empty(size.n, size.n)

    def step():
        torch.mm(z, z.T, out=out)
        torch.mm(z, z.T, out=out)

    return step
