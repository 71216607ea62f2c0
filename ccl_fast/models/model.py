"""The network: a small convolutional encoder and a projection head."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Model(nn.Module):
    """``head(encoder(image))``: grey images [n, 1, 28, 28] -> features [n, width] -> embeddings [n, dim].

    The embeddings are not of unit length yet: loss and detectors normalise them.

    Args:
        width: number of the encoder's output features.
        dim: number of the head's output features.
        seed: seed of the initial weights (torch's global generator is left as it was).

    Paper: Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
    representations", 2020 (encoder and two-layer head).
    """

    def __init__(self, width: int = 128, dim: int = 64, *, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(
                *_block(1, 32), *_block(32, 64), *_block(64, width), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            )
            self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.encoder(images))


def _block(channels: int, out: int) -> tuple[nn.Module, ...]:
    """Half the resolution."""
    convolution = nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()


@torch.no_grad()
def embed(model: Model, images: Tensor) -> dict[str, Tensor]:
    """Features of images as they are, in evaluation mode: "encoder" [n, width] and "head" [n, dim]."""
    training = model.training
    model.eval()
    encoded = torch.cat([model.encoder(block) for block in images.split(1024)])
    projected = model.head(encoded)
    model.train(training)
    return {"encoder": encoded, "head": projected}
