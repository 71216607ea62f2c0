"""The log-sum-exp forward and backward apart, by graph replay and as called; the bare products; then the rivals."""

from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.harness.memory import peak_on_gpu
from benchmarks.harness.timing import Step
from benchmarks.harvest import plan, rivals
from benchmarks.harvest.plan import Problem
from benchmarks.harvest.run import Harvest
from benchmarks.losses.correctness import TOLERANCE
from ccl_fast import streaming_logsumexp
from ccl_fast.ops.logsumexp import triton as triton_kernels

SCALE = 10.0
ROWS_OF_AN_ID = 512
SECONDS = 0.5  # for each line
SAMPLED = 64  # rows that are held to float64


def run(harvest: Harvest) -> None:
    for problem in plan.PROBLEMS:
        measure(harvest, problem)
    for problem in plan.PROBLEMS:
        if not problem.ids:
            _measure_products(harvest, problem)
    rivals.run(harvest)


def run_large(harvest: Harvest) -> None:
    """Of the second call: the largest sizes."""
    for problem in plan.LARGE:
        measure(harvest, problem)
    rivals.run_clip(harvest, *plan.CLIP)


def take_the_path_of_large_batches(harvest: Harvest) -> None:
    """In a dry run, whose batches are not large."""
    if harvest.dry_run:
        triton_kernels.TRIANGLE_MIN_ROWS = 1


def measure(harvest: Harvest, problem: Problem) -> None:
    """Four lines."""
    take_the_path_of_large_batches(harvest)
    work = Work(harvest, problem)
    for which in plan.PASSES:
        for mode in plan.MODES:
            key = _key(harvest, problem, "ours") | {"pass": which, "mode": mode}
            harvest.record(key, partial(work.timed, which, mode))


def _key(harvest: Harvest, problem: Problem, contender: str) -> dict:
    dtype = str(harvest.half).removeprefix("torch.")
    case = problem.name if contender == "ours" else contender
    return {"case": case, "contender": contender, "n": problem.n, "d": problem.d, "dtype": dtype}


class Work:
    """One problem on the device: its inputs, its two steps, and how far they are from float64."""

    def __init__(self, harvest: Harvest, problem: Problem):
        self.harvest, self.problem = harvest, problem

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """Unit rows, their ids, and the weights of the log-sum-exps in what is differentiated."""
        n, device = self.harvest.rows(self.problem.n), self.harvest.device
        random = torch.Generator(device).manual_seed(0)
        z = torch.randn(n, self.harvest.width(self.problem.d), generator=random, device=device)
        z = torch.nn.functional.normalize(z, dim=1).to(self.harvest.half).requires_grad_()
        ids = None
        if self.problem.ids:
            ids = torch.randint(max(2, n // ROWS_OF_AN_ID), (n,), generator=random, device=device).int()
        weights = 0.5 + torch.rand(2 if self.problem.ids else 1, n, generator=random, device=device)
        return z, ids, weights

    def forward(self) -> tuple[Tensor, ...]:
        z, ids, _ = self.inputs
        out = streaming_logsumexp(z, scale=SCALE, q_ids=ids, return_same=ids is not None, backend="triton")
        return (out,) if ids is None else out

    def backward(self, out: tuple[Tensor, ...]) -> Tensor:
        z, _, weights = self.inputs
        return torch.autograd.grad(out, z, list(weights), retain_graph=True)[0]

    @cached_property
    def error(self) -> float:
        out = self.forward()
        return relative_error(*self.inputs, out, self.backward(out))

    def step(self, which: str, mode: str) -> Step:
        if which == "forward":
            return self.forward
        if mode == "eager":
            out = self.forward()
        else:
            with self.harvest.on_stream():
                out = self.forward()
        return lambda: self.backward(out)

    def timed(self, which: str, mode: str) -> dict:
        if not self.error <= TOLERANCE[self.harvest.half]:
            return {"error": self.error, "note": f"wrong: relative error {self.error:.1e} against float64"}
        step, clock = self.step(which, mode), self.harvest.latency
        found = {"error": self.error, "note": ""}
        if mode == "graph":
            step, clock = self.harvest.captured(step), self.harvest.clock
        elif not self.harvest.dry_run:
            found["peak_bytes"] = peak_on_gpu(step)
        return found | self.harvest.times({"": step}, clock, SECONDS)[""]


def relative_error(z: Tensor, ids: Tensor | None, weights: Tensor, out: tuple[Tensor, ...], grad: Tensor) -> float:
    """Of log-sum-exps and gradient of some rows, the largest, in the 2-norm, against float64.

    The gradient of a row needs the sums of all others: those that were found, for they are held to the same.
    """
    rows = torch.linspace(0, len(z) - 1, min(SAMPLED, len(z)), device=z.device).long()
    wide = z.detach().double()
    logits = (SCALE * wide[rows] @ wide.T).scatter(1, rows[:, None], -torch.inf)
    masks = [torch.zeros((), device=z.device)]
    if ids is not None:
        masks.append(torch.where(ids[rows, None] == ids, 0.0, -torch.inf))
    pairs, errors = torch.zeros_like(logits), []
    for found, weight, mask in zip((x.detach().double() for x in out), weights.double(), masks, strict=True):
        exact = (logits + mask).logsumexp(1)
        errors.append((found[rows] - exact).norm() / exact.norm())
        pairs += weight[rows, None] * (logits + mask - exact[:, None]).exp() + weight * (logits + mask - found).exp()
    exact = SCALE * pairs @ wide
    errors.append((grad[rows].double() - exact).norm() / exact.norm())
    return torch.stack(errors).nan_to_num(nan=torch.inf).max().item()


def _measure_products(harvest: Harvest, problem: Problem) -> None:
    """The yardstick: z z' twice, where the matrix fits."""
    from benchmarks.harness.contender import Size
    from benchmarks.losses.cases import Inputs
    from benchmarks.losses.measure import two_products

    def timed() -> dict:
        z = Work(harvest, problem).inputs[0]
        step = two_products(Inputs(z, None, None), Size(*z.shape, harvest.half))
        if step is None:
            return {"note": "does not fit"}
        return {"note": ""} | harvest.times({"": harvest.captured(step)}, harvest.clock, SECONDS)[""]

    harvest.record(_key(harvest, problem, plan.PRODUCTS), timed)
