"""The schedule: instance-level contrast to warm up, then k-means before every epoch, and contrast on its clusters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from ccl_fast.clustering import KMeans, align_clusters
from ccl_fast.losses import CCLLoss
from ccl_fast.training.data import augment
from ccl_fast.training.gradient_cache import cached_backward
from ccl_fast.training.model import Model, embed

WEIGHT_DECAY = 1e-4
VIEWS = 2


@dataclass(frozen=True)
class Plan:
    """What all runs of one comparison share."""

    images: Tensor
    epochs: int
    clusters: int
    batch_size: int
    temperature: float
    center_weight: float
    learning_rate: float
    seed: int
    micro_batch: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // self.batch_size


class Run:
    """A model on its way through the plan. After every step ``state_dict`` is all that the rest depends on."""

    def __init__(self, plan: Plan, fabric: Fabric):
        self.plan, self.fabric = plan, fabric
        model = Model(seed=plan.seed)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
        self.model, self.optimizer = fabric.setup(model, optimizer)
        self.generator = torch.Generator(plan.images.device).manual_seed(plan.seed)
        self.loss_fn = CCLLoss(plan.temperature, plan.center_weight)
        self.step = 0
        self.losses: list[float] = []  # mean of every epoch
        # Of the epoch under way:
        self.order: Tensor | None = None
        self.step_losses: list[float] = []
        self.ids: Tensor | None = None
        self.centers: Tensor | None = None
        self.clustering: dict[str, float] = {}  # what is worth a line in the log

    def state_dict(self) -> dict:
        """Copies, on the CPU, of tensors and plain values."""
        state = {name: getattr(self, name) for name in _PLAIN + _TENSORS}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        return _copy(state | {"generator": self.generator.get_state()})

    def load_state_dict(self, state: dict) -> None:
        state = _copy(state)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        for name in _PLAIN:
            setattr(self, name, state[name])
        for name in _TENSORS:
            setattr(self, name, None if state[name] is None else state[name].to(self.plan.images.device))

    def advance(
        self,
        epochs: int,
        *,
        clustered: bool,
        name: str,
        after_step: Callable[[], None] = lambda: None,
        after_epoch: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until ``epochs`` have been done in all, with clusters (CCL) or by instance-level contrast (SimCLR)."""
        plan = self.plan
        used = plan.steps_per_epoch * plan.batch_size
        images = (epochs - len(self.losses)) * used
        with tqdm(total=images, desc=name, unit=" images", unit_scale=True) as bar:
            bar.update(len(self.step_losses) * plan.batch_size)
            while len(self.losses) < epochs:
                if self.order is None:
                    if clustered:
                        self._cluster()
                    self.order = torch.randperm(len(plan.images), generator=self.generator, device=plan.images.device)
                for batch in self.order[:used].split(plan.batch_size)[len(self.step_losses) :]:
                    self.step_losses.append(self._step(batch))
                    bar.set_postfix(loss=f"{self.step_losses[-1]:.3f}", refresh=False)
                    bar.update(len(batch))
                    after_step()
                self.losses.append(sum(self.step_losses) / len(self.step_losses))
                self.order, self.step_losses = None, []
                after_epoch()

    @property
    def learning_rate(self) -> float:
        """Of the next step: half a cosine down to 0."""
        progress = self.step / (self.plan.epochs * self.plan.steps_per_epoch)
        return self.plan.learning_rate * (1 + math.cos(math.pi * progress)) / 2

    def _cluster(self) -> None:
        """Cluster the embeddings of the images as they are, from the last epoch's centres if there are any."""
        plan, previous = self.plan, self.ids
        start = "k-means++" if self.centers is None else self.centers
        kmeans = KMeans(plan.clusters, metric="cosine", init=start, n_init=5, seed=plan.seed)
        embeddings = embed(self.model, plan.images)["head"]
        if not embeddings.isfinite().all():
            raise FloatingPointError(f"embeddings are not finite at step {self.step}; a lower learning rate may help")
        self.ids, self.centers = kmeans.fit_predict(embeddings), kmeans.cluster_centers_
        sizes = self.ids.bincount(minlength=plan.clusters)
        self.clustering = {"smallest_cluster": sizes.min().item(), "largest_cluster": sizes.max().item()}
        if previous is not None:
            renamed = align_clusters(self.ids, previous, plan.clusters)[self.ids]
            self.clustering["changed_labels"] = (renamed != previous).double().mean().item()

    def _step(self, batch: Tensor) -> float:
        plan = self.plan
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate
        images = plan.images[batch]
        views = torch.stack([augment(images, self.generator) for _ in range(VIEWS)], dim=1)
        ids = None if self.ids is None else self.ids[batch]

        def loss_of(embeddings: Tensor) -> Tensor:
            return self.loss_fn(embeddings.unflatten(0, (len(batch), VIEWS)), ids, self.centers)

        self.optimizer.zero_grad()
        micro_batch = VIEWS * (plan.micro_batch or plan.batch_size)
        loss = cached_backward(self.model, views.flatten(0, 1), loss_of, micro_batch, self.fabric.backward).item()
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step}; a lower learning rate may help")
        self.optimizer.step()
        self.step += 1
        return loss


_PLAIN = ("step", "losses", "step_losses", "clustering")
_TENSORS = ("order", "ids", "centers")


def _copy(state):
    if isinstance(state, Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, dict):
        return {key: _copy(value) for key, value in state.items()}
    return [_copy(value) for value in state] if isinstance(state, list) else state
