"""One experiment: data, the schedule for each method on the same budget, and the judgement."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Literal

import torch
from lightning.fabric import Fabric

from ccl_fast.training import checkpoint
from ccl_fast.training.arguments import ArgumentError, check, comparable, find_device, is_int
from ccl_fast.training.data import load_digits
from ccl_fast.training.interruption import Interruption
from ccl_fast.training.loop import Plan, Run
from ccl_fast.training.progress import WARM_UP, Progress, advance
from ccl_fast.training.report import DEFAULT, evaluate, format_table, write_report
from ccl_fast.version import __version__


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
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    micro_batch: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    resume_from: Literal["last", "previous"] = "last",
) -> dict:
    """Train on some classes of digits without their labels, and tell the digits of all other classes from them.

    SimCLR and CCL get the same budget: the same number of epochs, initial weights, batches, augmentations and
    learning rates. Their warm-up is the same computation, so "compare" runs it once.

    After every epoch the state goes to ``<output>/checkpoints/last.ckpt``, and the one before it stays as
    ``previous.ckpt``. Ctrl-C and SIGTERM save it too, in the middle of an epoch, and stop; with ``resume`` the run goes
    on, on a CPU bit for bit as if it had not been stopped. ``<output>/metrics.jsonl`` has a line for every epoch.

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
        precision: "32-true", or "bf16-mixed": the network in bfloat16, loss and weights in float32.
        micro_batch: images that pass the network at a time; the gradient is that of the whole batch, memory that of
            a micro-batch, the price one more forward pass. BatchNorm takes its statistics over a micro-batch. By
            default the whole batch.
        overwrite: replace the results in an existing output folder.
        resume: go on with the run in the output folder; the other arguments must be the same.
        resume_from: the checkpoint to go on from, "last", or the one before it, "previous".

    Returns:
        The content of report.json.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output folder exists.
        FloatingPointError: the loss is not finite, with the step and the last good checkpoint.
        CheckpointError: there is nothing to resume, or it is damaged.
        Interrupted: the run was asked to stop and has saved its state.

    Papers: Chen, Gui, Fan, "Cluster-aware contrastive learning for unsupervised out-of-distribution detection",
    arXiv:2302.02598; Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
    representations", 2020 (SimCLR).
    """
    arguments = dict(locals())
    check(arguments)
    start = time.perf_counter()
    where = find_device(device)
    digits = load_digits(in_classes, seed=seed)
    if not (is_int(batch_size) and 2 <= batch_size <= len(digits.train)):
        raise ArgumentError(f"batch_size: expected 2 to {len(digits.train)} training images, got {batch_size}")
    if clusters > len(digits.train):
        raise ArgumentError(f"clusters: expected at most {len(digits.train)} training images, got {clusters}")
    digits = digits._make(images.to(where) for images in digits)

    folder = Path(output or datetime.now().strftime("runs/digits-%Y%m%d-%H%M%S"))
    if folder.exists() and not (overwrite or resume):
        expected = "a folder that does not exist yet, or overwrite or resume"
        raise FileExistsError(f"output: expected {expected}, got {str(folder)!r}")
    progress = Progress(
        folder, comparable(arguments), checkpoint.load(folder / "checkpoints", resume_from) if resume else None
    )
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with Interruption() as interruption:
            plan = Plan(
                digits.train, epochs, clusters, batch_size, temperature, center_weight, learning_rate, seed, micro_batch
            )
            fabric = Fabric(
                accelerator=where.type, devices=[where.index or 0] if where.type == "cuda" else 1, precision=precision
            )
            methods = ("simclr", "ccl") if method == "compare" else (method,)
            for stage in (WARM_UP, *methods):
                advance(Run(plan, fabric), stage, warmup_epochs if stage == WARM_UP else epochs, progress, interruption)
        models, results, scores = {}, {}, {}
        for name in methods:
            run = Run(plan, fabric)
            run.load_state_dict(progress.finished[name])
            models[name] = run.model
            results[name], scores[name] = evaluate(run.model, digits, clusters=clusters, seed=seed)
        report = {
            "arguments": arguments | {"in_classes": list(in_classes)},
            "images": {name: len(images) for name, images in digits._asdict().items()},
            "default": DEFAULT,
            "results": results,
            "losses": {name: progress.finished[name]["losses"] for name in methods},
            "seconds": round(progress.seconds_before + time.perf_counter() - start, 1),
            "environment": {
                "ccl_fast": __version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "device": torch.cuda.get_device_name(where) if where.type == "cuda" else f"cpu, {os.cpu_count()} cores",
                "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            },
        }
        write_report(folder, report, scores, models)
    except BaseException:
        with suppress(OSError):
            folder.rmdir()  # only where it is still empty, so that the same command can be given again
        raise
    print(format_table(report))
    print(f"written to {folder}")
    return report
