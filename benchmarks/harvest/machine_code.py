"""The audit's counts of the shipped launches, for the prediction: compiled for sm_90, no GPU needed."""

from dataclasses import fields

from benchmarks.harvest import plan
from benchmarks.harvest.prediction import Counts, kernels, name_of
from ccl_fast.kernels.launch import launch_on
from tests.kernels import offline_compile

ARCHITECTURE = 90


def counts_of_shipped_launches() -> dict[str, Counts]:
    """By `prediction.name_of`, for every kernel that a case of stage `losses` uses."""
    found = {}
    for problem in plan.PROBLEMS:
        for which in plan.PASSES:
            # The first that takes this D is the one that is used.
            names = [name.split()[0] for name in kernels(problem, which)]
            kernel = next(k for k in names if launch_on(ARCHITECTURE, k, 2, problem.d, problem.ids))
            if (name := name_of(kernel, problem)) not in found:
                line = offline_compile.audit(kernel, "bf16", problem.ids, problem.d, "tf32", ARCHITECTURE, 0)
                found[name] = Counts(**{field.name: line[field.name] for field in fields(Counts)})
    return found
