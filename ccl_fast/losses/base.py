"""What every loss is: a module of a temperature, its own options, and the options that all have in common."""

import inspect
import math
from collections.abc import Callable
from typing import Literal, TypedDict, get_args, overload

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ccl_fast.checks import Candidates, check_choice, check_flag, checked_temperature, is_plain, product_dtype
from ccl_fast.distributed import EXCHANGES, NO_GROUP, Exchange, ExchangeWay, Group, check_process_group
from ccl_fast.errors import ArgumentError
from ccl_fast.losses import processes
from ccl_fast.losses.batch import Batch, check_batch
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.ops.backends import ContrastBackend, check_backend
from ccl_fast.ops.contrast_rows import runs
from ccl_fast.ops.contrast_tile import fits
from ccl_fast.ops.differentiable import savable
from ccl_fast.ops.ids import separate_unassigned
from ccl_fast.ops.logsumexp.distributed import Wanted, global_contrast
from ccl_fast.ops.normalize import normalize_embeddings

Reduction = Literal["mean", "sum", "none"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


class CommonOptions(TypedDict, total=False):
    """Options of every loss, besides the temperature: see `Loss`."""

    learnable_temperature: bool
    normalize: bool
    reduction: Reduction
    backend: ContrastBackend
    process_group: ProcessGroup | str | None
    exchange: ExchangeWay


class Loss(nn.Module):
    """Base of all losses: the temperature as a parameter or a constant, the common options, the reduction.

    A loss is built as ``Loss(temperature, *, own options, common options)`` and called as
    ``loss(embeddings, ids, centers, *, ...)`` or ``loss(queries, keys, ids, centers, *, ...)``, as far as it has such.
    One that cannot honour an option refuses all of its values but the default.

    Args:
        temperature: T, > 0, a number, also NumPy's or a tensor's of no dimensions; the initial value if learnable. It
            may be set later (``loss.temperature = 0.1``), as a schedule does.
        learnable_temperature: make log T a parameter (``log_temperature``, ``[1]``).
        normalize: scale embeddings, and what they are compared with, to unit length; if not, they are used as they
            come.
        reduction: "mean", "sum", or "none" (a loss per anchor).
        backend: of the streaming log-sum-exp: "auto", "triton", "blocked" or "reference".
        process_group: the batch is that of all processes of this torch.distributed group ("world": the default group),
            each of which passes its part, of any size, with ids that mean the same everywhere, and the same centres.
            Every process returns the loss of the whole batch ("none": of its own rows). Its gradients are those of
            that loss times the number of processes, for its own embeddings: averaged over processes, as
            DistributedDataParallel does, they make the gradient of the model that one process would find. That of a
            learnable temperature is whole on every process. None: this process's batch alone.
        exchange: how rows travel between processes: "all-gather" (every process holds the embeddings of all, once),
            or "ring" (three parts at a time).

    Attributes:
        unsupported: names of the arguments above that this loss cannot honour.

    Raises:
        ValueError: an argument has the wrong type or value, or one that this loss cannot honour.

    Example:
        >>> import torch
        >>> from ccl_fast.losses import InfoNCELoss, Loss
        >>> loss_fn = InfoNCELoss(0.07, learnable_temperature=True)
        >>> isinstance(loss_fn, Loss), [name for name, _ in loss_fn.named_parameters()]
        (True, ['log_temperature'])
    """

    unsupported: tuple[str, ...] = ()
    _own_options: tuple[str, ...] = ()  # names of a loss's arguments that are not common ones

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        learnable_temperature: bool = False,
        normalize: bool = True,
        reduction: Reduction = "mean",
        backend: ContrastBackend = "auto",
        process_group: ProcessGroup | str | None = None,
        exchange: ExchangeWay = "all-gather",
    ):
        super().__init__()
        given = {
            "temperature": temperature,
            "learnable_temperature": learnable_temperature,
            "normalize": normalize,
            "reduction": reduction,
            "backend": backend,
            "process_group": process_group,
            "exchange": exchange,
        }
        for name in self.unsupported:
            self._check_supported(name, given[name])
        temperature = checked_temperature("temperature", temperature)
        for name in ("learnable_temperature", "normalize"):
            check_flag(name, given[name])
        check_choice("reduction", reduction, REDUCTIONS)
        check_backend("streaming_logsumexp", backend)
        check_choice("exchange", exchange, EXCHANGES)
        check_process_group(process_group)
        self.normalize = normalize
        self.reduction: Reduction = reduction
        self.backend: ContrastBackend = backend
        self.process_group = process_group
        self.exchange: ExchangeWay = exchange
        self._temperature = temperature
        self._learns_temperature = learnable_temperature
        if learnable_temperature:
            # Its logarithm is learned: it stays positive whatever the optimiser does. [1]: FSDP shards no scalar.
            self.log_temperature = nn.Parameter(torch.empty(1))
            self._reset_temperature()

    def __init_subclass__(cls, **options):
        """Spells the common options out in the signature of an ``__init__`` that takes them as ``**common``."""
        super().__init_subclass__(**options)
        if "__init__" not in cls.__dict__:
            return
        signature = inspect.signature(cls.__init__)
        *own, last = signature.parameters.values()
        if last.kind is not inspect.Parameter.VAR_KEYWORD:
            return
        common = [p for name, p in _COMMON.items() if name not in signature.parameters]
        cls.__init__.__signature__ = signature.replace(parameters=[*own, *common])
        cls._own_options = tuple(p.name for p in own if p.name not in ("self", "temperature"))

    @property
    def temperature(self) -> float | Tensor:
        return self.log_temperature.exp().reshape(()) if self._learns_temperature else self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        """Set it, as a schedule does; of a learnable temperature it is where learning goes on."""
        if "temperature" in self.unsupported:
            self._check_supported("temperature", value)
        self._temperature = checked_temperature("temperature", value)
        self._reset_temperature()

    def reset_parameters(self) -> None:
        """Set what the module keeps in tensors to what was given, as after `torch.nn.Module.to_empty`."""
        self._reset_temperature()

    def _reset_temperature(self) -> None:
        if self._learns_temperature:
            nn.init.constant_(self.log_temperature, math.log(self._temperature))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Read also a temperature that was saved as a scalar."""
        name = f"{prefix}log_temperature"
        if isinstance(saved := state_dict.get(name), Tensor) and saved.ndim == 0:
            state_dict[name] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        own = {name: getattr(self, name, None) for name in self._own_options}
        shown = {name: value for name, value in own.items() if isinstance(value, bool | int | float | str)}
        learned = self.log_temperature if self._learns_temperature else None
        # On a meta tensor, or in the parts of several processes, it cannot be read.
        value = self._temperature if learned is None or not is_plain(learned) else learned.detach().exp().item()
        common = {
            "temperature": round(value, 6),
            "normalize": self.normalize,
            "reduction": self.reduction,
            "backend": self.backend,
        }
        if self.process_group is not None:
            common["exchange"] = self.exchange
        shown |= {name: value for name, value in common.items() if name not in self.unsupported}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items())

    @property
    def settings(self) -> dict:
        """What must be the same on every process, besides what `forward` is given."""
        names = ("temperature", "normalize", "reduction", "backend", "exchange", *self._own_options)
        return {name: getattr(self, name, None) for name in names}

    # ---- the batch ----

    def prepare(self, *given, **options) -> Batch:
        """The batch `as_given`, normalised."""
        batch = self.as_given(*given, **options)
        return batch._replace(z=self.unit(batch.z))

    def as_given(
        self,
        embeddings: Tensor,
        ids: Tensor | None,
        ids_name: str,
        centers: Tensor | None = None,
        center_temperature: float | Tensor | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> Batch:
        """Flatten views into rows, give each unassigned sample an id of its own; join other processes.

        Args:
            check: of further arguments.
        """

        def check_all() -> tuple[int, int]:
            counts = check_batch(embeddings, ids, ids_name, centers, center_temperature)
            check()
            return counts

        n, exchange, first = self.join_processes(
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
            row_ids = separate_unassigned(ids.long(), first)
        shape = embeddings.shape[:-1]
        if embeddings.ndim == 3:
            row_ids = row_ids.repeat_interleave(embeddings.shape[1])
        return Batch(embeddings.flatten(0, -2), row_ids, shape, exchange, first)

    def join_processes(
        self, check: Callable[[], tuple[int, int]], rows: dict, same: Callable[[], dict] = dict
    ) -> tuple[int, Exchange, int]:
        """Check the arguments of `forward` on every process of the group, if there is one.

        Args:
            check: of this process's arguments; it returns the number of samples, and of rows of each.
            rows: arguments whose number of rows is each process's own; all else of them must be the same on every one.
                The first are those that are contrasted.
            same: further arguments that must be the same; called after the check.

        Returns:
            How many samples are here, the exchange of rows with the other processes, and the number of the first
            sample here among those of all processes.

        Raises:
            ValueError: they are not the same. Also what the check of another process raises.
        """
        if self.process_group is None:
            samples, each = check()
            return samples, Exchange(NO_GROUP, [each * samples], self.exchange), 0
        return processes.join(self, check, rows, same)

    @overload
    def shared(self, x: Tensor, group: Group) -> Tensor: ...

    @overload
    def shared(self, x: float | Tensor, group: Group) -> float | Tensor: ...

    @overload
    def shared(self, x: float | Tensor | None, group: Group) -> float | Tensor | None: ...

    def shared(self, x: float | Tensor | None, group: Group) -> float | Tensor | None:
        """Return a parameter that is used in all rows of the batch: each process gets the whole of its gradient."""
        if not (isinstance(x, Tensor) and x.requires_grad):
            return x
        return group.share_gradient(x, self.reduction != "none")

    def unit(self, x: Tensor) -> Tensor:
        """Rows of unit length (if `normalize`), in the dtype of the matrix products."""
        dtype = product_dtype(x)
        if not self.normalize:
            return savable(x.to(dtype))
        return normalize_embeddings(x).to(dtype)

    def is_tile(self, rows: Tensor, keys: int, *scales: float | Tensor | None) -> bool:
        """Tell whether the whole of a batch's contrast may be a single dense tile, with logits of these scales."""
        is_plain_mean = self.normalize and self.reduction != "none" and self.process_group is None
        return is_plain_mean and self.backend == "auto" and fits(rows, keys, *scales)

    def is_of_rows(self, rows: Tensor) -> bool:
        """Tell whether `contrast_rows` serves a batch of any size."""
        return self.normalize and self.process_group is None and runs(rows, self.backend)

    # ---- sums over rows ----

    def logsumexp_over_rows(
        self, z: Tensor, ids: Tensor | None, candidates: Candidates, scale: float | Tensor, exchange: Exchange
    ) -> Tensor:
        """Log-sum-exp of every row over those other rows, of all processes, that are ``candidates`` by ids."""
        over = "same" if candidates == "same_id" else "other"
        wanted = Wanted(by_id=candidates != "all", **{over: True})
        return global_contrast(z, ids, scale=scale, wanted=wanted, exchange=exchange, backend=self.backend)[over]

    def logsumexp_among(
        self,
        anchors: Tensor,
        keys: Tensor | None,
        sample_ids: Tensor,
        candidates: Candidates,
        scale: float | Tensor,
        exchange: Exchange,
    ) -> Tensor:
        """Log-sum-exp of every anchor over those keys that are ``candidates`` by the samples' ids ``[n]``.

        Without keys, of both views of every sample over the other rows, as `both_directions` has them.
        """
        if keys is None:
            return self.logsumexp_over_rows(anchors, sample_ids.repeat(2), candidates, scale, exchange)
        return streaming_logsumexp(
            anchors,
            keys,
            scale=scale,
            q_ids=sample_ids,
            k_ids=sample_ids,
            candidates=candidates,
            backend=self.backend,
        )

    def both_directions(
        self,
        queries: Tensor,
        keys: Tensor | None,
        losses: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        symmetric: bool,
    ) -> Tensor:
        """Losses of two views, or of two towers, ``[n, 2]``; of one direction of two towers ``[n]``.

        Args:
            queries: ``[n, 2, d]`` without keys, else ``[n, d]``.
            losses: of anchors and their positives against keys, which are None for two views: there the anchors, all
                first views before all second ones, are keys of each other.
            symmetric: keys of two towers are anchors too.
        """
        if keys is None:
            z = self.unit(queries.transpose(0, 1).flatten(0, 1))
            return losses(z, z.roll(queries.shape[0], dims=0), None).view(2, -1).T
        q, k = self.unit(queries), self.unit(keys)
        rows = losses(q, k, k)
        return torch.stack((rows, losses(k, q, q)), dim=1) if symmetric else rows

    # ---- the result ----

    def reduce(
        self,
        losses: Tensor,
        has_positive: Tensor | None = None,
        shape: torch.Size | None = None,
        group: Group = NO_GROUP,
    ) -> Tensor:
        """The losses ``[...]`` reduced; under "none" as they are, or in a shape.

        Anchors without a positive (None: there are no such) contribute 0 and do not count in the mean; none at all
        gives 0. Of several processes each returns the sum or mean over all rows. The gradient is that of its own rows'
        part, times the number of processes, so that the mean of all processes' gradients is the gradient.
        """
        count = losses.numel()
        if has_positive is not None:
            losses, count = losses.flatten().masked_fill(~has_positive, 0.0), has_positive.sum()
        if self.reduction == "none":
            return losses if shape is None else losses.reshape(shape)
        return self.reduce_total(losses.sum(), count, group)

    def reduce_total(self, total: Tensor, count: int | Tensor, group: Group = NO_GROUP) -> Tensor:
        """The sum, or the mean, of losses whose sum and number are known, as `reduce`."""
        mean = self.reduction == "mean"
        if not group.is_null:
            return processes.reduce(total, torch.as_tensor(count, device=total.device), mean, group)
        if not mean:
            return total
        return total / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))

    def _check_supported(self, name: str, value) -> None:
        default = inspect.signature(type(self)).parameters[name].default
        if value != default:
            raise ArgumentError(
                f"{name}: expected {default!r}, the only value that {type(self).__name__} can honour, got {value!r}"
            )


_COMMON = {
    name: parameter
    for name, parameter in inspect.signature(Loss.__init__).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}
