"""A trained run against OOD sets."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torch.utils.data import Dataset

from ccl_fast.commands.environment import describe_device
from ccl_fast.commands.image_sets import load_image_sets
from ccl_fast.commands.judgement import judge, read_log, write_run_report
from ccl_fast.commands.report import describe, write_report
from ccl_fast.commands.run_folder import EVALUATION, held
from ccl_fast.commands.trained_run import TrainedRun
from ccl_fast.errors import ArgumentError
from ccl_fast.training.launch import check_alone, find_device
from ccl_fast.training.telling import say


def evaluate(
    run: str | Path,
    output: str | Path | None = None,
    near_ood: Sequence[str] | Mapping[str, Dataset] | None = None,
    far_ood: Sequence[str] | Mapping[str, Dataset] | None = None,
    limit: int | None = None,
    data: str | Path | Dataset | tuple[Dataset, Dataset] | None = None,
    data_root: str | Path | None = None,
    backbone: str | nn.Module | None = None,
    workers: int | None = None,
    device: str = "auto",
    download: bool = False,
    strict: bool = False,
    overwrite: bool = False,
) -> dict:
    """Evaluate a trained run on OOD sets: a table, evaluation.json and evaluation.html.

    The images are those of the run, unless an argument says otherwise: its training images fit the detectors, its test
    images and the OOD sets are told apart. The page has the run's training curves too.

    A run whose models are trained, but whose own judgement failed, was killed or lacks a file, gets that first: without
    an output folder, other OOD sets or a limit, its report.json, report.html and fitted detectors are written, as
    ``train`` would have.

    Args:
        run: folder of a finished run of ``train``.
        output: folder for evaluation.html and evaluation.json; by default ``<run>/evaluation``, or the run's own for
            the run's own judgement.
        near_ood: OOD sets that resemble the training images, as for ``train``; by default those of the run.
        far_ood: OOD sets that do not; by default those of the run.
        limit: at most that many images of each part; by default as in the run.
        data: where the run's images are now; by default where they were.
        data_root: folder of torchvision's data sets; by default that of the run.
        backbone: the module that the run was trained with, if it was one (Python only).
        workers: processes that read images; by default as in the run.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        download: let torchvision download a data set that is not there.
        strict: stop at an unreadable image of a folder; by default they are skipped and counted.
        overwrite: replace an evaluation in the output folder.

    Returns:
        The content of evaluation.json, or of report.json.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: there is an evaluation in the output folder, or the run is being written to.
        FileNotFoundError: the data is not there; says where it was looked for and how to get it.
    """
    check_alone("evaluate")
    start = time.perf_counter()
    where = find_device(device)
    trained = TrainedRun.open(
        run,
        near_ood=near_ood,
        far_ood=far_ood,
        limit=limit,
        data=data,
        data_root=data_root,
        backbone=backbone,
        download=download,
        strict=strict,
        workers=workers,
    )
    trained.check_finished()
    if not trained.is_judged and (output, near_ood, far_ood, limit) == (None,) * 4:
        with held(trained.folder):
            return write_run_report(trained, load_image_sets(trained.config).to(where), where, start).report
    folder = Path(output) if output is not None else trained.folder / EVALUATION
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"output: expected a folder, got the file {str(folder)!r}")
    if (folder / f"{EVALUATION}.json").exists() and not overwrite:
        raise FileExistsError(f"output: expected a folder without an evaluation, or overwrite, got {str(folder)!r}")
    say(f"on {describe_device(where)}; reading {trained.config.plain()['data']}")
    sets = load_image_sets(trained.config).to(where)
    evaluations = judge(trained, sets, where)
    report = describe(trained.config.plain(), sets, evaluations, where)
    try:
        report |= read_log(trained)
    except ArgumentError as error:  # the curves of the training are not what is asked for
        say(f"without the curves of the training: {error}")
    report["seconds"] = round(time.perf_counter() - start, 1)
    folder.mkdir(parents=True, exist_ok=True)
    write_report(folder, report, evaluations, sets, EVALUATION)
    return report
