"""The network that is trained: an encoder and a projection head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from ccl_fast.models.backbones import build_backbone
from ccl_fast.models.layers import LayerStatistics

if TYPE_CHECKING:
    from ccl_fast.models.libraries import Pretrained, Stem

# Images that are embedded at a time.
BLOCK = 1024


class Batches(Protocol):
    """Images that come in batches, such as `ccl_fast.data.Images`."""

    def batches(self, batch_size: int, order: Tensor | None = None, /) -> Iterator[Tensor]: ...


class Model(nn.Module):
    """``head(encoder(images))``: images [n, c, h, w] -> features [n, width] -> embeddings [n, dim].

    The embeddings are not of unit length yet: loss and detectors normalise them.

    Args:
        backbone: the encoder: a name or a module, see :func:`build_backbone`.
        shape: (c, h, w) of the images.
        dim: number of the head's output features.
        stem, pretrained, load: see :func:`build_backbone`.
        seed: of the initial weights (torch's global generator is left as it was).

    Raises:
        ArgumentError: there is no such backbone, or it is not for such images.

    Example:
        >>> import torch
        >>> from ccl_fast.models import Model
        >>> model = Model("small", shape=(1, 28, 28), dim=64).eval()
        >>> images = torch.rand(2, 1, 28, 28)
        >>> model.features(images).shape, model.embed(images).shape
        (torch.Size([2, 128]), torch.Size([2, 64]))

    Paper: Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
    representations", 2020 (encoder and two-layer head).
    """

    def __init__(
        self,
        backbone: str | nn.Module = "small",
        shape: tuple[int, int, int] = (1, 28, 28),
        dim: int = 64,
        *,
        stem: Stem = "auto",
        pretrained: Pretrained = False,
        load: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder, width = build_backbone(backbone, shape, stem=stem, pretrained=pretrained, load=load, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))

    def features(self, images: Tensor) -> Tensor:
        """The encoder's features, before the head, of images [n, c, h, w]: [n, width]."""
        return self.encoder(images)

    def embed(self, images: Tensor) -> Tensor:
        """The embeddings, behind the head, of images [n, c, h, w]: [n, dim]; the same as calling the model."""
        return self(images)


@torch.no_grad()
def embed(model: Model, images: Batches, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Features of images as they are, in evaluation mode: "encoder" [n, width] and "head" [n, dim], float32.

    Args:
        model: it is left in the mode that it is in.
        images: all of them are embedded, or
        rows: those alone, int64 [n], in that order.
    """
    with _evaluation(model):
        encoded = torch.cat([model.encoder(batch).float() for batch in _batches(model, images, rows)])
        return {"encoder": encoded, "head": model.head(encoded)}


@torch.no_grad()
def embed_layers(model: Model, images: Batches) -> tuple[dict[str, Tensor], list[int]]:
    """As :func:`embed`, and "all": the features of head and encoder and the :class:`LayerStatistics`, side by side.

    Returns:
        The features, and how wide each part of "all" is: the head's features, the encoder's, then layer by layer.
    """
    batches, widths = [], []
    for of_batch, widths in embedded_batches(model, images):  # noqa: B007 (the last ones are those of all)
        batches.append(of_batch)
    return {level: torch.cat([of[level] for of in batches]) for level in batches[0]}, widths


def embedded_batches(model: Model, images: Batches) -> Iterator[tuple[dict[str, Tensor], list[int]]]:
    """Yield what :func:`embed_layers` returns, a batch of 1,024 images at a time: memory does not grow with theirs."""
    with _evaluation(model), LayerStatistics(model.encoder) as layers:
        for batch in _batches(model, images):
            with torch.no_grad():
                encoded = model.encoder(batch).float()
                head = model.head(encoded)
                parts = [head, encoded, *layers.statistics]
                features = {"encoder": encoded, "head": head, "all": torch.cat(parts, 1)}
            yield features, [part.shape[1] for part in parts]


def _batches(model: Model, images: Batches, rows: Tensor | None = None) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    return (batch.to(device) for batch in images.batches(BLOCK, rows))


@contextmanager
def _evaluation(model: Model) -> Iterator[None]:
    """Every module gets back the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
