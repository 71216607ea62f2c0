"""The schedule: instance-level contrast to warm up, then k-means before every epoch, and contrast on its clusters."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ccl_fast.clustering import KMeans
from ccl_fast.losses import CCLLoss
from ccl_fast.training.data import augment
from ccl_fast.training.model import Model, embed

WEIGHT_DECAY = 1e-4


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

    @property
    def steps_per_epoch(self) -> int:
        return len(self.images) // self.batch_size


class Run:
    """A model on its way through the plan. ``copy.deepcopy`` forks it, random state included."""

    def __init__(self, model: Model, plan: Plan):
        self.model, self.plan = model, plan
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
        self.generator = torch.Generator(plan.images.device).manual_seed(plan.seed)
        self.loss_fn = CCLLoss(plan.temperature, plan.center_weight)
        self.step = 0
        self.losses: list[float] = []  # mean of every epoch

    def __deepcopy__(self, memo: dict) -> Run:
        memo[id(self.plan)] = self.plan  # the images are shared
        fork = copy.copy(self)
        fork.__dict__ = copy.deepcopy(self.__dict__, memo)
        return fork

    def advance(self, epochs: int, *, clustered: bool, name: str) -> None:
        """Train some epochs, with clusters (CCL) or by instance-level contrast (SimCLR)."""
        plan = self.plan
        used = plan.steps_per_epoch * plan.batch_size
        ids = centers = None
        with tqdm(total=epochs * used, desc=name, unit=" images", unit_scale=True) as bar:
            for _ in range(epochs):
                if clustered:
                    ids, centers = self._cluster(centers)
                order = torch.randperm(len(plan.images), generator=self.generator, device=plan.images.device)
                losses = []
                for batch in order[:used].split(plan.batch_size):
                    losses.append(self._step(batch, None if ids is None else ids[batch], centers))
                    bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
                    bar.update(len(batch))
                self.losses.append(sum(losses) / len(losses))

    def _cluster(self, centers: Tensor | None) -> tuple[Tensor, Tensor]:
        """Cluster the embeddings of the images as they are, from the last epoch's centres if there are any."""
        plan = self.plan
        start = "k-means++" if centers is None else centers
        kmeans = KMeans(plan.clusters, metric="cosine", init=start, n_init=5, seed=plan.seed)
        embeddings = embed(self.model, plan.images)["head"]
        if not embeddings.isfinite().all():
            raise FloatingPointError(f"embeddings are not finite at step {self.step}; a lower learning rate may help")
        return kmeans.fit_predict(embeddings), kmeans.cluster_centers_

    def _step(self, batch: Tensor, ids: Tensor | None, centers: Tensor | None) -> float:
        plan = self.plan
        progress = self.step / (plan.epochs * plan.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate * (1 + math.cos(math.pi * progress)) / 2

        images = plan.images[batch]
        views = torch.stack([augment(images, self.generator) for _ in range(2)], dim=1)
        embeddings = self.model(views.flatten(0, 1)).unflatten(0, (len(batch), 2))
        loss = self.loss_fn(embeddings, ids, centers)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}; a lower learning rate may help")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.step += 1
        return loss.item()
