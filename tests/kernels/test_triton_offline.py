"""What ptxas makes of every shipped launch configuration: no spills, shared memory that fits, tensor cores in use, and
an inner loop that does no more than it did.

The variant of the largest problems is compiled for every architecture, all others for sm_90; `make launch-table`
compiles all. A compilation takes a second or two: for sm_90 one of each kernel, one of each element and one with ids,
for each other architecture one, are not marked slow.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import triton

from tests import ROOT
from tests.kernels.offline_compile import OTHERS, audit, compile_other, planned, ptx, shipped

# The compilers that the table was read with. What another makes of registers and loops is reported, and no failure.
CALIBRATED = ("3.8",)
# Of the inner loop on sm_90, in bfloat16, the most instructions and shuffles for an element of a tile (300 for 32
# elements are 9.4).
BOUNDS = {
    ("forward_rows", 64, False): (7.5, 0.3),
    ("forward_rows", 64, True): (22.5, 0.5),
    ("forward_rows", 128, False): (9.0, 0.3),
    ("forward_rows", 128, True): (23.0, 0.5),
    ("forward_rows", 1024, False): (37.0, 0.2),
    ("forward_rows", 1024, True): (53.0, 0.3),
    ("forward_triangle", 64, False): (9.3, 0.1),
    ("forward_triangle", 64, True): (14.5, 0.2),
    ("forward_triangle", 128, False): (9.6, 1.5),
    ("forward_triangle", 128, True): (17.0, 0.3),
    ("forward_triangle", 256, False): (13.7, 0.2),
    ("forward_triangle", 256, True): (20.0, 0.3),
    ("forward_triangle", 1024, False): (36.0, 0.1),
    ("forward_triangle", 1024, True): (41.0, 0.2),
    ("backward_rows", 64, False): (8.2, 0.0),
    ("backward_rows", 64, True): (12.2, 0.0),
    ("backward_rows", 128, False): (9.3, 0.0),
    ("backward_rows", 128, True): (13.2, 0.0),
    ("backward_rows", 256, False): (14.2, 0.0),
    ("backward_rows", 256, True): (19.0, 0.0),
    ("backward_weights", 1024, False): (67.0, 0.0),
    ("backward_weights", 1024, True): (94.0, 0.0),
}
TWO_BLOCKS = (("forward_triangle", 128), ("backward_rows", 128))
# Triton keeps there what it has compiled, by the source, the launch, the target and its own version.
CACHE = ROOT / "build" / "triton"


@pytest.fixture(scope="module")
def compiler():
    """One other process for all: in this one the kernels may have been imported for interpretation."""
    spawn = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, mp_context=spawn) as process:
        patch.setenv("TRITON_INTERPRET", "0")
        patch.setenv("TRITON_CACHE_DIR", str(CACHE))
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def cases():
    """An entry of the table, an architecture and the number of a variant."""
    seen = set()
    for entry in shipped():
        kernel, element, ids, *_ = entry
        for arch, number in planned(entry, quick=True):
            kinds = {kernel, element, ids} if arch == 90 else {arch}
            marks = pytest.mark.slow if number or kinds <= seen else ()
            seen |= kinds
            yield pytest.param(entry, arch, number, marks=marks, id=f"{entry}-sm_{arch}-{number}")


@pytest.mark.parametrize(("entry", "arch", "number"), list(cases()))
def test_launch_compiles_to_what_it_was_chosen_for(compiler, entry, arch, number):
    kernel, element, ids, d, _precision = entry
    report = compiler(audit, *entry, arch, number)
    assert report["shared_bytes"] <= report["shared_limit"], report
    assert report["tensor_core_instructions"] > 0, report
    try:
        check(report, element, (kernel, d, ids))
    except AssertionError as error:
        if triton.__version__.rpartition(".")[0] in CALIBRATED:
            raise
        pytest.skip(f"the launches were not chosen with Triton {triton.__version__}, which makes of them: {error}")


def check(r: dict, element: str, key: tuple[str, int, bool]) -> None:
    assert r["spill_instructions"] == 0, r
    if element != "bf16" or r["arch"] != 90 or not r["main"]:
        return
    assert r["copies_in_flight"] > 0, r
    assert r["narrowest_product"] >= 32, r
    # Both anchors of a pair in one exponential where the logits are bounded; strips take two. (A running maximum takes
    # some for a row.)
    assert r["exponentials"] <= (2.05 if key[0] == "backward_weights" else 1.15), r
    # Of the kernels of large batches a second block works while the first one waits.
    assert r["blocks_per_multiprocessor"] >= (2 if key[:2] in TWO_BLOCKS else 1), r
    instructions, shuffles = BOUNDS[key]
    assert r["instructions"] <= instructions, r
    assert r["shuffles"] <= shuffles, r


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_kernels_without_products_compile(compiler, other):
    assert compiler(compile_other, 90, *other) > 0


@pytest.mark.parametrize("kernel", ["backward_rows", "backward_weights"])
def test_not_a_number_is_kept_by_the_bound_of_a_weight(compiler, kernel):
    """The interpreter's minimum keeps NaN either way; the GPU's has an instruction of its own for it."""
    minima = [line for line in compiler(ptx, kernel).splitlines() if "min." in line and ".f32" in line]
    assert minima
    assert all("min.NaN.f32" in line for line in minima)
