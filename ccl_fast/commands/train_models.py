"""``train``: an objective and its baseline on the same budget, and how well their features tell OOD images."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from ccl_fast.commands.environment import describe_device
from ccl_fast.commands.image_sets import (
    ImageSets,
    check_extra_images,
    load_image_sets,
    read_split,
    with_extra_images,
)
from ccl_fast.commands.judgement import write_run_report
from ccl_fast.commands.report import describe_images, measures
from ccl_fast.commands.run_folder import CONFIG, REPORT, RunFolder, clear, command_to_go_on, resumed_folder
from ccl_fast.commands.tensor_files import check_writable
from ccl_fast.commands.trained_run import TrainedRun, read_arguments
from ccl_fast.data import Images
from ccl_fast.distributed import Group
from ccl_fast.errors import ArgumentError
from ccl_fast.files import write_atomically
from ccl_fast.training import checkpoint
from ccl_fast.training.checkpoint import CHECKPOINTS
from ccl_fast.training.config import (
    BATCH_SIZE,
    CLUSTERS,
    Config,
    as_list,
    check_sizes,
    fixed_on_resume,
    is_unkept,
    takes_fields_of,
)
from ccl_fast.training.interruption import Interruption
from ccl_fast.training.launch import launched, launched_size
from ccl_fast.training.loggers import Loggers, Results
from ccl_fast.training.loop import Run
from ccl_fast.training.objectives import BASELINE, OBJECTIVES, ObjectiveName
from ccl_fast.training.probe import Probe
from ccl_fast.training.progress import WARM_UP, Progress, advance, lengthened
from ccl_fast.training.telling import Telling, say

LARGE_IMAGE = 96  # pixels; a quick look need not see more


def _arguments_in(folder: Path) -> Config | None:
    """Return the arguments of the run in a folder; None: there are none, or of another version, which is told later."""
    try:
        return read_arguments(folder / CONFIG)
    except (ArgumentError, OSError):
        return None


def _with_those_of_the_run(given: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call: of one that resumes a run, those that are not given as that run has them.

    Raises:
        ArgumentError: the run has one that no file can keep.
    """
    if given.get("resume") is not True:
        return given
    folder = resumed_folder("train", given.get("output"))
    run = _arguments_in(folder)
    if run is None:
        return given
    kept = vars(run)
    for name, value in kept.items():
        parts = value.values() if isinstance(value, Mapping) else as_list(value)
        if name not in given and any(map(is_unkept, parts)):
            raise ArgumentError(f"{name}: expected the one that the run was trained with, as no file can keep {value}")
    return kept | given | {"output": folder}


