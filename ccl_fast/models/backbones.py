"""Encoders by name: images [n, c, h, w] -> features [n, width]."""

from __future__ import annotations

import copy
import difflib
from typing import Literal

import torch
from torch import nn

from ccl_fast.errors import ArgumentError, first_line, packages_of_training

# Up to this many pixels a side, a ResNet's first layers would leave too little of an image.
SMALL_IMAGE = 64

Stem = Literal["auto", "3x3", "7x7"]


def build_backbone(
    backbone: str | nn.Module, shape: tuple[int, int, int], *, stem: Stem = "auto", seed: int = 0
) -> tuple[nn.Module, int]:
    """A new encoder, and how many features it gives.

    Args:
        backbone: "small" (three convolutions of stride 2, for images of about 28 pixels), "resnet8" (three residual
            blocks of 32, 64 and 128 channels at a half, a quarter and an eighth of the resolution: 0.3 million
            parameters, for small natural images on a CPU), one of torchvision's classifiers by name ("resnet18",
            "convnext_tiny", "vit_b_16", ...) with random weights and without its last layer, or a module, which is
            copied, weights included.
        shape: (c, h, w) of the images. Grey images are given to torchvision's networks as three equal channels.
        stem: "3x3": a ResNet begins with a 3 x 3 convolution of stride 1 and no pooling, as is usual for small images
            (SimCLR, appendix B.9); "7x7": as it is; "auto": "3x3" for images of up to 64 pixels.
        seed: of the initial weights (torch's global generator is left as it was).

    Raises:
        ArgumentError: there is no such backbone, or it does not turn such images into features [n, width].
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if isinstance(backbone, nn.Module):
            _check_stem(stem, False, "a module")
            built = _copied(backbone)
        elif backbone == "small":
            _check_stem(stem, False, backbone)
            built = _small(shape[0])
        elif backbone == "resnet8":
            _check_stem(stem, False, backbone)
            built = _resnet8(shape[0])
        else:
            built = _torchvision(backbone, shape, stem)
    return built, _width(built, shape, backbone)


def _copied(module: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:  # the module may be anybody's
        expected = "a module that copy.deepcopy can copy"
        raise ArgumentError(
            f"backbone: expected {expected}, got {type(module).__name__} ({first_line(error)})"
        ) from error


def _check_stem(stem: Stem, is_resnet: bool, name: str) -> None:
    if stem == "3x3" and not is_resnet:
        raise ArgumentError(f'stem: expected "auto" or "7x7" for {name}, which is no ResNet, got "3x3"')


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


def _torchvision(name: str, shape: tuple[int, int, int], stem: Stem) -> nn.Module:
    with packages_of_training():
        from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        close = difflib.get_close_matches(str(name), ["small", "resnet8", *names], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        expected = 'backbone: expected "small", "resnet8", a classifier of torchvision or a module'
        raise ArgumentError(f"{expected}, got {name!r}{hint}")
    # What a few of them want to be told; auxiliary outputs are for labels.
    special = {"image_size": shape[1]} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        special = {"aux_logits": False, "init_weights": True}
    try:
        built = models.get_model(name, weights=None, **special)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ArgumentError(
            f"backbone: expected one for images of {list(shape)}, got {name!r} ({first_line(error)})"
        ) from error
    if not _remove_classifier(built):
        raise ArgumentError(f"backbone: expected a classifier that ends in a linear layer, got {name!r}")
    is_resnet = isinstance(built, models.ResNet)
    _check_stem(stem, is_resnet, name)
    if is_resnet and (stem == "3x3" or (stem == "auto" and max(shape[1:]) <= SMALL_IMAGE)):
        built.conv1 = nn.Conv2d(3, built.conv1.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(built.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision does
        built.set_submodule("maxpool", nn.Identity())
    return nn.Sequential(GreyToColor(), built) if shape[0] == 1 else built


def _remove_classifier(network: nn.Module) -> bool:
    """The last linear layer becomes the identity; what stands before it (norm, pooling, hidden layers) stays."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or network.get_submodule(linear[-1]).out_features != 1000:
        return False
    network.set_submodule(linear[-1], nn.Identity())
    return True


class GreyToColor(nn.Module):
    """[n, 1, h, w] -> [n, 3, h, w], the channel three times."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.expand(-1, 3, -1, -1)


def _width(built: nn.Module, shape: tuple[int, int, int], name: object) -> int:
    """Of the features, by trying."""
    described = name if isinstance(name, str) else type(name).__name__
    training = [module for module in built.modules() if module.training]
    device = next(built.parameters(), torch.zeros(())).device
    try:
        with torch.no_grad():
            features = built.eval()(torch.zeros(2, *shape, device=device))
    except Exception as error:  # the network may be anybody's
        expected = f"backbone: expected a network for images [n, {', '.join(map(str, shape))}]"
        raise ArgumentError(f"{expected}, got {described} ({first_line(error)})") from error
    finally:
        for module in training:
            module.training = True
    is_tensor = isinstance(features, torch.Tensor)
    if not is_tensor or features.ndim != 2 or 0 in features.shape or features.dtype != torch.float32:
        came = f"{features.dtype} {list(features.shape)}" if is_tensor else type(features).__name__
        expected = "a network that returns features [n, width], float32"
        raise ArgumentError(f"backbone: expected {expected}, got {came} of {described}")
    if len(features) != 2:
        raise ArgumentError(f"backbone: expected features of 2 images, got {list(features.shape)} of {described}")
    return features.shape[1]
