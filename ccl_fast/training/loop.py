"""The schedule: instance-level contrast to warm up, then the objective, with k-means now and then if it needs that."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ccl_fast.data import Images, Views
from ccl_fast.distributed import NO_GROUP, Group
from ccl_fast.losses import ProtoGCDLoss
from ccl_fast.models import Model, embed
from ccl_fast.training.config import Config, as_list
from ccl_fast.training.cooperation import CooperativeCCL
from ccl_fast.training.gradient_cache import cached_backward
from ccl_fast.training.objectives import BASELINE, OBJECTIVES
from ccl_fast.training.optimizers import make_optimizer
from ccl_fast.training.prototypes import Prototypes
from ccl_fast.training.pseudo_labels import PseudoLabels
from ccl_fast.training.random_views import embedded_views
from ccl_fast.training.randomness import seeded, shuffled

if TYPE_CHECKING:
    from lightning.fabric import Fabric

VIEWS = 2
ADVICE = "a lower learning rate may help"
# What the random numbers of a run are for.
ORDER, STEP, VIEWED = 0, 1, 2

Tensors = tuple[Tensor, ...] | list[Tensor]


class Run:
    """A model on its way through the schedule. After every step ``state_dict`` is all that the rest depends on.

    Args:
        config: checked and resolved; fitted to the images here, if it is not yet.
        images: the training images.
        fabric: device and precision.
        group: its processes do the same steps, each on its part of every batch; their states are the same at any time.
    """

    def __init__(self, config: Config, images: Images, fabric: Fabric, group: Group = NO_GROUP):
        config = config.fitted(len(images))
        assert config.batch_size is not None and config.clusters is not None  # as they are fitted
        self.config, self.images, self.fabric, self.group = config, images, fabric, group
        self.batch_size = config.batch_size
        self._epoch = images.epoch
        self.model = Model(
            config.backbone,
            images.shape,
            config.embedding_dim,
            stem=config.stem,
            pretrained=config.pretrained,
            seed=config.seed,
        )
        self.model.to(fabric.device).to(memory_format=self._memory_format)
        self.objective = OBJECTIVES[config.objective]
        self.loss_fn = self.objective.make_loss(config.temperature, group.process_group)
        if isinstance(self.loss_fn, CooperativeCCL):
            self.loss_fn.instance_weight = config.instance_weight
            self.loss_fn.instance_negatives = config.instance_negatives
        self.warm_up_fn = OBJECTIVES[BASELINE].make_loss(config.temperature, group.process_group)
        self.prototypes = Prototypes(
            as_list(config.clusters) if self.objective.needs == "prototypes" else [],
            config.embedding_dim,
            seed=config.seed,
            device=fabric.device,
        )
        self.optimizer = make_optimizer(
            config.optimizer,
            self.model.parameters(),
            self.prototypes,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            exclude_bias_and_norm=config.exclude_bias_and_norm,
            fused=config.fused_optimizer,
        )
        network = cast("nn.Module", torch.compile(self.model)) if config.compile_model else self.model
        self._network, self._stepper = fabric.setup(network, self.optimizer)
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(self.model, multi_avg_fn=_moving_average(config.ema), use_buffers=True)
            self.average.requires_grad_(False)
        self.views = Views(config.augmentation, images.shape)
        self.pseudo_labels = PseudoLabels(
            as_list(config.clusters),
            seed=config.seed,
            temperature=config.temperature,
            concentration=config.concentration,
            labels_from=config.labels_from,
            believe=config.believe if "believe" in self.objective.options else 1.0,
            device=fabric.device,
            group=group,
        )
        self.step = 0
        self.losses: list[float] = []  # mean of every epoch
        # Of the epoch under way:
        self.step_losses: list[float] = []
        self.log: dict[str, float] = {}

    @property
    def _memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.config.channels_last else torch.preserve_format

    @property
    def steps_per_epoch(self) -> int:
        return len(self._epoch) // self.batch_size

    def state_dict(self) -> dict:
        """Return the state as copies, on the CPU, of tensors and plain values."""
        state = {name: getattr(self, name) for name in _PLAIN}
        for name in _STATEFUL:
            state[name] = getattr(self, name).state_dict() if getattr(self, name) is not None else None
        return _copy(state)

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of a run like this one, or of one with another objective that is still in its warm-up."""
        state = _copy(state)
        if len(self.prototypes) and not state["prototypes"]:  # theirs begin after the warm-up
            state["prototypes"] = self.prototypes.state_dict()
            state["optimizer"]["param_groups"].append(self.optimizer.state_dict()["param_groups"][-1])
        for name in _PLAIN:
            setattr(self, name, state[name])
        for name in _STATEFUL:
            if state[name] is not None:
                getattr(self, name).load_state_dict(state[name])

    def advance(
        self,
        epochs: int,
        *,
        after_step: Callable[[], None] = lambda: None,
        after_epoch: Callable[[], None] = lambda: None,
        clustering: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """Train until ``epochs`` have been done in all; k-means runs within ``clustering()``."""
        size = self.batch_size
        used = self.steps_per_epoch * size
        own = self.group.part(size)  # of a batch
        keys = (self.group.rank,) if self.group.size > 1 else ()
        while len(self.losses) < epochs:
            if len(self.losses) in self.config.restarts and not self.step_losses:
                self.optimizer.state.clear()
            if self.objective.needs == "clusters" and not (self.is_warming_up or self.step_losses):
                with clustering():
                    self._cluster()
            order = self._epoch[shuffled(len(self._epoch), self.config.seed, ORDER, len(self.losses))[:used]]
            # Nothing is left if the run was stopped after the last step of an epoch.
            parts = order.view(-1, size)[len(self.step_losses) :, own]
            batches = self.images.batches(own.stop - own.start, parts.flatten()) if len(parts) else iter(())
            for rows in parts:
                with self.group.together():
                    images = next(batches)
                with seeded(self.fabric.device, self.config.seed, STEP, self.step, *keys):
                    self.step_losses.append(self._step(rows, images))
                after_step()
            if not all(parameter.isfinite().all() for parameter in (*self.model.parameters(), *self.prototypes)):
                raise FloatingPointError(f"weights are not finite after step {self.step}; {ADVICE}")
            self.losses.append(sum(self.step_losses) / len(self.step_losses))
            self.step_losses = []
            after_epoch()

    @property
    def is_warming_up(self) -> bool:
        return len(self.losses) < self.config.warmup_length

    @property
    def learning_rate(self) -> float:
        """The learning rate of the next step: linearly from 0 to its full value, then half a cosine down to 0.

        After a restart it is half a cosine from the full value again, to 0 at the next one or the end.

        It is a formula of the step and no scheduler of torch's: there is no second count of steps that has to be saved,
        loaded and kept in step with the first, by a run that is resumed in an epoch or begins with another's warm-up.
        """
        rise = self.config.lr_warmup_epochs * self.steps_per_epoch
        if self.step < rise:
            return self.config.learning_rate * self.step / rise
        ends = [epoch * self.steps_per_epoch for epoch in (*self.config.restarts, self.config.epochs)]
        begin = max([rise, *(end for end in ends[:-1] if end <= self.step)])
        progress = (self.step - begin) / (min(end for end in ends if end > begin) - begin)
        return self.config.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    @property
    def used_learning_rate(self) -> float:
        """The learning rate of the last step."""
        return self.optimizer.param_groups[0]["lr"]

    @property
    def center_weight(self) -> float:
        """The weight of the next step: from 0 at the end of the warm-up, linearly to its full value."""
        ramp = self.config.center_ramp_epochs * self.steps_per_epoch
        since = self.step - self.config.warmup_length * self.steps_per_epoch
        return self.config.center_weight * (min(since / ramp, 1.0) if ramp else 1.0)

    @property
    def hard_share(self) -> float:
        """ProtoGCD's share of hard labels in the next step: from 0.2 to 1 in half of the steps after the warm-up."""
        first = self.config.warmup_length * self.steps_per_epoch
        half = (self.config.epochs * self.steps_per_epoch - first) / 2
        return 0.2 + 0.8 * min((self.step - first) / half, 1.0)

    def _cluster(self) -> None:
        """Cluster the embeddings of the images as they are, if it is time to, before an epoch."""
        if (len(self.losses) - self.config.warmup_length) % self.config.recluster_every:
            self.log = {}
            return
        model = self.result
        n = len(self.images)
        with self.group.together():
            embeddings = embed(model, self.images, torch.arange(n, device="cpu")[self.group.part(n)])["head"]
        if any(self.group.gather_int(int(not embeddings.isfinite().all()))):
            raise FloatingPointError(f"embeddings are not finite at step {self.step}; {ADVICE}")

        def views() -> tuple[Tensor, list[Tensor]]:
            with seeded(self.fabric.device, self.config.seed, VIEWED, len(self.losses)):
                return embedded_views(model, self.images, self.views)

        self.log = self.pseudo_labels.update(embeddings, self.images.classes, views)

    def _step(self, rows: Tensor, images: Tensor) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        if isinstance(self.loss_fn, CooperativeCCL):
            self.loss_fn.center_weight = self.center_weight
        if isinstance(self.loss_fn, ProtoGCDLoss) and not self.is_warming_up:
            self.loss_fn.hard_share = self.hard_share
        images = images.to(self.fabric.device, non_blocking=True)
        # [images, views]: an image's views follow one another.
        views = torch.stack([self.views(images) for _ in range(VIEWS)], dim=1).flatten(0, 1)
        views = views.contiguous(memory_format=self._memory_format) if self.config.channels_last else views
        on_device = rows.to(self.fabric.device)

        def loss_of(embeddings: Tensor) -> Tensor:
            return self._loss(embeddings.unflatten(0, (len(rows), VIEWS)), on_device)

        self.optimizer.zero_grad()
        micro_batch = VIEWS * (self.config.micro_batch or self.batch_size)
        loss = cached_backward(self._network, views, loss_of, micro_batch, self.fabric.backward).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}; {ADVICE}")
        if len(self.losses) == self.config.warmup_length:  # in the objective's first epoch, as SwAV's authors do
            self.prototypes.hold()
        self._stepper.step()
        self.prototypes.rescale()
        _average_buffers(self.model, self.group)
        self.step += 1
        if self.average is not None:
            self.average.update_parameters(self.model)
        return loss

    def _loss(self, embeddings: Tensor, rows: Tensor) -> Tensor:
        """Return the loss of embeddings ``[b, views, d]`` of the training images of these numbers ``[b]``."""
        if self.is_warming_up:
            return OBJECTIVES[BASELINE].value(self.warm_up_fn, embeddings, [])
        return self.objective.value(self.loss_fn, embeddings, [*self.pseudo_labels.of(rows), *self.prototypes])

    @property
    def result(self) -> Model:
        """The model to use: the average of the weights if there is one."""
        return self.model if self.average is None else cast("Model", self.average.module)


_PLAIN = ("step", "losses", "step_losses", "log")
_STATEFUL = ("model", "prototypes", "optimizer", "average", "pseudo_labels")


@torch.no_grad()
def _average_buffers(model: nn.Module, group: Group) -> None:
    """Set running statistics to their mean over the processes, and other buffers to the first process's."""
    buffers = list(model.buffers())
    if group.size == 1 or not buffers:
        return
    # In float64, which holds the whole numbers that occur, such as counts of batches.
    own = [x.double() / group.size if x.is_floating_point() else x.double() * group.is_first for x in buffers]
    for buffer, total in zip(buffers, group.sums(*own), strict=True):
        buffer.copy_(total)


def _moving_average(decay: float):
    """Make the average of ``AveragedModel``; torch's moves integer buffers too, such as indices."""
    of_numbers = get_ema_multi_avg_fn(decay)

    def average(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            of_numbers(averaged, current, count)
        else:
            for mean, newest in zip(averaged, current, strict=True):
                mean.copy_(newest)

    return average


def _copy(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state
