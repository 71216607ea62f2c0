"""Only what is right is timed: value and gradient against the dense loss in float64."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness.contender import Contender, Size
from benchmarks.losses.cases import Case, Inputs
from benchmarks.losses.contenders import Loss

ROWS = 2048
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


def relative_error(contender: Contender, case: Case, size: Size, device: torch.device) -> float:
    """The larger of the relative errors of value and gradient (in the 2-norm), on at most 2048 rows."""
    return _relative_error(contender, case, replace(size, n=min(size.n, ROWS)), device)


@functools.cache
def _relative_error(contender: Contender, case: Case, size: Size, device: torch.device) -> float:
    inputs = case.inputs(size, device, seed=1)
    if contender.ignores_centers:
        inputs = inputs._replace(centers=None)
    wide = Inputs(*(x.detach().double() if x is not None and x.is_floating_point() else x for x in inputs))
    wide.embeddings.requires_grad_(case.backward)
    truth = _evaluate(lambda x: case.loss("reference")(*x), wide, case.backward)
    found = _evaluate(contender.build(case), inputs, case.backward)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]
    return max(errors, key=lambda e: float("inf") if e != e else e)


def is_wrong(error: float, size: Size) -> bool:
    return not error <= TOLERANCE[size.dtype]


def _evaluate(loss: Loss, inputs: Inputs, backward: bool) -> list[Tensor]:
    value = loss(inputs)
    gradients = torch.autograd.grad(value, inputs.embeddings) if backward else ()
    return [x.detach().double() for x in (value, *gradients)]
