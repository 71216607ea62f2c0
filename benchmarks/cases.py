"""The registry of cases: what is computed, on which inputs, by whom."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import Step
from ccl_fast import CCLLoss

TEMPERATURE = 0.1


@dataclass(frozen=True)
class Size:
    n: int  # rows: one per view
    d: int
    dtype: torch.dtype = torch.float32
    clusters: int = 128


class Inputs(NamedTuple):
    embeddings: Tensor  # [n, d], or [n / 2, 2, d] without ids; a leaf that requires a gradient
    cluster_ids: Tensor | None  # [n]
    centers: Tensor | None  # [clusters, d]


@dataclass(frozen=True)
class Case:
    """An objective of `CCLLoss`; `contenders` are names in `contenders.CONTENDERS`."""

    name: str
    contenders: tuple[str, ...]
    form: str = "joint"
    ids: bool = True
    centers: bool = True
    backward: bool = True

    def loss(self, backend: str = "auto") -> CCLLoss:
        return CCLLoss(temperature=TEMPERATURE, form=self.form, backend=backend)

    def inputs(self, size: Size, device: torch.device, seed: int = 0) -> Inputs:
        """Normal random numbers (never zeros: they run faster than data), ids uniform over the clusters."""
        random = torch.Generator(device).manual_seed(seed)
        shape = (size.n, size.d) if self.ids else (size.n // 2, 2, size.d)
        embeddings = torch.randn(shape, generator=random, device=device).to(size.dtype)
        ids = centers = None
        if self.ids:
            ids = torch.randint(size.clusters, (size.n,), generator=random, device=device)
        if self.centers:
            centers = torch.randn(size.clusters, size.d, generator=random, device=device).to(size.dtype)
        return Inputs(embeddings.requires_grad_(self.backward), ids, centers)

    def step(self, loss: Callable[[Inputs], Tensor], inputs: Inputs) -> Step:
        """One forward, and with it one backward where the case has one."""

        def step():
            value = loss(inputs)
            if self.backward:
                torch.autograd.grad(value, inputs.embeddings)

        return step


DENSE = ("dense", "dense compiled")
CASES = {
    case.name: case
    for case in (
        Case("ccl", ("ours", *DENSE, "metric-learning SupCon")),
        Case("ccl forward", ("ours", *DENSE, "metric-learning SupCon"), backward=False),
        Case("ccl inside", ("ours", *DENSE), form="inside"),
        Case("supcon", ("ours", *DENSE, "metric-learning SupCon"), centers=False),
        Case(
            "nt-xent",
            ("ours", *DENSE, "metric-learning SupCon", "metric-learning NTXent", "inf-cl", "memeff"),
            ids=False,
            centers=False,
        ),
    )
}
