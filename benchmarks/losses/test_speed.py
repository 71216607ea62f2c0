"""The registry's cases under pytest-benchmark: ``pytest benchmarks/ --benchmark-only``.

The results files and the README come from ``python -m benchmarks``, which takes the contenders in turns; this is for a
quick look, and for pytest-benchmark's own comparisons (``--benchmark-autosave``, ``--benchmark-compare``). Every
contender is checked against float64 before it is timed.
"""

import pytest
import torch

from benchmarks.harness.contender import Size
from benchmarks.losses.cases import CASES
from benchmarks.losses.contenders import CONTENDERS
from benchmarks.losses.correctness import is_wrong, relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = [(case, contender) for case in CASES for contender in CASES[case].contenders]


@pytest.mark.parametrize("n", [512, 2048])
@pytest.mark.parametrize(("case", "contender"), PAIRS)
def test_speed(benchmark, case, contender, n):
    case, contender, size = CASES[case], CONTENDERS[contender], Size(n, 128)
    if obstacle := contender.obstacle(size, DEVICE):
        pytest.skip(obstacle)
    error = relative_error(contender, case, size, DEVICE)
    assert not is_wrong(error, size), f"relative error {error:.1e} against float64"
    step = case.step(contender.build(case), case.inputs(size, DEVICE))

    def run():
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    run()  # compiles and allocates
    benchmark.group = f"{case.name}, N = {n}"
    benchmark(run)
