# ruff: noqa: RUF009 (`option` makes a dataclasses.field)
"""The arguments of ``train``: of each, in one place, its default, its check, its help, and when it may differ."""

import dataclasses
import functools
import inspect
import itertools
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, ParamSpec, Self, TypeVar, get_args

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from ccl_fast import checks
from ccl_fast.data.options import MAX_PIXELS, Recipe
from ccl_fast.errors import ArgumentError
from ccl_fast.models.libraries import Pretrained, Stem
from ccl_fast.training.checkpoint import Which
from ccl_fast.training.cooperation import Labels, Negatives
from ccl_fast.training.loggers import LoggerName, check_loggers
from ccl_fast.training.objectives import BASELINE, OBJECTIVES, OPTIONS, ObjectiveName
from ccl_fast.training.optimizers import OptimizerName

Check = Callable[[str, Any], None]
P = ParamSpec("P")
R = TypeVar("R")

Precision = Literal["32-true", "bf16-mixed"]

# What options are about, in the order in which a newcomer needs them, and their titles in the help.
GROUPS = {
    "data": "images",
    "ood": "what is out of distribution",
    "model": "model",
    "training": "training",
    "clusters": "clusters and contrast",
    "output": "output",
    "going_on": "going on with a run",
    "device": "device and speed",
    "processes": "several processes",
}

# By default half of a short run is warm-up.
MAX_DEFAULT_WARM_UP = 20
# By default, of so many training images on: an epoch has four batches, of 16 images at least, as each is held against
# the others, and a cluster has ten images.
BATCH_SIZE, BATCHES, MIN_BATCH_SIZE = 256, 4, 16
CLUSTERS, IMAGES_OF_CLUSTER = 12, 10
MAX_DIMENSIONS = 65_536
# 0.8 GiB for a ResNet-50. Sun et al. find neighbours among 1 % of ImageNet as telling.
DETECTOR_ROWS = 100_000
MAX_SEED = 2**62
WEEK = 7 * 24 * 3600


def at_least(least: int) -> Check:
    """Check that a value is an integer of at least that much."""
    return lambda name, value: checks.check_count(name, value, least)


def one_of(choices: Any) -> Check:
    """Check that a value is one of the choices, a `Literal`."""
    return lambda name, value: checks.check_choice(name, value, get_args(choices))


def or_none(check: Check) -> Check:
    """Check a value unless it is None."""
    return lambda name, value: None if value is None else check(name, value)


def check_dimension(name: str, value: object) -> None:
    """Check the width of an embedding."""
    if not checks.is_integer(value) or not 1 <= value <= MAX_DIMENSIONS:
        raise ArgumentError(f"{name}: expected 1 to {MAX_DIMENSIONS}, got {value!r}")


def check_seed(name: str, value: object) -> None:
    """Check a seed."""
    if not checks.is_integer(value) or not 0 <= value < MAX_SEED:
        raise ArgumentError(f"{name}: expected an integer from 0 to 2^62, got {value!r}")


def check_momentum(name: str, value: object) -> None:
    """Check a momentum: 0, or less than 1."""
    checks.check_number(name, value, "0 to less than 1", lambda momentum: 0 <= momentum < 1)


def check_timeout(name: str, value: object) -> None:
    """Check a number of seconds, at most a week."""
    expected = f"a positive number of seconds, at most {WEEK}"
    checks.check_number(name, value, expected, lambda seconds: 0 < seconds <= WEEK)


def check_share_or_agreement(name: str, value: object) -> None:
    """Check a share, or "agreement"."""
    if value != "agreement":
        checks.check_number(name, value, '0 to 1, or "agreement"', lambda share: 0 <= share <= 1)


def check_clusters(name: str, value: object) -> None:
    """Check one or several numbers of clusters, or None."""
    numbers = [CLUSTERS] if value is None else as_list(value)
    if not numbers or not all(checks.is_integer(k) and k >= 1 for k in numbers) or len(set(numbers)) < len(numbers):
        raise ArgumentError(f"{name}: expected a positive integer, or several different ones, got {value!r}")


def check_restarts(name: str, value: object) -> None:
    """Check ascending numbers of epochs."""
    epochs: Sequence = value if isinstance(value, Sequence) else [0]
    are_numbers = all(checks.is_integer(n) and n >= 1 for n in epochs)
    if not are_numbers or any(b <= a for a, b in itertools.pairwise(epochs)):
        raise ArgumentError(f"{name}: expected ascending positive integers, got {value!r}")


