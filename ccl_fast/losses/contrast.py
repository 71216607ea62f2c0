"""What every contrastive loss here shares: views and ids, unit vectors, temperature, reduction."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ccl_fast.ops.validation import (
    check_choice,
    check_floating,
    check_integer,
    check_same,
    check_tensor,
    check_vector,
)

REDUCTIONS = ("mean", "sum", "none")


class Batch(NamedTuple):
    """One row per view. Rows with one id are positives of each other."""

    z: Tensor  # [n, d]
    ids: Tensor  # [n] int64; an unassigned sample has an id (< 0) of its own
    shape: torch.Size  # of the result under reduction="none": [n] or [n, views]

    @property
    def assigned(self) -> Tensor:
        return self.ids >= 0


class ContrastiveLoss(nn.Module):
    """Base of the losses: the temperature as a parameter or a constant, preparation and reduction."""

    def __init__(
        self,
        temperature: float,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
    ):
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("reduction", reduction, REDUCTIONS)
        self.normalize, self.reduction, self.backend = normalize, reduction, backend
        self._temperature = temperature
        if learnable_temperature:
            # Its logarithm is learned: it stays positive whatever the optimiser does.
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if hasattr(self, "log_temperature") else self._temperature

    def extra_repr(self) -> str:
        temperature = float(torch.as_tensor(self.temperature).detach())
        return (
            f"temperature={temperature:.4g}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )

    def prepare(self, embeddings: Tensor, ids: Tensor | None, ids_name: str, number_of_ids: int | None = None) -> Batch:
        """Flatten views into rows, give each unassigned sample an id of its own, normalise."""
        check_tensor("embeddings", embeddings)
        check_floating("embeddings", embeddings)
        if embeddings.ndim not in (2, 3):
            raise ValueError(f"embeddings: expected shape [n, d] or [n, views, d], got {list(embeddings.shape)}")
        if embeddings.ndim == 2 and ids is None:
            raise ValueError(
                f"{ids_name}: expected integers [n] with embeddings [n, d], got None "
                "(without ids the views of a sample must be told apart: embeddings [n, views, d])"
            )
        n = embeddings.shape[0]
        sample = torch.arange(n, device=embeddings.device)
        if ids is None:
            ids = sample
        else:
            check_vector(ids_name, ids, n)
            check_integer(ids_name, ids)
            check_same(ids_name, ids, "embeddings", embeddings, dtype=False)
            check_id_range(ids_name, ids, number_of_ids)
            ids = torch.where(ids < 0, -1 - sample, ids)
        shape = embeddings.shape[:-1]
        if embeddings.ndim == 3:
            ids = ids.repeat_interleave(embeddings.shape[1])
        return Batch(self.unit(embeddings.flatten(0, -2)), ids, shape)

    def unit(self, x: Tensor) -> Tensor:
        """Rows of unit length (if `normalize`), in the dtype that the matrix products shall have."""
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(x.device.type)
        if not self.normalize:
            return x.to(dtype)
        return nn.functional.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1).to(dtype)

    def reduce(self, losses: Tensor, has_positive: Tensor, shape: torch.Size) -> Tensor:
        """Anchors without a positive contribute 0 and do not count in the mean; none at all gives 0."""
        losses = losses.masked_fill(~has_positive, 0.0)
        if self.reduction == "none":
            return losses.view(shape)
        total = losses.sum()
        return total if self.reduction == "sum" else total / has_positive.sum().clamp(min=1)


def check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_id_range(name: str, ids: Tensor, number: int | None) -> None:
    """-1 <= ids < number: an IndexError on a CPU; on a GPU an assertion on the device, as torch's own indexing."""
    expected = "at least -1" if number is None else f"from -1 to {number - 1} (there are {number} centers)"
    if torch.compiler.is_compiling() or ids.device.type != "cpu":
        inside = ids >= -1 if number is None else (ids >= -1) & (ids < number)
        torch._assert_async(inside.all(), f"{name}: expected ids {expected}")
    elif ids.numel():
        low, high = (int(x) for x in ids.aminmax())
        if low < -1 or (number is not None and high >= number):
            raise IndexError(f"{name}: expected ids {expected}, got {low} to {high}")
