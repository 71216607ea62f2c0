"""One experiment: data, the schedule for each method on the same budget, and the judgement."""

from __future__ import annotations

import copy
import math
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch

from ccl_fast.training.data import N_CLASSES, load_digits
from ccl_fast.training.loop import Plan, Run
from ccl_fast.training.model import Model
from ccl_fast.training.report import DEFAULT, evaluate, format_table, write_report
from ccl_fast.version import __version__


class ArgumentError(ValueError):
    """A wrong argument of ``train``: its name, what was expected and what came."""


def train(
    output: str | None = None,
    method: Literal["compare", "ccl", "simclr"] = "compare",
    epochs: int = 40,
    warmup_epochs: int = 20,
    clusters: int = 12,
    batch_size: int = 256,
    temperature: float = 0.1,
    center_weight: float = 1.0,
    learning_rate: float = 1e-3,
    in_classes: Sequence[int] = (0, 1, 2, 3, 4, 5),
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> dict:
    """Train on some classes of digits without their labels, and tell the digits of all other classes from them.

    SimCLR and CCL get the same budget: the same number of epochs, initial weights, batches, augmentations and
    learning rates. Their warm-up is the same computation, so "compare" runs it once.

    Args:
        output: folder for report.json, scores.png and the weights; by default a fresh ``runs/digits-<time>``.
        method: "ccl", "simclr", or "compare" for both.
        epochs: passes over the training images, warm-up included.
        warmup_epochs: how many of these use instance-level contrast (SimCLR) before the clusters come in.
        clusters: number of k-means clusters.
        batch_size: images of a step, of two views each; the incomplete last batch of an epoch is left out.
        temperature: temperature of the similarities in the loss.
        center_weight: weight of the cluster's centre among the positives.
        learning_rate: of AdamW at the start; it follows half a cosine down to 0.
        in_classes: the digits to train on; all others are out of distribution.
        seed: of weights, split, batches, augmentations and k-means. On one machine it fixes every number.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        overwrite: replace the results in an existing output folder.

    Returns:
        The content of report.json.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output folder exists.
        FloatingPointError: the loss is not finite, with the step.

    Papers: Chen, Gui, Fan, "Cluster-aware contrastive learning for unsupervised out-of-distribution detection",
    arXiv:2302.02598; Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
    representations", 2020 (SimCLR).
    """
    arguments = dict(locals())
    _check(arguments)
    start = time.perf_counter()
    where = _device(device)
    digits = load_digits(in_classes, seed=seed)
    if not (_is_int(batch_size) and 2 <= batch_size <= len(digits.train)):
        raise ArgumentError(f"batch_size: expected 2 to {len(digits.train)} training images, got {batch_size}")
    if clusters > len(digits.train):
        raise ArgumentError(f"clusters: expected at most {len(digits.train)} training images, got {clusters}")
    digits = digits._make(images.to(where) for images in digits)

    folder = Path(output or datetime.now().strftime("runs/digits-%Y%m%d-%H%M%S"))
    if folder.exists() and not overwrite:
        raise FileExistsError(f"output: expected a folder that does not exist yet, or overwrite, got {str(folder)!r}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        plan = Plan(digits.train, epochs, clusters, batch_size, temperature, center_weight, learning_rate, seed)
        warm = Run(Model(seed=seed).to(where), plan)
        warm.advance(warmup_epochs, clustered=False, name="warm-up")
        runs = {name: copy.deepcopy(warm) for name in (("simclr", "ccl") if method == "compare" else (method,))}
        results, scores = {}, {}
        for name, run in runs.items():
            run.advance(epochs - warmup_epochs, clustered=name == "ccl", name=name)
            results[name], scores[name] = evaluate(run.model, digits, clusters=clusters, seed=seed)
        report = {
            "arguments": arguments | {"in_classes": list(in_classes)},
            "images": {name: len(images) for name, images in digits._asdict().items()},
            "default": DEFAULT,
            "results": results,
            "losses": {name: run.losses for name, run in runs.items()},
            "seconds": round(time.perf_counter() - start, 1),
            "environment": {
                "ccl_fast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name(where) if where.type == "cuda" else f"cpu, {os.cpu_count()} cores",
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
        }
        write_report(folder, report, scores, {name: run.model for name, run in runs.items()})
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # only where it is still empty, so that the same command can be given again
        raise
    print(format_table(report))
    print(f"written to {folder}")
    return report


def _check(arguments: dict) -> None:
    """Everything that can be told before the data is read."""

    def expect(condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise ArgumentError(f"{name}: expected {expected}, got {arguments[name]!r}")

    for name in ("epochs", "clusters"):
        expect(_is_int(arguments[name]) and arguments[name] >= 1, name, "a positive integer")
    for name in ("temperature", "learning_rate"):
        expect(0 < arguments[name] < math.inf, name, "a positive number")
    expect(0 <= arguments["center_weight"] < math.inf, "center_weight", "a number >= 0")
    expect(arguments["method"] in ("compare", "ccl", "simclr"), "method", '"compare", "ccl" or "simclr"')
    epochs, warmup = arguments["epochs"], arguments["warmup_epochs"]
    expect(_is_int(warmup) and 0 <= warmup <= epochs, "warmup_epochs", f"0 to epochs={epochs}")
    expect(_is_int(arguments["seed"]) and arguments["seed"] >= 0, "seed", "an integer >= 0")
    classes = list(arguments["in_classes"])
    expect(
        0 < len(classes) == len(set(classes)) < N_CLASSES and set(classes) <= set(range(N_CLASSES)),
        "in_classes",
        f"1 to {N_CLASSES - 1} different digits",
    )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(f'device: expected "auto" or a device of this machine, got {name!r} ({reason})') from error