def check_folder(name: str, value: object) -> None:
    """Check that a value may be the path of a folder, or None."""
    if not isinstance(value, str | Path | None):
        raise ArgumentError(f"{name}: expected the path of a folder, got {value!r}")


def check_pretrained(name: str, value: object) -> None:
    """Check that a value is true, false or may be the path of a file."""
    if not isinstance(value, bool | str | Path):
        raise ArgumentError(f"{name}: expected true, false or a file of weights, got {value!r}")


def check_device_name(name: str, value: object) -> None:
    """Check that a value may be the name of a device."""
    if not isinstance(value, str):
        raise ArgumentError(f"{name}: expected the name of a device, got {value!r}")


def check_ood_sets(name: str, value: object) -> None:
    """Check that a value may be a list of OOD sets, or such by name."""
    if isinstance(value, str) or not isinstance(value, Sequence | Mapping | None):
        raise ArgumentError(f"{name}: expected a list of names, or data sets by name, got {value!r}")


def option(
    default: Any,
    help: str,
    check: Check | None = None,
    *,
    group: str,
    may_differ: bool = False,
    after_warm_up: bool = False,
) -> Any:
    """Make a field of `Config`.

    Args:
        default: its value where none is given.
        help: a sentence for the command line and the documentation.
        check: raises an ArgumentError of a wrong value; None: whoever uses the value checks it.
        group: what it is about, a key of `GROUPS`.
        may_differ: a run may be resumed with another value: it says where files are, or where and how fast is computed.
        after_warm_up: it does not matter before the end of the warm-up, so it may differ between runs that share one.
    """
    metadata = {
        "help": help,
        "check": check,
        "group": group,
        "may_differ": may_differ,
        "after_warm_up": after_warm_up,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """The arguments of ``train``, as they are given."""

    output: str | Path | None = option(
        None,
        "folder for report.html, report.json, the weights ``<objective>.safetensors`` (a state_dict), the fitted "
        "detectors and the files named above; by default a fresh ``runs/train-<time>``.",
        check_folder,
        may_differ=True,
        group="output",
    )
    objective: ObjectiveName = option(
        "ccl",
        'what is minimised after the warm-up: "ccl"; "simclr", "hard-contrastive", "cacr", "cmim" and "groco", which '
        'need no clusters; on those of k-means also "supcon", "protonce", "deepcluster-v2", "pamc", "meow" and '
        '"coding-rate"; on prototypes that are learned "swav" and "protogcd".',
        one_of(ObjectiveName),
        after_warm_up=True,
        group="training",
    )
    baseline: bool = option(
        True, "train SimCLR too, and report both side by side.", checks.check_flag, after_warm_up=True, group="training"
    )
    data: str | Path | Dataset | tuple[Dataset, Dataset] = option(
        "digits",
        'the images to train on: "digits" (5,000 real ones, part of the installation), one of torchvision\'s data sets '
        'by name ("cifar10", "svhn", "stl10", ...), or a folder of images (with the folders train and test, or split '
        "at random); from Python also a torch Dataset, or a pair of them to train and to test on.",
        may_differ=True,  # the training images themselves are compared,
        group="data",
    )
    data_root: str | Path = option("data", "folder of torchvision's data sets.", may_differ=True, group="data")
    download: bool = option(
        False,
        "let torchvision download a data set that is not there.",
        checks.check_flag,
        may_differ=True,
        group="data",
    )
    in_classes: Sequence[str | int] | None = option(
        None,
        "the classes to train on, by number or, where they have names, by name (of a folder its subfolders); images of "
        "the others are OOD. By default all; of the digits 0 to 5. Classes are used for this and for the log, never "
        "for training.",
        group="ood",
    )
    near_ood: Sequence[str] | Mapping[str, Dataset] | None = option(
        None,
        'OOD sets that resemble the training images: "held-out" (the other classes), a data set by name (its test '
        'images), a folder, or a synthetic set: "textures", "noise", "blobs", "interpolation" (mean of two test '
        'images), "letters"; from Python also {name: Dataset}. By default "held-out", or without that "interpolation".',
        check_ood_sets,
        after_warm_up=True,
        group="ood",
    )
    far_ood: Sequence[str] | Mapping[str, Dataset] | None = option(
        None,
        "OOD sets that do not, in the same way. By default the other synthetic sets.",
        check_ood_sets,
        after_warm_up=True,
        group="ood",
    )
    image_size: int | None = option(
        None,
        "height and width in pixels, to which images are scaled and cropped. By default the data set's own, or 224 if "
        "it has none.",
        or_none(checks.check_count),
        group="data",
    )
    augmentation: Recipe = option(
        "auto",
        'how views are made: "digits" (small affine maps, contrast, noise), "simclr" (crops, flips, colours, blur), '
        '"weak" (the same with half as many colour changes, for generated images beside real ones), "none", or "auto": '
        '"digits" for grey images and "simclr" for coloured ones.',
        group="data",
    )
    extra_images: str | Path | None = option(
        None,
        "folder of more images to train on, generated ones say; they are in no split, and no detector sees them. "
        "Nothing is logged of classes then, as theirs are not known.",
        check_folder,
        may_differ=True,  # as data
        group="data",
    )
    real_weight: int = option(
        1,
        "how often an epoch has each of the other images, where there are ``extra_images``: AdaInf has 10.",
        at_least(1),
        group="data",
    )
    limit: int | None = option(
        None, "at most that many images of each part, for a quick run.", or_none(checks.check_count), group="data"
    )
    strict: bool = option(
        False,
        "stop at an unreadable image of a folder; by default they are skipped and counted.",
        checks.check_flag,
        group="data",
    )
    max_pixels: int = option(
        MAX_PIXELS,
        "a file of more pixels than that counts as an unreadable one: a small file can hold gigabytes.",
        at_least(1),
        group="data",
    )
    workers: int | None = option(
        None,
        "processes that read images. By default those of sets that do not fit into memory, if they are files or named, "
        "are read by as many as there are CPUs to spare, at most 8, and others by none.",
        or_none(at_least(0)),
        may_differ=True,
        group="data",
    )
    image_memory: float = option(
        4.0,
        "a set of images up to this size (in GiB, one byte a value) is read once and kept in memory; of a larger one "
        "each batch is read when it is needed.",
        checks.check_not_negative,
        may_differ=True,
        group="data",
    )
    backbone: str | nn.Module = option(
        "small",
        'the encoder: "small" (three convolutions), "resnet8" (a narrow ResNet for small natural images on a CPU), a '
        'classifier of torchvision by name ("resnet18", ...) or a model of timm ("timm/vit_small_patch16_224", ...), '
        "without its last layer; from Python also a module, images [n, c, h, w] to features [n, width] or to an "
        "object as Hugging Face's models return it.",
        group="model",
    )
    pretrained: Pretrained = option(
        False,
        "begin with weights that torchvision or timm publishes for that backbone (true; they are downloaded once), or "
        "with those of a file (.safetensors, .pth). The network then normalises images as they expect it.",
        check_pretrained,
        group="model",
    )
    stem: Stem = option(
        "auto",
        '"3x3" lets a ResNet begin at full resolution, as is usual for small images; "7x7" leaves it as it is; "auto" '
        'means "3x3" for images of up to 64 pixels, if the weights are not pretrained.',
        one_of(Stem),
        group="model",
    )
    embedding_dim: int = option(
        64, "width of the projection head's output, to which the loss is applied.", check_dimension, group="model"
    )
    epochs: int = option(40, "passes over the training images, warm-up included.", at_least(1), group="training")
    batch_size: int | None = option(
        None,
        "images of a step, of two views each, on all processes together; the incomplete last batch of an epoch is left "
        "out. By default 256, or the largest power of two of which an epoch of few images has four, but not below 16.",
        or_none(at_least(2)),
        group="training",
    )
    micro_batch: int | None = option(
        None,
        "images that pass the network of a process at a time; the gradient is that of the whole batch, memory that of "
        "a micro-batch, the price one more forward pass. BatchNorm takes its statistics over a micro-batch. By default "
        "the whole batch.",
        or_none(checks.check_count),
        group="training",
    )
    optimizer: OptimizerName = option(
        "adamw",
        '"adamw"; "sgd", whose learning rate is 0.03 or so for each 256 images of a batch (MoCo); or "lars", with a '
        "factor for each layer, for large batches, whose rate is 0.3 for each 256 (SimCLR).",
        one_of(OptimizerName),
        group="training",
    )
    learning_rate: float = option(
        1e-3,
        "the largest one; it rises in ``lr_warmup_epochs`` and then follows half a cosine down to 0.",
        checks.check_positive,
        group="training",
    )
    lr_warmup_epochs: int = option(
        0,
        "epochs in which the learning rate rises linearly from 0. Those of SimCLR, ``warmup_epochs``, are others.",
        at_least(0),
        group="training",
    )
    restarts: Sequence[int] = option(
        (),
        "epochs after which the learning rate starts anew and the optimiser forgets its averages, as if a finished run "
        "had been lengthened then: resuming one with more ``epochs`` sets it.",
        check_restarts,
        group="training",
    )
    momentum: float = option(0.9, 'of "sgd" and "lars".', check_momentum, group="training")
    weight_decay: float = option(
        1e-4,
        'of the optimiser: decoupled from the gradient with "adamw", else added to it.',
        checks.check_not_negative,
        group="training",
    )
    exclude_bias_and_norm: bool = option(
        False,
        "leave biases and the parameters of norms, whatever is no matrix, out of weight decay and of the adaptation of "
        '"lars".',
        checks.check_flag,
        group="training",
    )
    temperature: float = option(
        0.1,
        'temperature of the similarities in the loss. "cacr", "groco" and "coding-rate" have none, so there it is that '
        "of warm-up and baseline, and without these has no effect.",
        checks.check_positive,
        group="training",
    )
    warmup_epochs: int | None = option(
        None,
        "how many epochs use instance-level contrast (SimCLR) before the objective comes in. By default half of the "
        "epochs, at most 20.",
        or_none(at_least(0)),
        group="training",
    )
    clusters: int | Sequence[int] | None = option(
        None,
        "number of k-means clusters, or of prototypes; of several, the loss is the mean over them. At least 2 for "
        '"deepcluster-v2", "meow", "swav" and "protogcd". By default 12, or of few images one for every ten.',
        check_clusters,
        after_warm_up=True,
        group="clusters",
    )
    detector_clusters: int = option(
        12,
        "number of k-means clusters of the detectors, and of the report's pictures and cluster measures, whatever the "
        "model was trained with; fewer if there are fewer training images. Where the clusters' covariances would take "
        "more than 2^26 numbers they share one, and the report says so.",
        at_least(1),
        after_warm_up=True,
        group="ood",
    )
    detector_rows: int = option(
        DETECTOR_ROWS,
        "training images whose features the detectors of nearest neighbours keep, 4 bytes x (width + dim) for each; of "
        "more so many are drawn at random, and the report says so.",
        at_least(1),
        after_warm_up=True,
        group="ood",
    )
    recluster_every: int = option(
        1,
        "epochs from one clustering to the next. Each starts from the last centres. Not on prototypes.",
        at_least(1),
        after_warm_up=True,
        group="clusters",
    )
    labels_from: Labels = option(
        "k-means",
        '"k-means", or, to see what clusters are worth, "classes" (the best that clusters could be; the one use of '
        'classes in training) or "random" numbers (the worst).',
        one_of(Labels),
        after_warm_up=True,
        group="clusters",
    )
    center_weight: float = option(
        1.0,
        'weight of the cluster\'s centre among the positives, for "ccl".',
        checks.check_not_negative,
        after_warm_up=True,
        group="clusters",
    )
    center_ramp_epochs: int = option(
        0,
        "epochs after the warm-up in which that weight grows linearly from 0.",
        at_least(0),
        after_warm_up=True,
        group="clusters",
    )
    concentration: bool = option(
        False,
        "give every centre a temperature of its own, smaller for tight clusters, with ``temperature`` as their mean "
        '(PCL), for "ccl" and "protonce".',
        checks.check_flag,
        after_warm_up=True,
        group="clusters",
    )
    instance_weight: float | Literal["agreement"] = option(
        "agreement",
        'share of "ccl" that contrasts images with their own views alone, 0 to 1: what is certain keeps its pull, '
        'however many cluster-mates there are and however wrong the clusters. "agreement": as large as the share of '
        "the images whose clusters are not believed.",
        check_share_or_agreement,
        after_warm_up=True,
        group="clusters",
    )
    instance_negatives: Negatives = option(
        "centers",
        'what that share holds an image against: all images of the batch and the "centers" of other clusters, the '
        'images of "other-clusters" alone, as those of its own are likely of its kind, or "all" images.',
        one_of(Negatives),
        after_warm_up=True,
        group="clusters",
    )
    believe: float | Literal["agreement"] = option(
        "agreement",
        'share of the images whose cluster "ccl" believes, 0 to 1; the others, those farthest from their centres, have '
        'their own views as positives alone. "agreement": as large a share as that of images both of whose views lie '
        "nearest to their own cluster's centre, beyond chance, measured at every clustering; clusters that mean "
        "nothing are not believed.",
        check_share_or_agreement,
        after_warm_up=True,
        group="clusters",
    )
    ema: float | None = option(
        None,
        "decay of an exponential moving average of the weights, 0.99 to 0.9999 or so. The average is what is "
        "clustered, evaluated and saved. By default there is none.",
        or_none(checks.check_fraction),
        group="training",
    )
    probe_every: int = option(
        10,
        "epochs from one look at the features to the next, which adds to the log their k-NN accuracy on the test "
        "images, if classes are known, and how often an image's two views lie in the same cluster; also after the "
        "warm-up's last epoch and the last of all. 0: never.",
        at_least(0),
        after_warm_up=True,
        group="output",
    )
    loggers: LoggerName | Sequence[LoggerName] = option(
        ("tensorboard",),
        "who is given the hyper-parameters, the numbers of every epoch and at the end those of the report: one or more "
        'of "tensorboard" and "csv", into folders of these names, "wandb" and "mlflow", as their environment variables '
        "say (WANDB_MODE, MLFLOW_TRACKING_URI, ...). metrics.jsonl is written whatever they do.",
        check_loggers,
        may_differ=True,
        group="output",
    )
    seed: int = option(
        0,
        "of weights, split, batches, augmentations and k-means. On one machine it fixes every number.",
        check_seed,
        group="training",
    )
    device: str = option(
        "auto",
        '"auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...; of several processes each takes a GPU of its '
        "own.",
        check_device_name,
        may_differ=True,
        group="device",
    )
    precision: Precision = option(
        "32-true",
        '"32-true", or "bf16-mixed": the network in bfloat16, loss and weights in float32.',
        one_of(Precision),
        group="device",
    )
    channels_last: bool = option(
        False,
        "keep images and weights in that memory format, which suits convolutions on tensor cores.",
        checks.check_flag,
        group="device",
    )
    compile_model: bool = option(
        False, "let torch.compile make the network faster.", checks.check_flag, may_differ=True, group="device"
    )
    fused_optimizer: bool = option(False, "one kernel for the optimiser's step.", checks.check_flag, group="device")
    timeout: float = option(
        300.0,
        "seconds after which a process that does not answer the others counts as lost.",
        check_timeout,
        may_differ=True,
        group="processes",
    )
    overwrite: bool = option(
        False,
        "replace the run in an existing output folder; files that no run writes stay as they are.",
        checks.check_flag,
        may_differ=True,
        group="output",
    )
    resume: bool = option(
        False,
        "go on with the run in the output folder, of several the newest, by default of those in ``runs``. What is not "
        "given is as in that run; what is must be the same, unless it is of this call alone.",
        checks.check_flag,
        may_differ=True,
        group="going_on",
    )
    resume_from: Which = option(
        "last",
        'the checkpoint to go on from, "last", or the one before it, "previous".',
        one_of(Which),
        may_differ=True,
        group="going_on",
    )
    warmup_from: str | Path | None = option(
        None,
        "folder of another run, whose warm-up this one begins with instead of a warm-up of its own, and whose SimCLR "
        "is the baseline if it is finished. Arguments that matter before the end of the warm-up must be the same. The "
        "result is that of a run by itself, on a CPU bit for bit. A run that is resumed needs it no more.",
        check_folder,
        may_differ=True,
        group="going_on",
    )

    def __post_init__(self):
        for name, value in vars(self).items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())

    def check(self) -> None:
        """Check everything that can be told before the data is read."""
        for name, field in FIELDS.items():
            if field.metadata["check"] is not None:
                field.metadata["check"](name, getattr(self, name))
        self._check_objective()
        self._check_optimizer()
        self._check_folders()
        if self.extra_images is None and self.real_weight != 1:
            raise ArgumentError(f"real_weight: expected 1 without extra_images, got {self.real_weight!r}")
        if self.restarts and not max(self.warmup_length, self.lr_warmup_epochs) <= min(self.restarts):
            first = max(self.warmup_length, self.lr_warmup_epochs)
            expected = f"epochs from {first} on, where warmup_epochs and lr_warmup_epochs are over"
            raise ArgumentError(f"restarts: expected {expected}, got {list(self.restarts)}")
        if self.restarts and max(self.restarts) >= self.epochs:
            raise ArgumentError(f"restarts: expected fewer than epochs={self.epochs}, got {list(self.restarts)}")
        if not self.warmup_length <= self.epochs:
            raise ArgumentError(f"warmup_epochs: expected 0 to epochs={self.epochs}, got {self.warmup_epochs!r}")

    def _check_objective(self) -> None:
        objective, with_objective = OBJECTIVES[self.objective], f"with objective {self.objective!r}"
        fewest = objective.min_clusters
        if self.clusters is not None and min(as_list(self.clusters)) < fewest:
            expected = f"{fewest} or more {with_objective} (each, of several)"
            raise ArgumentError(f"clusters: expected {expected}, got {self.clusters!r}")
        wrong = [
            f"{name}: expected {FIELDS[name].default} {with_objective}, got {getattr(self, name)!r}"
            for name in OPTIONS
            if name not in objective.options and getattr(self, name) != FIELDS[name].default
        ]
        if wrong:  # all at once: a recipe for one objective has several that another does not use
            raise ArgumentError("; ".join(wrong))

    def _check_optimizer(self) -> None:
        unused = {"adamw": "momentum", "lars": "fused_optimizer"}.get(self.optimizer)
        if unused and getattr(self, unused) != FIELDS[unused].default:
            expected = f"{FIELDS[unused].default} with optimizer {self.optimizer!r}"
            raise ArgumentError(f"{unused}: expected {expected}, got {getattr(self, unused)!r}")
        if self.lr_warmup_epochs >= self.epochs:
            expected = f"fewer than epochs={self.epochs}"
            raise ArgumentError(f"lr_warmup_epochs: expected {expected}, got {self.lr_warmup_epochs!r}")

    def _check_folders(self) -> None:
        if self.resume and self.overwrite:
            raise ArgumentError("overwrite: expected False when resuming, got True")
        if self.output is None or self.warmup_from is None or self.resume:
            return
        if Path(self.output).resolve() == Path(self.warmup_from).resolve():
            raise ArgumentError(f"warmup_from: expected another folder than output, got {str(self.warmup_from)!r}")

    @property
    def warmup_length(self) -> int:
        """The number of epochs of warm-up, given or not."""
        return warmup_length(self.epochs, self.warmup_epochs)

    @property
    def objectives(self) -> tuple[ObjectiveName, ...]:
        """The objectives to train: the chosen one, after the baseline if that is asked for."""
        if self.baseline and self.objective != BASELINE:
            return BASELINE, self.objective
        return (self.objective,)

    def lengthened(self, earlier: Self) -> Self:
        """Return the configuration as that of the earlier, finished run which has fewer epochs, lengthened."""
        warmup_epochs = earlier.warmup_length if self.warmup_epochs is None else self.warmup_epochs
        restarts = [*earlier.restarts, earlier.epochs]
        return dataclasses.replace(self, warmup_epochs=warmup_epochs, restarts=restarts)

    def fitted(self, n: int) -> Self:
        """Return the configuration with a batch size and clusters for n training images, where none are given."""
        batch_size = fitted_batch_size(n) if self.batch_size is None else self.batch_size
        clusters = fitted_clusters(n) if self.clusters is None else self.clusters
        return dataclasses.replace(self, batch_size=batch_size, clusters=clusters)

    def resolved(self) -> Self:
        """Return the configuration with its clusters as a list and its warm-up as a number."""
        clusters = None if self.clusters is None else as_list(self.clusters)
        return dataclasses.replace(self, clusters=clusters, warmup_epochs=self.warmup_length)

    def plain(self) -> dict:
        """Return the arguments as a file keeps them: a module or a data set by the name of its class.

        Folders have their whole path, so that the file means the same wherever it is read.
        """
        return {name: _plain(_located(name, getattr(self, name))) for name in FIELDS}


