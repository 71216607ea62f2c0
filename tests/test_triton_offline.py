"""What ptxas makes of every shipped launch configuration: no spills, shared memory that fits, tensor cores in use, and
an inner loop that does no more than it did.

The variant of the largest problems is compiled for every architecture, all others for sm_90; `make launch-table`
compiles all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from offline_compile import SHARED_LIMIT, shipped

# The compilers that the table was read with. Registers are another's choice: under it spills are reported, no failure.
CALIBRATED = ("3.6", "3.7", "3.8", "3.9")
# Of the inner loop on sm_90, in bfloat16, the most instructions and shuffles for an element of a tile (300 for 32
# elements are 9.4).
BOUNDS = {
    ("forward_triangle", 128, False): (9.6, 1.5),
    ("forward_triangle", 128, True): (17.5, 0.3),
    ("forward_triangle", 1024, True): (42.0, 0.2),
    ("backward_rows", 128, False): (9.3, 0.0),
}
SCRIPT = Path(__file__).with_name("offline_compile.py")


def compiled(*arguments: str) -> str:
    """In another process: in this one the kernels may have been imported for interpretation."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("index", range(len(shipped())), ids=[str(entry) for entry in shipped()])
def test_launch_compiles_to_what_it_was_chosen_for(index):
    kernel, element, ids, d, _precision = shipped()[index]
    reports = [json.loads(line) for line in compiled("quick", str(index)).splitlines()]
    for r in reports:
        assert r["shared_bytes"] <= SHARED_LIMIT[r["arch"]], r
        assert r["tensor_core_instructions"] > 0, r
    if triton.__version__.rpartition(".")[0] not in CALIBRATED:
        spilling = [r for r in reports if r["spill_instructions"]]
        if spilling:
            pytest.skip(f"not calibrated with Triton {triton.__version__}, which spills in {spilling}")
        return
    for r in reports:
        assert r["spill_instructions"] == 0, r
    (hopper,) = (r for r in reports if r["arch"] == 90 and r["main"])
    if element == "bf16":
        assert hopper["copies_in_flight"] > 0, hopper
        assert hopper["narrowest_product"] >= 32, hopper
        # Both anchors of a pair in one exponential where the logits are bounded; strips take two.
        assert hopper["exponentials"] <= (2.05 if kernel == "backward_weights" else 1.05), hopper
        instructions, shuffles = BOUNDS[kernel, d, ids]
        assert hopper["instructions"] <= instructions, hopper
        assert hopper["shuffles"] <= shuffles, hopper


def test_not_a_number_is_kept_by_the_bound_of_a_weight():
    """The interpreter's minimum keeps NaN either way; the GPU's has an instruction of its own for it."""
    minima = [line for line in compiled("ptx", "backward_rows").splitlines() if "min." in line and ".f32" in line]
    assert minima
    assert all("min.NaN.f32" in line for line in minima)
