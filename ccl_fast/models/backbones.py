"""Encoders by name: images [n, c, h, w] -> features [n, width]."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ccl_fast.errors import ArgumentError, first_line, packages_of_training
from ccl_fast.models.libraries import OWN, Pretrained, Stem, check_stem, library_network


def build_backbone(
    backbone: str | nn.Module,
    shape: tuple[int, int, int],
    *,
    stem: Stem = "auto",
    pretrained: Pretrained = False,
    load: bool = True,
    seed: int = 0,
) -> tuple[nn.Module, int]:
    """A new encoder, and how many features it gives.

    Args:
        backbone: "small" (three convolutions of stride 2, for images of about 28 pixels), "resnet8" (three residual
            blocks of 32, 64 and 128 channels at a half, a quarter and an eighth of the resolution: 0.3 million
            parameters, for small natural images on a CPU), one of torchvision's classifiers by name ("resnet18",
            "convnext_tiny", "vit_b_16", ...) or of timm's ("timm/vit_small_patch16_224") without its last layer, or a
            module, which is copied, weights included; it returns features ``[n, width]``, or as the models of Hugging
            Face's transformers do an object with ``pooler_output`` or ``last_hidden_state``.
        shape: (c, h, w) of the images. Grey images are given to the libraries' networks as three equal channels.
        stem: "3x3": a ResNet begins with a 3 x 3 convolution of stride 1 and no pooling, as is usual for small images
            (SimCLR, appendix B.9); "7x7": as it is; "auto": "3x3" for images of up to 64 pixels, unless the weights are
            pretrained.
        pretrained: False: random weights; True: those that torchvision or timm publishes, which it downloads once; or
            a file of such weights (.safetensors, or .pth by ``torch.save``). The network then begins with the
            normalisation that they expect, so that images are in [0, 1] in any case.
        load: read the pretrained weights; False: a state_dict is to replace them all.
        seed: of the initial weights (torch's global generator is left as it was).

    Raises:
        ArgumentError: there is no such backbone, or it does not turn such images into features [n, width].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone, nn.Module):
            _check_own("a module", stem, pretrained)
            built = _copied(backbone)
        elif backbone in OWN:
            _check_own(backbone, stem, pretrained)
            built = _small(shape[0]) if backbone == "small" else _resnet8(shape[0])
        else:
            built = library_network(backbone, shape, stem, pretrained, load)
    output = _output(built, shape, backbone)
    if hasattr(output, "last_hidden_state"):
        built = Pooled(built)
        output = _output(built, shape, backbone)
    return built, _width(output, backbone)


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # the module may be anybody's
        expected = "a module that copy.deepcopy can copy"
        raise ArgumentError(
            f"backbone: expected {expected}, got {type(module).__name__} ({first_line(error)})"
        ) from error


def _check_own(name: str, stem: Stem, pretrained: Pretrained) -> None:
    """Check what only the networks of libraries have."""
    check_stem(stem, False, name)
    if pretrained is not False:
        raise ArgumentError(f"pretrained: expected false for {name}, got {pretrained!r}")


def _small(channels: int) -> nn.Module:
    return nn.Sequential(
        *_block(channels, 32), *_block(32, 64), *_block(64, 128), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def _block(channels: int, out: int) -> tuple[nn.Module, ...]:
    """Half the resolution."""
    convolution = nn.Conv2d(channels, out, kernel_size=3, stride=2, padding=1, bias=False)
    return convolution, nn.BatchNorm2d(out), nn.ReLU()


def _resnet8(channels: int) -> nn.Module:
    with packages_of_training():
        from torchvision.models.resnet import BasicBlock

    def block(width: int, out: int, stride: int) -> nn.Module:
        shortcut = None
        if stride != 1 or width != out:
            shortcut = nn.Sequential(nn.Conv2d(width, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        return BasicBlock(width, out, stride, shortcut)

    blocks = block(32, 32, 1), block(32, 64, 2), block(64, 128, 2)
    return nn.Sequential(*_block(channels, 32), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Pooled(nn.Module):
    """A network of Hugging Face's transformers, which returns an object: its pooled features ``[n, width]``.

    That is ``pooler_output``; of a network without one the mean over the positions of ``last_hidden_state``, tokens
    ``[n, tokens, width]`` or a map ``[n, width, h, w]``.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        output = self.network(images)
        if getattr(output, "pooler_output", None) is not None:
            return output.pooler_output.flatten(1)
        hidden = output.last_hidden_state
        return hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))


def _output(built: nn.Module, shape: tuple[int, int, int], backbone: str | nn.Module) -> object:
    """Return what the network makes of two images."""
    training = [module for module in built.modules() if module.training]
    device = next(built.parameters(), torch.zeros(())).device
    try:
        with torch.no_grad():
            return built.eval()(torch.zeros(2, *shape, device=device))
    except Exception as error:  # the network may be anybody's
        expected = f"backbone: expected a network for images [n, {', '.join(map(str, shape))}]"
        raise ArgumentError(f"{expected}, got {_described(backbone)} ({first_line(error)})") from error
    finally:
        for module in training:
            module.training = True


def _width(features: object, backbone: str | nn.Module) -> int:
    """Return the width of the features of two images."""
    is_tensor = isinstance(features, torch.Tensor)
    if not is_tensor or features.ndim != 2 or 0 in features.shape or features.dtype != torch.float32:
        came = f"{features.dtype} {list(features.shape)}" if is_tensor else type(features).__name__
        expected = "a network that returns features [n, width], float32"
        raise ArgumentError(f"backbone: expected {expected}, got {came} of {_described(backbone)}")
    if len(features) != 2:
        expected = "features of 2 images"
        raise ArgumentError(f"backbone: expected {expected}, got {list(features.shape)} of {_described(backbone)}")
    return features.shape[1]


def _described(backbone: str | nn.Module) -> str:
    return backbone if isinstance(backbone, str) else type(backbone).__name__