FIELDS = {field.name: field for field in dataclasses.fields(Config)}


def fixed_on_resume(arguments: Mapping[str, Any]) -> dict:
    """Return, of arguments as a file keeps them, those that a resumed run must share."""
    return {name: value for name, value in arguments.items() if name not in FIELDS or not _is(name, "may_differ")}


def fixed_by_warm_up(arguments: Mapping[str, Any]) -> dict:
    """Return, of the arguments that a resumed run must share, those that runs with a common warm-up must share."""
    shared = {name: value for name, value in arguments.items() if name not in FIELDS or not _is(name, "after_warm_up")}
    return shared | {"warmup_epochs": warmup_length(arguments["epochs"], arguments["warmup_epochs"])}


def _is(name: str, which: str) -> bool:
    return FIELDS[name].metadata[which]


def warmup_length(epochs: int, given: int | None) -> int:
    """Return the number of epochs of warm-up, by default half of all and at most 20."""
    return min(MAX_DEFAULT_WARM_UP, epochs // 2) if given is None else given


def fitted_batch_size(n: int) -> int:
    """Return the batch size for n training images: a power of two, where n has so many."""
    few = max(n // BATCHES, min(n, MIN_BATCH_SIZE))
    return min(BATCH_SIZE, 1 << (few.bit_length() - 1))


def fitted_clusters(n: int) -> int:
    """Return the number of clusters for n training images."""
    return min(CLUSTERS, max(2, n // IMAGES_OF_CLUSTER))


def check_sizes(n: int, config: Config, processes: int = 1) -> None:
    """Check what depends on the number n of training images, and on that of processes."""
    config = config.fitted(n)
    assert config.batch_size is not None
    most, batch_size = max(as_list(config.clusters)), config.batch_size
    if batch_size < processes:
        raise ArgumentError(f"batch_size: expected at least {processes}, an image for each process, got {batch_size}")
    if config.concentration and most >= n:
        raise ArgumentError(f"clusters: expected fewer than the {n} training images for concentration, got {most}")
    if batch_size > n:
        raise ArgumentError(f"batch_size: expected at most {n}, the number of training images, got {batch_size}")
    if most > n:
        raise ArgumentError(f"clusters: expected at most {n}, the number of training images, got {most}")


def as_list(value) -> list:
    """Return one or several numbers as a list."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def is_unkept(value: object) -> bool:
    """Tell whether a value, as a file keeps it, is the name of something that no file can keep."""
    return isinstance(value, str) and value.startswith("<")


def _located(name: str, value: Any) -> Any:
    """Return a value with the whole path of every folder in it."""
    from ccl_fast.data import located  # here: it takes seconds to import, and no help needs it

    if name in ("output", "data_root", "warmup_from", "extra_images") and isinstance(value, str | Path):
        return os.path.abspath(os.path.expanduser(value))
    if name == "data":
        return located(value, is_ood=False)
    if name not in ("near_ood", "far_ood") or value is None:
        return value
    if isinstance(value, Mapping):
        return {own: located(data, is_ood=True) for own, data in value.items()}
    return [located(data, is_ood=True) for data in value]


def _plain(value):
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    return f"<{type(value).__module__}.{type(value).__qualname__}>"


def takes_fields_of(
    config: Callable[P, Config], complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> Callable[[Callable[[Config], R]], Callable[P, R]]:
    """Turn a function of a `Config` into one of its fields, with their signature and a section ``Args`` on them.

    Args:
        config: makes it of them.
        complete: adds to those that a call gives what it means by the others; by default the defaults.
    """

    def decorate(function: Callable[[Config], R]) -> Callable[P, R]:
        @functools.wraps(function)
        def with_fields(*args: P.args, **kwargs: P.kwargs) -> R:
            given = inspect.signature(config).bind(*args, **kwargs).arguments
            return function(config(**complete(given)))  # pyright: ignore[reportCallIssue] (P by name)

        returned = inspect.signature(function, eval_str=True).return_annotation
        vars(with_fields)["__signature__"] = inspect.signature(config).replace(return_annotation=returned)
        with_fields.__doc__ = _with_args(inspect.getdoc(function) or "")
        return with_fields

    return decorate


def _with_args(docstring: str) -> str:
    """Insert the fields and their help before the section ``Returns``."""
    lines = ["Args:"]
    for name, field in FIELDS.items():
        entry = f"{name}: {field.metadata['help']}"
        lines += textwrap.wrap(
            entry,
            width=116,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return docstring.replace("\nReturns:", "\n" + "\n".join(lines) + "\n\nReturns:", 1)
