"""What an encoder's layers see: statistics of their feature maps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ccl_fast.models.libraries import Adapted

# Channels of a map that are looked at, as the covariance of more costs too much; a random choice of them loses little
# (Defard et al., "PaDiM", 2021).
MAX_CHANNELS = 256


class LayerStatistics:
    """Mean and standard deviation over the positions, per channel, of every feature map that an encoder makes.

        with LayerStatistics(encoder) as layers:
            features = encoder(images)
        layers.statistics  # of every layer [n, 2 c]

    A layer is a module that the encoder, or a `Sequential` in it, is made of; normalisations, which change no
    Mahalanobis distance, and maps of a single position are left out. A network without maps, a transformer for
    instance, has none. Maps are taken to be [n, c, h, w]; of a network that has its channels last (Swin) these are
    statistics of the maps' rows.

    Attributes:
        statistics: of the last call, in the order of the calls of the layers; float32.
    """

    def __init__(self, encoder: nn.Module):
        self.encoder = encoder
        self.statistics: list[Tensor] = []

    def __enter__(self) -> LayerStatistics:
        self._hooks = [module.register_forward_hook(self._look) for module in _layers(self.encoder)]
        self._hooks.append(self.encoder.register_forward_pre_hook(lambda *_: self.statistics.clear()))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, module: nn.Module, arguments: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() == 4 and output.shape[2] * output.shape[3] > 1:
            # Channels that are kept are the same for every image, model and run.
            maps = output.detach()[:, _kept(output.shape[1])].flatten(2).float()
            self.statistics.append(torch.cat([maps.mean(2), maps.std(2, correction=0)], 1))


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    for child in (module.network if isinstance(module, Adapted) else module).children():
        if isinstance(child, nn.Sequential):
            yield from _layers(child)
        elif not isinstance(child, nn.Identity | _BatchNorm):
            yield child


def _kept(channels: int) -> Tensor | slice:
    if channels <= MAX_CHANNELS:
        return slice(None)
    return torch.randperm(channels, generator=torch.Generator().manual_seed(channels), device="cpu")[:MAX_CHANNELS]
