"""The network that is trained: an encoder and a projection head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ccl_fast.models.backbones import build_backbone

if TYPE_CHECKING:
    from ccl_fast.data import Images

# Images that are embedded at a time.
BLOCK = 1024


class Model(nn.Module):
    """``head(encoder(images))``: images [n, c, h, w] -> features [n, width] -> embeddings [n, dim].

    The embeddings are not of unit length yet: loss and detectors normalise them.

    Args:
        backbone: the encoder: a name or a module, see :func:`build_backbone`.
        shape: (c, h, w) of the images.
        dim: number of the head's output features.
        stem: see :func:`build_backbone`.
        seed: of the initial weights (torch's global generator is left as it was).

    Raises:
        ArgumentError: there is no such backbone, or it is not for such images.

    Paper: Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
    representations", 2020 (encoder and two-layer head).
    """

    def __init__(
        self,
        backbone: str | nn.Module = "small",
        shape: tuple[int, int, int] = (1, 28, 28),
        dim: int = 64,
        *,
        stem: str = "auto",
        seed: int = 0,
    ):
        super().__init__()
        self.encoder, width = build_backbone(backbone, shape, stem=stem, seed=seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1)
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


@torch.no_grad()
def embed(model: Model, images: Images, rows: Tensor | None = None) -> dict[str, Tensor]:
    """Features of images as they are, in evaluation mode: "encoder" [n, width] and "head" [n, dim], float32.

    Args:
        model: it is left in the mode that it is in.
        images: all of them are embedded, or
        rows: those alone, int64 [n], in that order.
    """
    training = [module for module in model.modules() if module.training]
    device = next(model.parameters()).device
    model.eval()
    try:
        encoded = torch.cat([model.encoder(batch.to(device)).float() for batch in images.batches(BLOCK, rows)])
        projected = model.head(encoded)
    finally:
        for module in training:
            module.training = True
    return {"encoder": encoded, "head": projected}
