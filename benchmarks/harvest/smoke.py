"""Right before fast: the kernels against float64 by the tests' own rule, and what only a GPU can get wrong."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.clustering.cases import CASES
from benchmarks.clustering.correctness import truth
from benchmarks.harness.contender import Size
from benchmarks.harvest.build import use_emulation
from benchmarks.harvest.losses import take_the_path_of_large_batches
from benchmarks.harvest.run import Harvest
from ccl_fast import streaming_logsumexp
from ccl_fast.kernels import extension
from ccl_fast.ops.kmeans.assign import prepare_rows
from tests.ops.logsumexp_cases import Case, evaluate
from tests.tolerance import assert_as_accurate

FILE = "smoke.jsonl"
WIDTHS = (128, 64, 256, 768)
ROWS = (8192, 8191)
RELATIONS = {
    "self": {},
    "ids": {"ids": 50, "return_same": True},
    "rectangular, bias": {"m": 0, "bias": True},  # as many keys as rows
}
DTYPES = ("float16", "bfloat16", "float32")  # of the rows of k-means
COLD = 100.0  # a scale whose logits need the running maximum


@dataclass(frozen=True)
class Check:
    """The kernels against float64 at one size, over memory that holds NaN where nothing has been written."""

    n: int
    d: int
    relation: str

    def case(self, harvest: Harvest) -> Case:
        n = harvest.rows(self.n)
        fields = RELATIONS[self.relation]
        return Case(n=n, d=harvest.width(self.d), **fields | ({"m": n} if "m" in fields else {}))

    def outputs(self, harvest: Harvest) -> dict[str, torch.Tensor]:
        case = self.case(harvest)
        return evaluate(case, case.inputs(), "triton", harvest.half, harvest.device)

    def run(self, harvest: Harvest) -> None:
        case = self.case(harvest)
        inputs = case.inputs()
        for name in ("q", "k"):
            inputs[name] = None if inputs[name] is None else inputs[name].to(harvest.half).double()
        exact = evaluate(case, inputs, "reference", torch.float64, harvest.device)
        plain = evaluate(case, inputs, "reference", harvest.half, harvest.device)
        with poisoned_memory():
            actual = evaluate(case, inputs, "triton", harvest.half, harvest.device)
        q = inputs["q"].to(harvest.device)
        terms = {"grad s": ((exact["grad q"] * q).abs().sum() / case.scale).item()}  # a sum that cancels
        for name, value in actual.items():
            assert_as_accurate(value, exact[name], plain[name], harvest.half, name, magnitude=terms.get(name))


CHECKS = tuple(Check(n, d, relation) for n in ROWS for d in WIDTHS for relation in RELATIONS)


def run(harvest: Harvest) -> None:
    """A line for each: "ok", or a note."""
    take_the_path_of_large_batches(harvest)
    use_emulation(harvest)

    for key, check in all_checks():
        harvest.record(key, partial(_passed, check, harvest), FILE)


def all_checks() -> list[tuple[dict, Callable[[Harvest], None]]]:
    """Each with what its line begins with; it raises if it finds something wrong."""
    return [
        *(({"check": "float64", "n": c.n, "d": c.d, "relation": c.relation}, c.run) for c in CHECKS),
        *(({"check": name}, check) for name, check in OTHERS.items()),
        *(({"check": "k-means labels", "dtype": dtype}, partial(_labels, dtype=dtype)) for dtype in DTYPES),
    ]


def _passed(check: Callable[[Harvest], None], harvest: Harvest) -> dict:
    check(harvest)
    return {"ok": True, "note": ""}


@contextlib.contextmanager
def poisoned_memory():
    """New memory is NaN: an element that no kernel has written shows."""

    def poison(x):
        return x.fill_(torch.nan) if x.is_floating_point() and x.device.type != "meta" else x

    saved = torch.empty, torch.empty_like, torch.Tensor.new_empty
    torch.empty, torch.empty_like, torch.Tensor.new_empty = (
        lambda *a, _make=make, **k: poison(_make(*a, **k)) for make in saved
    )
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = saved


def _rows(harvest: Harvest, d: int = 128):
    random = torch.Generator(harvest.device).manual_seed(0)
    z = torch.randn(harvest.rows(8192), harvest.width(d), generator=random, device=harvest.device)
    return torch.nn.functional.normalize(z, dim=1).to(harvest.half).requires_grad_()


def _differ(a, b) -> float:
    """Relative, in the 2-norm; NaN in either is infinity."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm()).nan_to_num(torch.inf).item()


