"""One experiment: data, the schedule for each objective on the same budget, and the judgement."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import yaml
from torch import nn
from torch.utils.data import Dataset

from ccl_fast.data import Images
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import judge
from ccl_fast.files import write_atomically
from ccl_fast.training import checkpoint
from ccl_fast.training.arguments import as_list, check, check_sizes, comparable, plain, warm_up_epochs
from ccl_fast.training.cooperation import LABELS, NEGATIVES
from ccl_fast.training.image_sets import ImageSets, load_image_sets, read_split
from ccl_fast.training.interruption import Interruption
from ccl_fast.training.loop import Run
from ccl_fast.training.objectives import BASELINE, OBJECTIVES
from ccl_fast.training.probe import Probe
from ccl_fast.training.processes import Processes, alone, launched, launched_size
from ccl_fast.training.progress import WARM_UP, Progress, advance
from ccl_fast.training.report import describe, write_report
from ccl_fast.training.run_folder import CHECKPOINTS, CONFIG, check_free, claim, default_folder


def train(
    output: str | Path | None = None,
    objective: Literal[tuple(OBJECTIVES)] = "ccl",
    baseline: bool = True,
    data: str | Path | Dataset | tuple[Dataset, Dataset] = "digits",
    data_root: str | Path = "data",
    download: bool = False,
    in_classes: Sequence[int] | None = None,
    near_ood: Sequence[str] | Mapping[str, Dataset] | None = None,
    far_ood: Sequence[str] | Mapping[str, Dataset] | None = None,
    image_size: int | None = None,
    augmentation: Literal["auto", "digits", "simclr", "none"] = "auto",
    limit: int | None = None,
    strict: bool = False,
    workers: int = 0,
    image_memory: float = 4.0,
    backbone: str | nn.Module = "small",
    stem: Literal["auto", "3x3", "7x7"] = "auto",
    embedding_dim: int = 64,
    epochs: int = 40,
    batch_size: int = 256,
    micro_batch: int | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    temperature: float = 0.1,
    warmup_epochs: int | None = None,
    clusters: int | Sequence[int] = 12,
    recluster_every: int = 1,
    labels_from: Literal[LABELS] = "k-means",
    center_weight: float = 1.0,
    center_ramp_epochs: int = 0,
    concentration: bool = False,
    instance_weight: float | Literal["agreement"] = "agreement",
    instance_negatives: Literal[NEGATIVES] = "centers",
    believe: float | Literal["agreement"] = "agreement",
    ema: float | None = None,
    probe_every: int = 10,
    seed: int = 0,
    device: str = "auto",
    precision: Literal["32-true", "bf16-mixed"] = "32-true",
    channels_last: bool = False,
    compile_model: bool = False,
    fused_optimizer: bool = False,
    timeout: float = 300.0,
    overwrite: bool = False,
    resume: bool = False,
    resume_from: Literal["last", "previous"] = "last",
    warmup_from: str | Path | None = None,
) -> dict | None:
    """Train on images without their labels, and tell images of other kinds from them.

    The objective and its baseline, SimCLR, get the same budget: the same number of epochs, initial weights, batches,
    augmentations and learning rates. They begin with the same warm-up, which is run once.

    After every epoch the state goes to ``<output>/checkpoints/last.ckpt``, and the one before it stays as
    ``previous.ckpt``. Ctrl-C and SIGTERM save it too, in the middle of an epoch, and stop; with ``resume`` the run goes
    on, on a CPU bit for bit as if it had not been stopped. ``<output>/metrics.jsonl`` has a line for every epoch,
    ``<output>/tensorboard`` the same for TensorBoard, ``<output>/config.yaml`` the arguments.

    Several processes (``torchrun --nproc-per-node 8 -m ccl_fast train ...``) share every batch and every clustering;
    the loss is that of the whole batch. The first of them writes the files.

    Args:
        output: folder for report.html, report.json, the weights <objective>.pt (a state_dict) and the files named
            above; by default a fresh ``runs/train-<time>``.
        objective: what is minimised after the warm-up: "ccl"; "simclr", "hard-contrastive" and "cacr", which
            need no clusters; on the clusters of k-means also "supcon", "protonce", "deepcluster-v2", "pamc" and "meow";
            on prototypes that are learned "swav".
        baseline: train SimCLR too, and report both side by side.
        data: the images to train on: "digits" (5,000 real ones, part of the installation), one of torchvision's data
            sets by name ("cifar10", "svhn", "stl10", ...), or a folder of images (with the folders train and test, or
            split at random); from Python also a torch Dataset, or a pair of them to train and to test on.
        data_root: folder of torchvision's data sets.
        download: let torchvision download a data set that is not there.
        in_classes: numbers of the classes to train on; images of the others are OOD. By default all; of the digits 0
            to 5. Classes are used for this and for the log, never for training.
        near_ood: OOD sets that resemble the training images: "held-out" (the other classes), a data set by name (its
            test images), a folder, or a made set: "textures", "noise", "blobs", "interpolation" (mean of two test
            images), "letters"; from Python also {name: Dataset}. By default "held-out", or without that
            "interpolation".
        far_ood: OOD sets that do not, in the same way. By default the other made sets.
        image_size: height and width in pixels, to which images are scaled and cropped. By default the data set's own,
            or 224 if it has none.
        augmentation: how views are made: "digits" (small affine maps, contrast, noise), "simclr" (crops, flips,
            colours, blur), "none", or "auto": "digits" for grey images and "simclr" for coloured ones.
        limit: at most that many images of each part, for a quick run.
        strict: stop at an unreadable image of a folder; by default they are skipped and counted.
        workers: processes that read images.
        image_memory: a set of images up to this size (in GiB, one byte a value) is read once and kept in memory; of a
            larger one each batch is read when it is needed.
        backbone: the encoder: "small" (three convolutions), "resnet8" (a narrow ResNet for small natural images on a
            CPU), a classifier of torchvision by name ("resnet18", ...) with random weights; from Python also a module,
            images [n, c, h, w] to features [n, width].
        stem: "3x3" lets a ResNet begin at full resolution, as is usual for small images; "7x7" leaves it as it is;
            "auto" means "3x3" for images of up to 64 pixels.
        embedding_dim: width of the projection head's output, to which the loss is applied.
        epochs: passes over the training images, warm-up included.
        batch_size: images of a step, of two views each, on all processes together; the incomplete last batch of an
            epoch is left out.
        micro_batch: images that pass the network of a process at a time; the gradient is that of the whole batch,
            memory that of a micro-batch, the price one more forward pass. BatchNorm takes its statistics over a
            micro-batch. By default the whole batch.
        learning_rate: of AdamW at the start; it follows half a cosine down to 0.
        weight_decay: of AdamW.
        temperature: temperature of the similarities in the loss. "cacr" has none, so there it is that of warm-up and
            baseline, and without these has no effect.
        warmup_epochs: how many epochs use instance-level contrast (SimCLR) before the objective comes in. By default
            half of the epochs, at most 20.
        clusters: number of k-means clusters, or of prototypes; of several, the loss is the mean over them. At least 2
            for "deepcluster-v2", "meow" and "swav".
        recluster_every: epochs from one clustering to the next. Each starts from the last centres. Not for "swav".
        labels_from: "k-means", or, to see what clusters are worth, "classes" (the best that clusters could be; the one
            use of classes in training) or "random" numbers (the worst).
        center_weight: weight of the cluster's centre among the positives, for "ccl".
        center_ramp_epochs: epochs after the warm-up in which that weight grows linearly from 0.
        concentration: give every centre a temperature of its own, smaller for tight clusters, with ``temperature`` as
            their mean (PCL), for "ccl" and "protonce".
        instance_weight: share of "ccl" that contrasts images with their own views alone, 0 to 1: what is certain keeps
            its pull, however many cluster-mates there are and however wrong the clusters. "agreement": as large as the
            share of the images whose clusters are not believed.
        instance_negatives: what that share holds an image against: all images of the batch and the "centers" of other
            clusters, the images of "other-clusters" alone, as those of its own are likely of its kind, or "all" images.
        believe: share of the images whose cluster "ccl" believes, 0 to 1; the others, those farthest from their
            centres, have their own views as positives alone. "agreement": as large a share as that of images both of
            whose views lie nearest to their own cluster's centre, beyond chance, measured at every clustering; clusters
            that mean nothing are not believed.
        ema: decay of an exponential moving average of the weights, 0.99 to 0.9999 or so. The average is what is
            clustered, judged and saved. By default there is none.
        probe_every: epochs from one look at the features to the next, which adds to the log their k-NN accuracy on the
            test images, if classes are known, and how often an image's two views lie in the same cluster; also after
            the warm-up's last epoch and the last of all. 0: never.
        seed: of weights, split, batches, augmentations and k-means. On one machine it fixes every number.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...; of several processes each takes a GPU of
            its own.
        precision: "32-true", or "bf16-mixed": the network in bfloat16, loss and weights in float32.
        channels_last: keep images and weights in that memory format, which suits convolutions on tensor cores.
        compile_model: let torch.compile make the network faster.
        fused_optimizer: one kernel for the optimiser's step.
        timeout: seconds after which a process that does not answer the others counts as lost.
        overwrite: replace the run in an existing output folder; files that no run writes stay as they are.
        resume: go on with the run in the output folder; the other arguments must be the same
            (``--config <output>/config.yaml`` gives them).
        resume_from: the checkpoint to go on from, "last", or the one before it, "previous".
        warmup_from: folder of another run, whose warm-up this one begins with instead of a warm-up of its own, and
            whose SimCLR is the baseline if it is finished. Arguments that matter before the end of the warm-up must be
            the same. The result is that of a run by itself, on a CPU bit for bit. A run that is resumed needs it no
            more.

    Returns:
        The content of report.json; on other processes than the first None.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output folder exists and is not empty.
        FileNotFoundError: the data is not there; says where it was looked for and how to get it.
        FloatingPointError: the loss is not finite, with the step and the last good checkpoint.
        CheckpointError: there is nothing to resume, or it is damaged.
        Interrupted: the run was asked to stop and has saved its state.
        PeerError: another process has ended, or has not answered in time; with the last good checkpoint.

    Papers: Chen, Gui, Fan, "Cluster-aware contrastive learning for unsupervised out-of-distribution detection",
    arXiv:2302.02598; Chen, Kornblith, Norouzi, Hinton, "A simple framework for contrastive learning of visual
    representations", 2020 (SimCLR); Li et al., "Prototypical contrastive learning of unsupervised representations",
    2021 (PCL: several numbers of clusters, concentration). Those of the other objectives: see ``ccl_fast.losses``.
    """
    arguments = {name: value.item() if isinstance(value, np.generic) else value for name, value in locals().items()}
    resolved = {"clusters": as_list(clusters), "warmup_epochs": warm_up_epochs(arguments)}
    options = SimpleNamespace(**arguments | resolved)
    check(vars(options))
    _check_shared(objective)
    start = time.perf_counter()
    objectives = (BASELINE, objective) if baseline and objective != BASELINE else (objective,)
    options_of = {name: SimpleNamespace(**vars(options) | {"objective": name}) for name in (BASELINE, objective)}
    with launched(device, precision, timeout) as (fabric, processes):
        where = fabric.device
        folder = processes.first(lambda: _free_folder(options), patient=True)
        images, sets = _read(options, processes, where)
        check_sizes(len(images), options.batch_size, options.clusters, options.concentration, processes.size)
        # Before anything is written: its errors are those of arguments.
        first = Run(options_of[BASELINE], images, fabric, processes)
        state = origin = None
        if resume:
            state = processes.first(lambda: checkpoint.load(folder / CHECKPOINTS, resume_from), patient=True)
        elif warmup_from is not None:
            origin = processes.first(lambda: _load_origin(warmup_from), patient=True)
        probe = Probe(options.probe_every, images, sets.test if processes.is_first else None)
        progress = Progress(folder, comparable(arguments), images, state, processes, probe)
        if origin is not None:
            progress.begin_with(origin, warmup_from, {WARM_UP, *objectives} - {objective})
        processes.first(lambda: claim(folder, overwrite=overwrite, resume=resume))
        if origin is not None and processes.is_first:
            print(f"taken over from {warmup_from}: {' and '.join(progress.finished)}")
        try:
            processes.first(lambda: _write_config(folder, arguments))
            with Interruption() as interruption:
                for stage in (WARM_UP, *objectives):
                    run = first if stage == WARM_UP else Run(options_of[stage], images, fabric, processes)
                    last = options.warmup_epochs if stage == WARM_UP else options.epochs
                    advance(run, stage, last, progress, interruption)
        except BaseException:
            if processes.is_first and not (folder / CHECKPOINTS).exists():
                # Nothing to resume: the same command can be given again.
                (folder / CONFIG).unlink(missing_ok=True)
                with suppress(OSError):  # somebody else's files are in it
                    folder.rmdir()
            raise
        finally:
            progress.close()
    if not processes.is_first:
        return None

    fabric = fabric if processes.size == 1 else alone(where, precision)  # the others have left
    models, judgements = {}, {}
    for name in objectives:
        run = Run(options_of[name], sets.train, fabric)
        run.load_state_dict(progress.finished[name])
        models[name] = run.result
        judgements[name] = judge(
            run.result, sets.train, sets.test, sets.near, sets.far, clusters=options.clusters[0], seed=options.seed
        )
    report = describe(arguments, sets, judgements, where) | {
        "losses": {name: progress.finished[name]["losses"] for name in objectives},
        "log": {name: [line for line in progress.lines if line["stage"] in (WARM_UP, name)] for name in objectives},
        "seconds": round(progress.seconds_before + time.perf_counter() - start, 1),
    }
    write_report(folder, report, judgements, sets, models)
    return report


def _check_shared(objective: str) -> None:
    if launched_size() > 1 and not OBJECTIVES[objective].is_distributed:
        shared = ", ".join(name for name, of in OBJECTIVES.items() if of.is_distributed)
        expected = f"one whose batches processes can share ({shared})"
        raise ArgumentError(f"objective: expected {expected}, got {objective!r} on {launched_size()} processes")


def _free_folder(options: SimpleNamespace) -> Path:
    folder = default_folder("train") if options.output is None else Path(options.output)
    check_free(folder, overwrite=options.overwrite, resume=options.resume)
    return folder


def _load_origin(run: str | Path) -> dict:
    checkpoints = Path(run) / CHECKPOINTS
    if not (checkpoints / checkpoint.LAST).exists():
        raise ArgumentError(f"warmup_from: expected the folder of a run, with its checkpoints, got {str(run)!r}")
    return checkpoint.load(checkpoints)


def _read(options: SimpleNamespace, processes: Processes, device: torch.device) -> tuple[Images, ImageSets | None]:
    """The training images; and all sets on the process that will need them, the first."""
    images = sets = None
    with processes.together(patient=True):
        if processes.is_first:
            sets = load_image_sets(options).to(device)
            images = sets.train
    with processes.together(patient=True):  # afterwards: what is to be downloaded is there
        if not processes.is_first:
            images = read_split(SimpleNamespace(**vars(options) | {"download": False})).train.to(device)
    return images, sets


def _write_config(folder: Path, arguments: dict) -> None:
    once = {"resume": False, "resume_from": "last", "overwrite": False}
    config = yaml.safe_dump(plain(arguments | once), sort_keys=False)
    write_atomically(folder / CONFIG, lambda file: file.write(config.encode()))