@takes_fields_of(Config, _with_those_of_the_run)
def train(config: Config) -> dict | None:
    """Train on images without their labels, and tell images of other kinds from them.

    The objective and its baseline, SimCLR, get the same budget: the same number of epochs, initial weights, batches,
    augmentations and learning rates. They begin with the same warm-up, which is run once.

    After every epoch the state goes to ``<output>/checkpoints/last.ckpt``, and the one before it stays as
    ``previous.ckpt``. Ctrl-C and SIGTERM save it too, in the middle of an epoch, and stop; with ``resume`` the run goes
    on, on a CPU bit for bit as if it had not been stopped. ``<output>/metrics.jsonl`` has a line for every epoch, the
    ``loggers`` (by default ``<output>/tensorboard``) the same, ``<output>/config.yaml`` the arguments.

    Several processes (``torchrun --nproc-per-node 8 -m ccl_fast train ...``) share every batch and every clustering;
    the loss is that of the whole batch. The first of them writes the files.

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
    config.check()
    _check_shared(config.objective)
    if config.resume:
        config = _of_the_run(config)
    start = time.perf_counter()
    plan = config.resolved()
    with RunFolder(plan.output, overwrite=plan.overwrite, resume=plan.resume) as run_folder:
        with launched(plan.device, plan.precision, plan.timeout) as (fabric, group):
            device = fabric.device
            folder = group.patient.first(run_folder.reserve)
            if group.is_first:
                say(f"on {describe_device(device)}; results go to {folder}; reading {config.plain()['data']}")
            origin = _origin(plan, group)  # before long work: it may not be there
            images, sets = _read(plan, group, device)
            check_sizes(len(images), plan, group.size)
            given, config = config, config.fitted(len(images))
            plan = config.resolved()
            # Before anything is written: its errors are those of arguments.
            warm_up = Run(replace(plan, objective=BASELINE), images, fabric, group)
            check_writable(warm_up.model.state_dict())
            progress = _open_progress(config, folder, images, sets, group, origin)
            del origin  # a model and its optimiser
            group.first(run_folder.claim)
            if sets is not None:
                _print_plan(given, plan, sets, warm_up, progress)
            with _told_how_to_go_on(progress), _dropped_without_checkpoint(folder, group), closing(progress):
                group.first(lambda: _write_config(folder, config))
                _train_stages(plan, warm_up, progress, TrainedRun(folder, config), sets)
        if sets is None:  # another process than the first
            return None
        with _told_how_to_go_on(progress):
            report, shown = write_run_report(TrainedRun(folder, config), sets, device, start)  # the others have left
            page = folder / f"{REPORT}.html"
            with closing(progress):
                for name in plan.objectives:
                    pictures = {of.name: of.picture for of in shown if of.objective in (None, name)}
                    progress.log_results(name, Results(measures(report, name), page, pictures))
            return report


def _of_the_run(config: Config) -> Config:
    """Return the configuration with the folder of the run that is resumed; of a longer one, as that run lengthened."""
    folder = resumed_folder("train", config.output)
    config = replace(config, output=folder)
    earlier = _arguments_in(folder)
    if earlier is None or earlier.epochs >= config.epochs or list(earlier.restarts) != list(config.restarts):
        return config
    config = config.lengthened(earlier)
    config.check()
    return config


def _check_shared(objective: ObjectiveName) -> None:
    """Check that several processes can share the objective's batches, if there are several."""
    if launched_size() > 1 and not OBJECTIVES[objective].is_distributed:
        shared = ", ".join(name for name, of in OBJECTIVES.items() if of.is_distributed)
        expected = f"one whose batches processes can share ({shared})"
        raise ArgumentError(f"objective: expected {expected}, got {objective!r} on {launched_size()} processes")


def _read(plan: Config, group: Group, device: torch.device) -> tuple[Images, ImageSets | None]:
    """Read the training images; and all sets on the process that will need them, the first."""
    sets = None
    with group.patient.together():
        check_extra_images(plan)
        if group.is_first:
            sets = load_image_sets(plan).to(device)
    with group.patient.together():  # afterwards: what is to be downloaded is there
        images = read_split(replace(plan, download=False)).train.to(device) if sets is None else sets.train
        images = with_extra_images(plan, images)
    return images, sets


def _open_progress(
    config: Config, folder: Path, images: Images, sets: ImageSets | None, group: Group, origin: dict | None
) -> Progress:
    """Return how far the run has come: nowhere, as its checkpoint has it, or to the end of another run's warm-up."""
    state, given = None, config.warmup_from
    if config.resume:
        state = group.patient.first(lambda: checkpoint.load(folder / CHECKPOINTS, config.resume_from))
        state = lengthened(state, config.plain(), config.objectives)
    # Of the process that looks it is the images whose classes are known.
    probed, tested = (images, None) if sets is None else (sets.train, sets.test)
    probe = Probe(config.probe_every, probed, tested)
    arguments = config.plain()
    go_on = command_to_go_on("train", folder, group.size)
    if any(
        is_unkept(value) for name in ("data", "backbone", "near_ood", "far_ood") for value in as_list(arguments[name])
    ):
        go_on = f"the same call with output={str(folder)!r} and resume=True"
    loggers = Loggers(as_list(config.loggers), folder, arguments)
    progress = Progress(folder, fixed_on_resume(arguments), images, state, group, probe, loggers, go_on)
    if given is not None and origin is not None:
        progress.begin_with(origin, given, {WARM_UP, *config.objectives} - {config.objective})
    return progress


def _origin(config: Config, group: Group) -> dict | None:
    """Load the last checkpoint of the run whose warm-up is taken over, if one is."""
    given = config.warmup_from
    return None if given is None or config.resume else group.patient.first(lambda: _load_origin(given))


def _load_origin(run: str | Path) -> dict:
    checkpoints = Path(run) / CHECKPOINTS
    if not (checkpoints / checkpoint.LAST).exists():
        raise ArgumentError(f"warmup_from: expected the folder of a run, with its checkpoints, got {str(run)!r}")
    return checkpoint.load(checkpoints)