def _running_maximum(harvest: Harvest) -> None:
    case = Case(n=harvest.rows(8192), d=128, scale=COLD)
    inputs = case.inputs()
    inputs["q"] = inputs["q"].to(harvest.half).double()
    exact, plain = (evaluate(case, inputs, "reference", t, harvest.device) for t in (torch.float64, harvest.half))
    actual = evaluate(case, inputs, "triton", harvest.half, harvest.device)
    for name in ("lse 0", "grad q"):
        assert_as_accurate(actual[name], exact[name], plain[name], harvest.half, name)


def _nan_bias(harvest: Harvest) -> None:
    """A NaN in the bias of a key must reach every row's sum, and every gradient that it is part of."""
    for d in (128, 768):
        z = _rows(harvest, d)
        bias = torch.zeros(len(z), device=harvest.device)
        bias[5] = torch.nan
        out = streaming_logsumexp(z, z.detach(), scale=10.0, key_bias=bias, backend="triton")
        (grad,) = torch.autograd.grad(out.sum(), z)
        assert out.isnan().all(), f"D = {d}: a sum that is finite"
        assert grad.isnan().all(), f"D = {d}: a gradient that is finite"


def _step(z, scale):
    out = streaming_logsumexp(z, scale=scale, backend="triton")
    return (out, *torch.autograd.grad(out.sum(), z))


def _side_stream(harvest: Harvest) -> None:
    for d in (128, 768):
        z = _rows(harvest, d)
        expected = _step(z, 10.0)
        with harvest.on_stream():
            found = _step(z, 10.0)
        assert max(map(_differ, found, expected)) < 1e-3, f"D = {d}: another result than on the current stream"


def _graph_at_two_scales(harvest: Harvest) -> None:
    """One graph serves both sides of the bound on the logits: which path is right, the device decides."""
    for d in (128, 768):
        z = _rows(harvest, d)
        scale = torch.tensor(10.0, device=harvest.device)
        captured = []

        def step(z=z, scale=scale, captured=captured):
            captured[:] = _step(z, scale)

        replay = harvest.captured(step)
        for value in (10.0, COLD):
            scale.fill_(value)
            replay()
            difference = max(map(_differ, captured, _step(z, scale)))
            assert difference < 1e-3, f"D = {d}, scale {value}: the replay differs by {difference:.1e}"


def _backward_twice(harvest: Harvest) -> None:
    for d in (128, 768):
        z = _rows(harvest, d)
        out = streaming_logsumexp(z, scale=10.0, backend="triton").sum()
        first, second = (torch.autograd.grad(out, z, retain_graph=True)[0] for _ in range(2))
        assert first.equal(second), f"D = {d}: {(first != second).sum()} entries differ"


OTHERS = {
    "running maximum": _running_maximum,
    "NaN in a bias": _nan_bias,
    "side stream": _side_stream,
    "graph at two scales": _graph_at_two_scales,
    "backward twice, the same bits": _backward_twice,
}


def _labels(harvest: Harvest, dtype: str) -> None:
    assert extension.module is not None, extension.missing
    size = Size(harvest.rows(8191), 130, getattr(torch, dtype), clusters=20 if harvest.dry_run else 300)
    inputs = CASES["k-means iteration"].inputs(size, harvest.device)
    labels = prepare_rows(inputs.x[None], metric="euclidean", backend="cuda").nearest(inputs.centers[None].float())[0]
    assert not (wrong := truth(inputs).wrong_labels(labels[0])), f"{wrong} labels are not those of float64"
