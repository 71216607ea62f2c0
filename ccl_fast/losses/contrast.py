"""What every contrastive loss here shares: views and ids, unit vectors, temperature, reduction, several processes."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ccl_fast.checks import (
    check_choice,
    check_floating,
    check_integer,
    check_matrix,
    check_positive,
    check_same,
    check_tensor,
    check_vector,
)
from ccl_fast.distributed import EXCHANGES, Peers, check_process_group, outside_of_graphs
from ccl_fast.errors import ArgumentError
from ccl_fast.ops import logaddexp, row_dot, same_id_similarity, streaming_logsumexp
from ccl_fast.ops.backends import check_backend, choose_backend
from ccl_fast.ops.ids import separate_unassigned
from ccl_fast.ops.logsumexp.distributed import Exchange, Wanted, global_contrast
from ccl_fast.ops.normalize import normalize_embeddings
from ccl_fast.ops.precision import accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


class Batch(NamedTuple):
    """One row per view. Rows with one id are positives of each other."""

    z: Tensor  # [n, d]
    ids: Tensor  # [n] int64; an unassigned sample has an id (< 0) of its own
    shape: torch.Size  # of the result under reduction="none": [n] or [n, views]
    exchange: Exchange | None  # with the other processes' rows, if there are any

    @property
    def assigned(self) -> Tensor:
        return self.ids >= 0


class ContrastiveLoss(nn.Module):
    """Base of the losses: the temperature as a parameter or a constant, preparation and reduction."""

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str = "auto",
        process_group: ProcessGroup | str | None = None,
        exchange: str = "all-gather",
    ):
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("reduction", reduction, REDUCTIONS)
        check_backend("streaming_logsumexp", backend)
        check_choice("exchange", exchange, EXCHANGES)
        if process_group is not None:
            check_process_group(process_group)
        self.normalize, self.reduction, self.backend = normalize, reduction, backend
        self.process_group, self.exchange = process_group, exchange
        self._temperature = temperature
        if learnable_temperature:
            # Its logarithm is learned: it stays positive whatever the optimiser does.
            self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp() if hasattr(self, "log_temperature") else self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        """For schedules; of a learnable temperature it is where learning goes on."""
        check_positive("temperature", value)
        self._temperature = value
        if hasattr(self, "log_temperature"):
            nn.init.constant_(self.log_temperature, math.log(value))

    def extra_repr(self) -> str:
        temperature = float(torch.as_tensor(self.temperature).detach())
        text = (
            f"temperature={temperature:.4g}, normalize={self.normalize}, "
            f"reduction={self.reduction!r}, backend={self.backend!r}"
        )
        return text if self.process_group is None else f"{text}, exchange={self.exchange!r}"

    @property
    def settings(self) -> dict:
        """What must be the same on every process, besides what `forward` is given."""
        names = ("temperature", "normalize", "reduction", "backend", "exchange")
        return {name: getattr(self, name) for name in names}

    def prepare(
        self,
        embeddings: Tensor,
        ids: Tensor | None,
        ids_name: str,
        centers: Tensor | None = None,
        center_temperature: float | Tensor | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> Batch:
        """Flatten views into rows, give each unassigned sample an id of its own, normalise; meet other processes.

        Args:
            check: of further arguments.
        """

        def check_all() -> tuple[int, int]:
            counts = check_batch(embeddings, ids, ids_name, centers, center_temperature)
            check()
            return counts

        n, exchange, first = self.meet(
            check_all,
            {"embeddings": embeddings},
            lambda: {
                ids_name: None if ids is None else "given",
                "centers": centers,
                "center_temperature": center_temperature,
            },
        )
        if ids is None:
            row_ids = torch.arange(first, first + n, device=embeddings.device)
        else:
            row_ids = separate_unassigned(ids, first)
        shape = embeddings.shape[:-1]
        if embeddings.ndim == 3:
            row_ids = row_ids.repeat_interleave(embeddings.shape[1])
        return Batch(self.unit(embeddings.flatten(0, -2)), row_ids, shape, exchange)

    def meet(
        self, check: Callable[[], tuple[int, int]], rows: dict, alike: Callable[[], dict] = dict
    ) -> tuple[int, Exchange | None, int]:
        """Check the arguments of `forward`, and meet the other processes: how many samples are here, how rows travel
        (None: nobody is met), and the number of the first sample among those of all processes.

        Args:
            check: of this process's arguments; it returns the number of samples, and of rows of each.
            rows: arguments whose number of rows is each process's own; all else of them must be the same on every one.
                The first are those that meet.
            alike: further arguments that must be the same; called after the check.

        Raises:
            ValueError: they are not, or the check of another process has failed.
        """
        if self.process_group is None:
            return check()[0], None, 0
        return self._meet_others(check, rows, alike)

    @outside_of_graphs
    def _meet_others(self, check: Callable, rows: dict, alike: Callable) -> tuple[int, Exchange, int]:
        peers = Peers(self.process_group)
        try:
            samples, each = check()
            first = next(iter(rows.values()))
            first = first if isinstance(first, Tensor) else first[0]
            choose_backend("streaming_logsumexp", self.backend, first.device, self.product_dtype(first))
            same = {name: describe(x, rows="n") for name, x in rows.items()}
            same |= {name: describe(x) for name, x in (alike() | self.settings).items()}
        except Exception as error:
            peers.agree(0, error)
            raise
        counts = peers.agree(samples, **same)
        return samples, Exchange(peers, [each * count for count in counts], self.exchange), sum(counts[: peers.rank])

    def shared(self, x: float | Tensor | None, exchange: Exchange | None) -> float | Tensor | None:
        """A parameter that is used in all rows of the batch: each process has the whole of its gradient."""
        if exchange is None or not (isinstance(x, Tensor) and x.requires_grad):
            return x
        return _share_gradient(x, exchange.peers, self.reduction != "none")

    def self_contrast(
        self, z: Tensor, ids: Tensor | None, candidates: str, scale: float | Tensor, exchange: Exchange | None
    ) -> Tensor:
        """Log-sum-exp of every row over those other rows, of all processes, that are ``candidates`` by ids."""
        if exchange is None:
            return streaming_logsumexp(z, scale=scale, q_ids=ids, candidates=candidates, backend=self.backend)
        over = "same" if candidates == "same_id" else "other"
        wanted = Wanted(by_id=candidates != "all", **{over: True})
        return global_contrast(z, ids, scale=scale, wanted=wanted, exchange=exchange, backend=self.backend)[over]

    def contrast(self, batch: Batch, scale: float | Tensor, *, inside: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of every row, over all other rows: log-sum-exp of the logits, and what the positives bring, which is their
        log-sum-exp (``inside`` the logarithm), or else the sum of their logits; then their number comes third."""
        if batch.exchange is None:
            if inside:
                others, positives = streaming_logsumexp(
                    batch.z, scale=scale, q_ids=batch.ids, return_same=True, backend=self.backend
                )
                return others, positives, None
            others = streaming_logsumexp(batch.z, scale=scale, backend=self.backend)
            positives, count = same_id_similarity(batch.z, batch.ids)
            return others, positives * scale, count
        wanted = Wanted(same=True, other=True) if inside else Wanted(other=True, similarity=True)
        found = global_contrast(
            batch.z, batch.ids, scale=scale, wanted=wanted, exchange=batch.exchange, backend=self.backend
        )
        if inside:
            return logaddexp(found["same"], found["other"]), found["same"], None
        return found["other"], found["similarity"] * scale, found["count"]

    def contrast_centers(
        self, batch: Batch, centers: Tensor, temperature: float | Tensor | None, scale: float | Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-sum-exp over the centres, and the logit of the row's own centre (0 if unassigned).

        ``temperature`` of the centres: a number, a tensor [k] (one per cluster), or None for 1 / ``scale``. Centres
        get no gradient. All are expected to be checked, as `check_batch` does.
        """
        temperature = self.shared(temperature, batch.exchange)
        accumulation = accumulation_dtype(batch.z)
        centers = self.unit(centers.detach().to(accumulation)).to(batch.z.dtype)
        own = batch.ids.clamp(min=0)
        own_center = _OwnCenter.apply(batch.z, centers, own)
        if isinstance(temperature, Tensor):
            temperature = temperature.to(accumulation)
        if isinstance(temperature, Tensor) and temperature.ndim == 1:
            own_center = own_center / temperature[own]
            centers, scale = (centers / temperature[:, None]).to(batch.z.dtype), 1.0
        else:
            scale = scale if temperature is None else 1.0 / temperature
            own_center = own_center * scale
        logsumexp = streaming_logsumexp(batch.z, centers, scale=scale, backend=self.backend)
        return logsumexp, own_center.masked_fill(~batch.assigned, 0.0)

    @staticmethod
    def product_dtype(x: Tensor) -> torch.dtype:
        """That the matrix products shall have: autocast's, or that of x."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            return torch.get_autocast_dtype(x.device.type)
        return x.dtype

    def unit(self, x: Tensor) -> Tensor:
        """Rows of unit length (if `normalize`), in the dtype of the matrix products."""
        dtype = self.product_dtype(x)
        if not self.normalize:
            return x.to(dtype)
        return normalize_embeddings(x).to(dtype)

    def reduce(
        self, losses: Tensor, has_positive: Tensor, shape: torch.Size, exchange: Exchange | None = None
    ) -> Tensor:
        """Anchors without a positive contribute 0 and do not count in the mean; none at all gives 0.

        Of several processes each returns the sum or mean over all rows. The gradient is that of its own rows' part,
        times the number of processes, so that the mean of all processes' gradients is the gradient.
        """
        losses = losses.masked_fill(~has_positive, 0.0)
        if self.reduction == "none":
            return losses.view(shape)
        total, count = losses.sum(), has_positive.sum()
        if exchange is None:
            return total if self.reduction == "sum" else total / count.clamp(min=1)
        return _over_processes(total, count, self.reduction == "mean", exchange.peers)


@outside_of_graphs
def _share_gradient(x: Tensor, peers: Peers, mean: bool) -> Tensor:
    return peers.share_gradient(x, mean)


@outside_of_graphs
def _over_processes(total: Tensor, count: Tensor, mean: bool, peers: Peers) -> Tensor:
    value, all_count = peers.sum(torch.stack((total.detach().double(), count.double())))
    share = peers.size * total
    if mean:
        all_count = all_count.clamp(min=1)
        value, share = value / all_count, share / all_count.to(share.dtype)
    return _WithValue.apply(share, value.to(share.dtype))


class _WithValue(torch.autograd.Function):
    """Another value, the gradient of x."""

    @staticmethod
    def forward(ctx, x, value):
        return value.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _OwnCenter(torch.autograd.Function):
    """<z_i, c_{y_i}> in float32: linear in z, so nothing of the size of z is kept for the backward."""

    @staticmethod
    def forward(ctx, z, centers, ids):
        ctx.save_for_backward(centers, ids)
        ctx.dtype = z.dtype
        return row_dot(z, centers[ids])

    @staticmethod
    def backward(ctx, grad):
        centers, ids = ctx.saved_tensors
        return (grad[:, None] * centers[ids]).to(ctx.dtype), None, None


def number_of(share: float, total: int) -> int:
    """How many a share is, rounded up; 0.07 * 100 is a little more than 7."""
    return math.ceil(round(share * total, 9))


def describe(x, rows: str | None = None) -> object:
    """What the processes compare of an argument: of tensors all but their numbers, or the number of their rows too."""
    if isinstance(x, list | tuple):
        return f"[{', '.join(str(describe(each, rows)) for each in x)}]"
    if not isinstance(x, Tensor):
        return x if x is None or isinstance(x, bool | int | float | str) else type(x).__name__
    dtype = ContrastiveLoss.product_dtype(x) if x.is_floating_point() else x.dtype
    shape = ", ".join(map(str, x.shape if rows is None or x.ndim == 0 else [rows, *x.shape[1:]]))
    gradient = " with gradient" if x.requires_grad and torch.is_grad_enabled() else ""
    return f"{str(dtype).removeprefix('torch.')} [{shape}]{gradient}"


def check_batch(
    embeddings: Tensor,
    ids: Tensor | None,
    ids_name: str,
    centers: Tensor | None = None,
    center_temperature: float | Tensor | None = None,
    temperature_name: str = "center_temperature",
) -> tuple[int, int]:
    """Numbers of samples, and of rows of each."""
    check_tensor("embeddings", embeddings)
    check_floating("embeddings", embeddings)
    if embeddings.ndim not in (2, 3):
        raise ArgumentError(f"embeddings: expected shape [n, d] or [n, views, d], got {list(embeddings.shape)}")
    if embeddings.ndim == 2 and ids is None:
        raise ArgumentError(
            f"{ids_name}: expected integers [n] with embeddings [n, d], got None "
            "(without ids the views of a sample must be told apart: embeddings [n, views, d])"
        )
    if centers is not None:
        if ids is None:
            raise ArgumentError(f"{ids_name}: expected integers [n] with centers, got None")
        check_matrix("centers", centers, columns=embeddings.shape[-1])
        check_floating("centers", centers)
        check_same("centers", centers, "embeddings", embeddings, dtype=False)
        check_center_temperature(center_temperature, temperature_name)
        if isinstance(center_temperature, Tensor):
            check_same(temperature_name, center_temperature, "embeddings", embeddings, dtype=False)
            if center_temperature.ndim == 1:
                check_vector(temperature_name, center_temperature, len(centers))
    if ids is not None:
        check_vector(ids_name, ids, embeddings.shape[0])
        check_integer(ids_name, ids)
        check_same(ids_name, ids, "embeddings", embeddings, dtype=False)
        check_id_range(ids_name, ids, None if centers is None else len(centers))
    return embeddings.shape[0], embeddings.shape[1] if embeddings.ndim == 3 else 1


def check_center_temperature(value: float | Tensor | None, name: str = "center_temperature") -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point() or value.ndim > 1:
            raise ArgumentError(f"{name}: expected floating point of shape [k], got {value.dtype} {list(value.shape)}")
        if value.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((value > 0).all()):
            raise ArgumentError(f"{name}: expected positive numbers, got a smallest of {value.min():g}")
    elif value is not None:
        check_positive(name, value)


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
