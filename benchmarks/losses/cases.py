"""The registry of cases: what is computed, on which inputs, by whom."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.ceilings import Work
from benchmarks.harness.contender import Size
from benchmarks.harness.timing import Step
from ccl_fast import CCLLoss, InfoNCELoss
from tests.oracles import plain

TEMPERATURE = 0.1


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

    def loss(self, backend: str = "auto") -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        """A module of embeddings, cluster ids and centres."""
        return CCLLoss(temperature=TEMPERATURE, form=self.form, backend=backend)

    def plain(self, embeddings: Tensor, ids: Tensor | None, centers: Tensor | None) -> Tensor:
        """The formula as a user writes it, dense."""
        if ids is None:
            return plain.nt_xent(embeddings, temperature=TEMPERATURE)
        return plain.supervised(embeddings, ids, centers, temperature=TEMPERATURE, inside=self.form == "inside")

    def units(self, size: Size, device: torch.device) -> float:
        """N x N x D matrix products: the upper triangle forward; backward the same again, and both directions."""
        if not self.backward:
            return 0.5
        # On a GPU the backward goes over all columns where the accumulator stays on chip.
        return 2.5 if device.type == "cuda" and size.d <= ON_CHIP_D else 2.0

    def work(self, size: Size, device: torch.device) -> Work:
        """With the centres, which get no gradient: their products and exponentials forward, and again backward."""
        pairs = size.n * size.clusters if self.centers else 0
        own = size.n**2 * (1.5 if device.type == "cuda" and self.backward else 1.0 if self.backward else 0.5)
        times = (3, 2) if self.backward else (1, 1)
        return Work(2 * size.d * (self.units(size, device) * size.n**2 + times[0] * pairs), own + times[1] * pairs)

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


@dataclass(frozen=True)
class TwoTowers(Case):
    """InfoNCE of two towers of n / 2 rows each, in both directions (CLIP)."""

    ids: bool = False
    centers: bool = False

    def loss(self, backend: str = "auto") -> Callable[[Tensor, Tensor | None, Tensor | None], Tensor]:
        module = InfoNCELoss(temperature=TEMPERATURE, backend=backend)
        return lambda embeddings, *_: module(*embeddings.unbind(1))

    def plain(self, embeddings: Tensor, ids: Tensor | None, centers: Tensor | None) -> Tensor:
        return plain.clip(embeddings, temperature=TEMPERATURE)

    def units(self, size: Size, device: torch.device) -> float:
        """A product of the towers forward; backward the same again and one for each tower: a quarter of N x N each.

        On a GPU each tower's rows meet the other's in both orders where the accumulator stays on chip; else the
        library multiplies the weights within the towers too, which are zeros.
        """
        if device.type != "cuda":
            return 1.0
        return 1.25 if size.d <= ON_CHIP_D else 1.5

    def work(self, size: Size, device: torch.device) -> Work:
        exponentials = 0.75 if device.type == "cuda" else 0.5
        return Work(2 * size.d * self.units(size, device) * size.n**2, exponentials * size.n**2)


# The largest embedding whose gradient a GPU's multiprocessor keeps on chip.
ON_CHIP_D = 256
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
            ("ours", *DENSE, "metric-learning SupCon", "metric-learning NTXent", "lightly", "inf-cl", "memeff"),
            ids=False,
            centers=False,
        ),
        TwoTowers("clip", ("ours", *DENSE, "torch linear_cross_entropy", "inf-cl towers")),
    )
}
