"""Inputs of the streaming log-sum-exp, and its outputs with every gradient, for the tests of all backends."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ccl_fast import streaming_logsumexp
from tests.tolerance import assert_as_accurate


@dataclass(frozen=True)
class Case:
    n: int = 37
    m: int | None = None  # None is self-contrast
    d: int = 8
    scale: float = 10.0
    bias: bool = False
    removed: bool = False  # two thirds of the keys have a bias of -inf
    ids: int | None = None  # how many different
    candidates: str = "all"
    return_same: bool = False
    needs: str = "qksb"  # which inputs require a gradient

    def inputs(self, seed: int = 0) -> dict:
        generator = torch.Generator().manual_seed(seed)

        def unit(rows):
            x = torch.randn(rows, self.d, dtype=torch.float64, generator=generator)
            return torch.nn.functional.normalize(x, dim=1)

        keys = self.n if self.m is None else self.m
        draw = {"generator": generator, "dtype": torch.float64}
        bias = torch.randn(keys, **draw) if self.bias else None
        if self.removed:
            bias[torch.arange(keys) % 3 != 0] = -torch.inf
        return {
            "q": unit(self.n),
            "k": None if self.m is None else unit(keys),
            "scale": torch.tensor(self.scale, dtype=torch.float64),
            "key_bias": bias,
            "q_ids": None if self.ids is None else torch.randint(self.ids, (self.n,), generator=generator),
            "k_ids": None if None in (self.ids, self.m) else torch.randint(self.ids, (keys,), generator=generator),
            "weights": torch.randn(2, self.n, **draw),
        }


def evaluate(case: Case, inputs: dict, backend: str, dtype: torch.dtype, device="cpu") -> dict[str, Tensor]:
    """Outputs, and the gradients of their sum with random weights (empty rows left out)."""
    wide = torch.promote_types(dtype, torch.float32)
    moved = {}
    for name, x in inputs.items():
        if x is None or not x.is_floating_point():
            moved[name] = None if x is None else x.to(device)
        else:
            moved[name] = x.to(device=device, dtype=dtype if name in "qk" else wide)
    weights = moved.pop("weights")
    named = {"q": moved["q"], "k": moved["k"], "s": moved["scale"], "b": moved["key_bias"]}
    wanted = {name: x.requires_grad_() for name, x in named.items() if x is not None and name in case.needs}
    out = streaming_logsumexp(**moved, candidates=case.candidates, return_same=case.return_same, backend=backend)
    out = out if case.return_same else (out,)
    total = sum((w * x.masked_fill(x == -torch.inf, 0.0)).sum() for w, x in zip(weights, out, strict=False))
    grads = torch.autograd.grad(total, list(wanted.values()))
    for x in out:
        assert x.dtype == wide
    for x, g in zip(wanted.values(), grads, strict=True):
        assert g.dtype == x.dtype
    return {f"lse {i}": x for i, x in enumerate(out)} | {f"grad {n}": g for n, g in zip(wanted, grads, strict=True)}


def assert_agrees(case: Case, backend: str, dtype: torch.dtype = torch.float64, device="cpu", seed: int = 0) -> None:
    """`backend` against the reference in float64 of the same (rounded) inputs, by the tolerance rule."""
    inputs = case.inputs(seed)
    for name in ("q", "k"):
        inputs[name] = None if inputs[name] is None else inputs[name].to(dtype).double()
    exact = evaluate(replace(case, needs="qksb"), inputs, "reference", torch.float64)
    plain = evaluate(case, inputs, "reference", dtype)
    actual = evaluate(case, inputs, backend, dtype, device)
    # The gradient of the scale is the sum over all rows of <dq_i, q_i>, which cancels.
    terms = {"grad s": (exact["grad q"] * inputs["q"]).abs().sum() / abs(case.scale) if case.scale else None}
    for name, value in actual.items():
        what = f"{name} of {case}, {dtype}"
        assert_as_accurate(value, exact[name], plain[name], dtype, what, magnitude=terms.get(name))
