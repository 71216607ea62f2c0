"""The images of an experiment: those to train on, those to test on, and the OOD sets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ccl_fast.data import Images, Split, canonical, load_folder, load_ood, load_split, synthetic_names
from ccl_fast.data.folder import check_is_folder
from ccl_fast.data.joined import Joined
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import GROUPS
from ccl_fast.training.config import Config

# What stands beside the names of OOD sets in a report.
RESERVED = ("train", "test", *GROUPS)


@dataclass(frozen=True)
class ImageSets:
    """All of one shape; the OOD sets by name."""

    train: Images
    test: Images
    near: dict[str, Images]
    far: dict[str, Images]
    class_names: list[str] | None = None  # of the training images, where the data tells

    @property
    def ood(self) -> dict[str, Images]:
        return self.near | self.far

    @property
    def parts(self) -> dict[str, Images]:
        return {"train": self.train, "test": self.test} | self.ood

    def to(self, device: torch.device) -> ImageSets:
        near, far = ({name: images.to(device) for name, images in s.items()} for s in (self.near, self.far))
        return ImageSets(self.train.to(device), self.test.to(device), near, far, self.class_names)


def read_split(config: Config) -> Split:
    """Read the images to train and to test on, as the configuration says; raises as `load_image_sets`."""
    return load_split(config.data, in_classes=config.in_classes, image_size=config.image_size, **_reading(config))


def check_extra_images(config: Config) -> None:
    """Check that the folder of `with_extra_images` is there, before long work; raises as that."""
    if config.extra_images is None:
        return
    path = Path(os.path.expanduser(config.extra_images))
    if not path.is_file():
        check_is_folder("extra_images", path)


def with_extra_images(config: Config, train: Images) -> Images:
    """Return the training images with those that are trained on beside them, if there are any.

    Raises:
        ArgumentError: naming the argument.
        FileNotFoundError: there is no such folder.
    """
    if config.extra_images is None:
        return train
    extra, _ = load_folder(
        Path(config.extra_images),
        train.shape,
        argument="extra_images",
        strict=config.strict,
        workers=config.workers,
        memory=config.image_memory,
        max_pixels=config.max_pixels,
    )
    return Joined([train, extra.to(train.device)], [config.real_weight, 1])


def load_image_sets(config: Config) -> ImageSets:
    """Read all images of an experiment, as the configuration says.

    Raises:
        ArgumentError: naming the argument.
        FileNotFoundError: the data is not there.
    """
    split = read_split(config)
    near, far = config.near_ood, config.far_ood
    if near is None:
        near = ["held-out"] if split.held_out is not None else ["interpolation"]
    if far is None:
        far = [name for name in synthetic_names if name not in ("interpolation", *map(canonical, near))]
    for argument, names in (("near_ood", near), ("far_ood", far)):
        for name in names:
            if name in RESERVED:
                raise ArgumentError(f"{argument}: expected no set with the name of a figure, got {name!r}")
    far_names = [canonical(name) for name in far]
    twice = [name for name in near if canonical(name) in far_names]
    if twice:
        raise ArgumentError(f"far_ood: expected other sets than those of near_ood, got {twice[0]!r} in both")
    if not (near or far):
        raise ArgumentError("near_ood: expected at least one OOD set in near_ood or far_ood, got none")
    of_near, of_far = (
        load_ood(names, split, argument=argument, **_reading(config))
        for names, argument in ((near, "near_ood"), (far, "far_ood"))
    )
    return ImageSets(split.train, split.test, of_near, of_far, split.class_names)


def _reading(config: Config) -> dict:
    return {
        "root": config.data_root,
        "limit": config.limit,
        "seed": config.seed,
        "download": config.download,
        "strict": config.strict,
        "workers": config.workers,
        "memory": config.image_memory,
        "max_pixels": config.max_pixels,
    }
