"""Encoders of torchvision and of timm by name, with random or with pretrained weights."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ccl_fast.errors import ArgumentError, MissingPackages, first_line, packages_of_training

# Up to this many pixels a side, a ResNet's first layers would leave too little of an image.
SMALL_IMAGE = 64
TIMM = "timm/"
# The networks that are our own.
OWN = "small", "resnet8"

Stem = Literal["auto", "3x3", "7x7"]
# False: random weights; True: those that the library publishes; else a file of weights.
Pretrained = bool | str | Path
# Mean and standard deviation by channel of the images that weights were trained with.
Statistics = tuple[Sequence[float], Sequence[float]]


class Adapted(nn.Module):
    """A library's network for images ``[n, 1 or 3, h, w]`` in [0, 1].

    Args:
        network: takes three channels.
        grey: the images have one channel, which is repeated.
        statistics: what images are normalised by, as pretrained weights expect it; None: they stay in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, grey: bool, statistics: Statistics | None):
        super().__init__()
        self.network, self.grey, self.normalizes = network, grey, statistics is not None
        for name, values in zip(("mean", "std"), statistics or ((0.0,), (1.0,)), strict=True):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.expand(-1, 3, -1, -1) if self.grey else images
        return self.network((images - self.mean) / self.std if self.normalizes else images)


def library_network(
    name: str, shape: tuple[int, int, int], stem: Stem = "auto", pretrained: Pretrained = False, load: bool = True
) -> nn.Module:
    """Return a network of torchvision, or after "timm/" of timm, without its classifier.

    Args:
        name: of the network.
        shape: (c, h, w) of the images.
        stem: see ``build_backbone``.
        pretrained: see ``build_backbone``.
        load: read the pretrained weights; False: a state_dict is to replace them.
    """
    if not isinstance(pretrained, bool) and load and not Path(pretrained).is_file():
        raise ArgumentError(f"pretrained: expected true, false or a file of weights, got {str(pretrained)!r}")
    make = _timm if name.startswith(TIMM) else _torchvision
    try:
        network, statistics = make(name, shape, pretrained, load)
    except (ArgumentError, MissingPackages):
        raise
    except Exception as error:  # the library says it in its own ways: of sizes, of the network, of files
        expected = f"one for images of {list(shape)}" if pretrained is False else "one whose weights can be loaded"
        raise ArgumentError(f"backbone: expected {expected}, got {name!r} ({first_line(error)})") from error
    _set_stem(network, name, shape, stem, pretrained)
    if pretrained is False and shape[0] == 3:
        return network
    return Adapted(network, shape[0] == 1, None if pretrained is False else statistics)


def check_stem(stem: Stem, is_resnet: bool, name: str) -> None:
    """Check that a network can have that stem."""
    if stem == "3x3" and not is_resnet:
        raise ArgumentError(f'stem: expected "auto" or "7x7" for {name}, which is no ResNet, got "3x3"')


def _timm(name: str, shape: tuple[int, int, int], pretrained: Pretrained, load: bool) -> tuple[nn.Module, Statistics]:
    with packages_of_training():
        import timm

    plain = name.removeprefix(TIMM)
    if not timm.is_model(plain):
        raise _unknown(name, [TIMM + other for other in timm.list_models()])
    expects = timm.get_pretrained_cfg(plain)
    assert expects is not None  # of every model there is one
    options: dict = {"img_size": shape[1:]} if expects.fixed_input_size else {}
    if not isinstance(pretrained, bool) and load:
        options["pretrained_cfg_overlay"] = {"file": str(pretrained)}
    network = timm.create_model(plain, pretrained=pretrained is not False and load, num_classes=0, **options)
    return network, (expects.mean, expects.std)


def _torchvision(
    name: str, shape: tuple[int, int, int], pretrained: Pretrained, load: bool
) -> tuple[nn.Module, Statistics]:
    with packages_of_training():
        from torchvision import models

    names = models.list_models(module=models)
    if name not in names:
        raise _unknown(name, names)
    # What a few of them want to be told; auxiliary outputs are for labels.
    special: dict = {"image_size": shape[1]} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):
        special = {"aux_logits": False, "init_weights": True, "transform_input": pretrained is not False}
    network = models.get_model(name, weights=None, **special)
    classifier = _remove_classifier(network, name)
    published = models.get_model_weights(name)["DEFAULT"]
    if pretrained is True and load:
        _load(network, published.get_state_dict(progress=False, check_hash=True), classifier)
    elif pretrained is not False and load:
        from timm.models import load_state_dict

        _load(network, load_state_dict(str(pretrained), weights_only=True), classifier)
    transforms = published.transforms()
    return network, (transforms.mean, transforms.std)


def _unknown(name: str, names: list[str]) -> ArgumentError:
    close = difflib.get_close_matches(name, [*OWN, *names], n=3)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    expected = '"small", "resnet8", a classifier of torchvision, "timm/" and a model of timm, or a module'
    return ArgumentError(f"backbone: expected {expected}, got {name!r}{hint}")


def _remove_classifier(network: nn.Module, name: str) -> str:
    """Replace the last linear layer by the identity, keep what stands before it, and return that layer's name."""
    linear = [of for of, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not linear or network.get_submodule(linear[-1]).out_features != 1000:
        raise ArgumentError(f"backbone: expected a classifier that ends in a linear layer, got {name!r}")
    network.set_submodule(linear[-1], nn.Identity())
    return linear[-1]


def _load(network: nn.Module, state: dict[str, Tensor], classifier: str) -> None:
    """Load the weights of a classifier into the network without it, and without auxiliary outputs."""
    dropped = f"{classifier}.", "aux", "AuxLogits."
    network.load_state_dict({name: value for name, value in state.items() if not name.startswith(dropped)})


def _set_stem(network: nn.Module, name: str, shape: tuple[int, int, int], stem: Stem, pretrained: Pretrained) -> None:
    """Let a ResNet begin with a 3 x 3 convolution of stride 1 and without pooling, if that is wanted."""
    # torchvision's and timm's have the same names.
    norm = network.bn1 if type(network).__name__ == "ResNet" else None
    check_stem(stem, norm is not None, name)
    if stem == "3x3" and pretrained is not False:
        raise ArgumentError('stem: expected "auto" or "7x7" with pretrained weights, which have their own, got "3x3"')
    small = stem == "auto" and max(shape[1:]) <= SMALL_IMAGE and pretrained is False
    if isinstance(norm, nn.BatchNorm2d) and (stem == "3x3" or small):
        stem_convolution = nn.Conv2d(3, norm.num_features, kernel_size=3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(stem_convolution.weight, mode="fan_out", nonlinearity="relu")  # as both do
        network.set_submodule("conv1", stem_convolution)
        network.set_submodule("maxpool", nn.Identity())
