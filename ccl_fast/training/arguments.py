"""Checks of the arguments of ``train``: each error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch

from ccl_fast.errors import ArgumentError
from ccl_fast.training.cooperation import LABELS, NEGATIVES
from ccl_fast.training.objectives import OBJECTIVES, OPTIONS

# What may differ when a run is resumed: where its files are, and where and how fast it is computed.
FREE_ARGUMENTS = (
    "output",
    "overwrite",
    "resume",
    "resume_from",
    "device",
    "data_root",
    "download",
    "data",  # the training images themselves are compared
    "workers",
    "image_memory",
    "compile_model",
    "timeout",
    "warmup_from",
)
# What may differ too between runs that have a warm-up in common.
AFTER_WARM_UP = ("objective", "baseline", "clusters", "near_ood", "far_ood", "probe_every", *OPTIONS)
# Of a short run, half is warm-up.
MOST_WARM_UP = 20

FLAGS = (
    *("baseline", "download", "strict", "concentration", "channels_last", "compile_model", "fused_optimizer"),
    *("overwrite", "resume"),
)
MOST_DIMENSIONS = 65_536
WEEK = 7 * 24 * 3600


def plain(arguments: dict) -> dict:
    """The arguments as a file keeps them: a module or a data set by the name of its class."""
    return {name: _plain(value) for name, value in arguments.items()}


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


def comparable(arguments: dict) -> dict:
    """The arguments that a resumed run must share, as a file keeps them."""
    return plain({name: value for name, value in arguments.items() if name not in FREE_ARGUMENTS})


def of_warm_up(arguments: dict) -> dict:
    """Those of them that runs with a common warm-up must share."""
    shared = {name: value for name, value in comparable(arguments).items() if name not in AFTER_WARM_UP}
    return shared | {"warmup_epochs": warm_up_epochs(arguments)}


def warm_up_epochs(arguments: dict) -> int:
    epochs, given = arguments["epochs"], arguments["warmup_epochs"]
    if given is not None:
        return given
    return min(MOST_WARM_UP, epochs // 2) if isinstance(epochs, int) else 0


def check(arguments: dict) -> None:
    """Everything that can be told before the data is read."""

    def expect(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ArgumentError(f"{name}: expected {expected}, got {arguments[name]!r}")

    for name in FLAGS:
        expect(isinstance(arguments[name], bool), name, "True or False")
    for name in ("output", "warmup_from"):
        expect(isinstance(arguments[name], str | Path | None), name, "the path of a folder")
    expect(isinstance(arguments["device"], str), "device", "the name of a device")
    for name in ("near_ood", "far_ood"):
        sets = arguments[name]
        names = isinstance(sets, Sequence) and not isinstance(sets, str)
        expect(sets is None or names or isinstance(sets, Mapping), name, "a list of names, or data sets by name")
    for name in ("epochs", "recluster_every"):
        expect(_is_int(arguments[name]) and arguments[name] >= 1, name, "a positive integer")
    for name in ("micro_batch", "limit", "image_size"):
        expect(
            arguments[name] is None or (_is_int(arguments[name]) and arguments[name] >= 1), name, "a positive integer"
        )
    dimension = arguments["embedding_dim"]
    expect(_is_int(dimension) and 1 <= dimension <= MOST_DIMENSIONS, "embedding_dim", f"1 to {MOST_DIMENSIONS}")
    expect(_is_int(arguments["seed"]) and 0 <= arguments["seed"] < 2**62, "seed", "an integer from 0 to 2^62")
    for name in ("center_ramp_epochs", "probe_every", "workers"):
        expect(_is_int(arguments[name]) and arguments[name] >= 0, name, "an integer >= 0")
    for name in ("temperature", "learning_rate"):
        expect(_is_number(arguments[name]) and 0 < arguments[name] < math.inf, name, "a positive number")
    expect(arguments["instance_negatives"] in NEGATIVES, "instance_negatives", f"one of {', '.join(NEGATIVES)}")
    expect(arguments["labels_from"] in LABELS, "labels_from", f"one of {', '.join(LABELS)}")
    for name in ("instance_weight", "believe"):
        share = arguments[name]
        expect(share == "agreement" or (_is_number(share) and 0 <= share <= 1), name, '0 to 1, or "agreement"')
    timeout = arguments["timeout"]
    expect(_is_number(timeout) and 0 < timeout <= WEEK, "timeout", f"a positive number of seconds, at most {WEEK}")
    for name in ("center_weight", "weight_decay", "image_memory"):
        expect(_is_number(arguments[name]) and 0 <= arguments[name] < math.inf, name, "a number >= 0")
    expect(_is_int(arguments["batch_size"]) and arguments["batch_size"] >= 2, "batch_size", "an integer >= 2")
    clusters = as_list(arguments["clusters"])
    expect(
        bool(clusters) and all(_is_int(k) and k >= 1 for k in clusters) and len(set(clusters)) == len(clusters),
        "clusters",
        "a positive integer, or several different ones",
    )
    expect(arguments["objective"] in list(OBJECTIVES), "objective", f"one of {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[arguments["objective"]]
    with_objective = f"with objective {arguments['objective']!r}"
    fewest = objective.fewest_clusters
    expect(min(clusters) >= fewest, "clusters", f"{fewest} or more {with_objective} (each, of several)")
    wrong = [
        f"{name}: expected {unused} {with_objective}, got {arguments[name]!r}"
        for name, unused in OPTIONS.items()
        if name not in objective.options and arguments[name] != unused
    ]
    if wrong:  # all at once: a recipe for one objective has several that another does not use
        raise ArgumentError("; ".join(wrong))
    expect(arguments["precision"] in ("32-true", "bf16-mixed"), "precision", '"32-true" or "bf16-mixed"')
    expect(arguments["stem"] in ("auto", "3x3", "7x7"), "stem", '"auto", "3x3" or "7x7"')
    expect(
        arguments["ema"] is None or (_is_number(arguments["ema"]) and 0 < arguments["ema"] < 1),
        "ema",
        "a number between 0 and 1",
    )
    expect(not (arguments["resume"] and arguments["overwrite"]), "overwrite", "False when resuming")
    expect(not arguments["resume"] or arguments["output"] is not None, "output", "the folder of the run to resume")
    output, origin = arguments["output"], arguments["warmup_from"]
    is_itself = None not in (output, origin) and Path(output).resolve() == Path(origin).resolve()
    expect(not is_itself or arguments["resume"], "warmup_from", "another folder than output")
    expect(arguments["resume_from"] in ("last", "previous"), "resume_from", '"last" or "previous"')
    epochs, warmup = arguments["epochs"], arguments["warmup_epochs"]
    expect(_is_int(warmup) and 0 <= warmup <= epochs, "warmup_epochs", f"0 to epochs={epochs}")


def check_sizes(n: int, batch_size: int, clusters: Sequence[int], concentration: bool, processes: int = 1) -> None:
    """What depends on the number n of training images, and on that of processes."""
    if batch_size < processes:
        raise ArgumentError(f"batch_size: expected at least {processes}, an image for each process, got {batch_size}")
    if concentration and max(clusters) >= n:
        raise ArgumentError(
            f"clusters: expected fewer than the {n} training images for concentration, got {max(clusters)}"
        )
    if batch_size > n:
        raise ArgumentError(f"batch_size: expected at most {n}, the number of training images, got {batch_size}")
    if max(clusters) > n:
        raise ArgumentError(f"clusters: expected at most {n}, the number of training images, got {max(clusters)}")


def as_list(value) -> list:
    """Of one or several numbers."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def find_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.zeros(0, device=name).device
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("training runs on a CPU or a CUDA device")
        return device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f'device: expected "auto" or a device of this machine, got {name!r} ({reason})') from error