def _print_plan(given: Config, plan: Config, sets: ImageSets, run: Run, progress: Progress) -> None:
    """Say what is trained on what, and what was chosen for so few images."""
    say(describe_images({name: len(images) for name, images in sets.parts.items()}, list(sets.near), list(sets.far)))
    n = len(run.images)
    if given.extra_images is not None:
        say(f"{n - len(sets.train)} extra images; an epoch has each of the others {plan.real_weight} times")
    if given.batch_size is None and plan.batch_size != BATCH_SIZE:
        few = f"of {n} training images an epoch has {run.steps_per_epoch} such batches"
        say(f"batch_size {plan.batch_size} instead of {BATCH_SIZE}: {few}")
    if given.clusters is None and as_list(plan.clusters) != [CLUSTERS]:
        say(f"clusters {as_list(plan.clusters)[0]} instead of {CLUSTERS}: {n} training images are few for more")
    if plan.warmup_from is not None and not plan.resume:
        say(f"taken over from {plan.warmup_from}: {' and '.join(progress.finished)}")
    under_way, state = progress.under_way or ("", {})
    left = {
        stage: last - (len(state["losses"]) if stage == under_way else first)
        for stage, (last, first) in _epochs(plan, progress).items()
    }
    stages = ", ".join(f"{stage} {epochs}" for stage, epochs in left.items() if epochs)
    none = f"none is left (--epochs above {plan.epochs} lengthens the run)"
    say(f"epochs of {run.steps_per_epoch} steps of {plan.batch_size} images: {stages or none}")


def _epochs(plan: Config, progress: Progress) -> dict[str, tuple[int, int]]:
    """Return, by stage that is not finished, the epochs it ends and begins with."""
    epochs = {WARM_UP: (plan.warmup_length, 0)}
    for stage in plan.objectives:
        end = progress.finished.get(stage)  # of a shorter run, if this is one that is lengthened
        epochs[stage] = (plan.epochs, plan.warmup_length if end is None else len(end["losses"]))
    return {stage: (last, first) for stage, (last, first) in epochs.items() if not progress.is_finished(stage, last)}


def _write_config(folder: Path, config: Config) -> None:
    """Write the arguments, without those of this call alone."""
    lasting = replace(config, resume=False, resume_from="last", overwrite=False)
    text = yaml.safe_dump(lasting.plain(), sort_keys=False)
    write_atomically(folder / CONFIG, lambda file: file.write(text.encode()))


@contextmanager
def _told_how_to_go_on(progress: Progress) -> Iterator[None]:
    """Say so where a Ctrl-C acts at once, if there is a checkpoint."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if (progress.folder / CHECKPOINTS / checkpoint.LAST).exists():
            interrupt.add_note(progress.go_on)
        raise


@contextmanager
def _dropped_without_checkpoint(folder: Path, group: Group) -> Iterator[None]:
    """Drop the folder after an error if there is nothing to resume: the same command can be given again."""
    try:
        yield
    except BaseException:
        if group.is_first and not (folder / CHECKPOINTS / checkpoint.LAST).exists():
            clear(folder)
        raise


def _train_stages(plan: Config, warm_up: Run, progress: Progress, kept: TrainedRun, sets: ImageSets | None) -> None:
    """Train what is not finished of the warm-up and of every objective; keep each model as soon as it is trained."""
    epochs, steps = _epochs(plan, progress), warm_up.steps_per_epoch
    done = 0
    if progress.under_way and progress.under_way[0] in epochs:
        stage, state = progress.under_way
        done = state["step"] - epochs[stage][1] * steps
    is_large = plan.image_size is None and max(warm_up.images.shape[1:]) > LARGE_IMAGE
    advice = f"--image-size {LARGE_IMAGE} is several times as quick" if is_large else ""
    telling = Telling(epochs, steps, done=done, quiet=not warm_up.group.is_first, advice=advice)
    with closing(telling), Interruption() as interruption:
        advance(warm_up, WARM_UP, plan.warmup_length, progress, interruption, telling)
        for objective in plan.objectives:
            run = Run(replace(plan, objective=objective), warm_up.images, warm_up.fabric, warm_up.group)
            advance(run, objective, plan.epochs, progress, interruption, telling)
            progress.load(run, progress.finished[objective])  # it may have been trained before, or by another run
            classes = None if sets is None else sets.class_names
            run.group.first(partial(kept.write_model, objective, run.result, run.images.shape, classes))
