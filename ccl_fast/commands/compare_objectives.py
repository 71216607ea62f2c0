"""An objective against the baseline over several seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from ccl_fast.checks import is_integer
from ccl_fast.commands.options import SET_BY_COMPARE
from ccl_fast.commands.run_folder import (
    RESUMED,
    check_free,
    clear,
    command_to_go_on,
    default_folder,
    held,
    is_empty,
    resumed_folder,
)
from ccl_fast.commands.train_models import train
from ccl_fast.errors import ArgumentError
from ccl_fast.evaluation import DEFAULT, GROUPS
from ccl_fast.files import write_atomically
from ccl_fast.training.checkpoint import CHECKPOINTS, LAST
from ccl_fast.training.config import Config, as_list, fixed_on_resume
from ccl_fast.training.interruption import Interrupted
from ccl_fast.training.launch import check_alone
from ccl_fast.training.objectives import BASELINE

COMPARISON, ARGUMENTS = "comparison.json", RESUMED["compare"][1]


def compare(
    output: str | None = None,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    overwrite: bool = False,
    resume: bool = False,
    warmup_from: str | Path | None = None,
    **options,
) -> dict:
    """Train SimCLR and an objective on the same budget with several seeds, and tell what the objective gains.

    Every seed is a run of ``train`` with the baseline in a folder of its own. The seeds share nothing but the data, so
    the gain, the objective's metric less SimCLR's of the same seed, has a spread: that of the seeds, not of new data.

    Args:
        output: folder for comparison.json and a folder for each seed; by default a fresh ``runs/compare-<time>``.
        seeds: at least two different seeds.
        overwrite: replace the results in an existing output folder.
        resume: go on with the comparison in the output folder, of several the newest, by default of those in ``runs``;
            seeds that are done are not run again. On the command line the other arguments are those of the comparison.
        warmup_from: folder of another comparison with these seeds, whose warm-ups and SimCLR runs are taken over: only
            the objective is trained.
        options: the other arguments of ``train``, ``objective`` among them.

    Returns:
        The content of comparison.json: for every detector, kind of OOD set ("near", "far") and metric the values of
        both and the gains, by seed, with mean and standard deviation; so too the k-NN accuracy of encoder and head and
        the accuracy of a linear classifier, if classes are known; the arguments, and where and when each seed was run.

    Raises:
        ArgumentError: a ValueError naming the argument, what was expected and what came.
        FileExistsError: the output folder exists.
    """
    check_alone("compare")
    seeds = as_list(seeds)
    _check_options(seeds, options, resume=resume, overwrite=overwrite)
    folder = resumed_folder("compare", output) if resume else Path(output or default_folder("compare"))
    _check_folder(folder, resume=resume, overwrite=overwrite)
    origins = _origins(warmup_from, seeds)
    with held(folder):
        if overwrite:  # all at once: a comparison that is stopped and resumed takes no result of an earlier one
            _clear_all(folder, seeds)
        if not (folder / ARGUMENTS).exists():
            _write_arguments(folder, seeds, warmup_from, options)
        with _told_how_to_go_on(folder):
            reports = [
                _report_of_seed(folder / f"seed{seed}", seed, origins[seed], options, resume=resume) for seed in seeds
            ]
        comparison = _describe(seeds, reports)
        text = json.dumps(comparison, indent=2, allow_nan=False) + "\n"
        write_atomically(folder / COMPARISON, lambda file: file.write(text.encode()))
    print(format_comparison(comparison))
    print(f"written to {folder}")
    return comparison


def _write_arguments(folder: Path, seeds: Sequence[int], warmup_from: str | Path | None, options: dict) -> None:
    """Write the arguments, from which the comparison can be resumed."""
    given = Config(**options, warmup_from=warmup_from).plain()
    of_call = (*SET_BY_COMPARE, "output", "overwrite", "resume", "resume_from")
    arguments = {"seeds": list(seeds)} | {name: value for name, value in given.items() if name not in of_call}
    text = yaml.safe_dump(arguments, sort_keys=False)
    write_atomically(folder / ARGUMENTS, lambda file: file.write(text.encode()))


@contextmanager
def _told_how_to_go_on(folder: Path) -> Iterator[None]:
    """Say how to go on with the comparison, not with the run of a seed alone."""
    go_on = command_to_go_on("compare", folder)
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted(stopped.message, stopped.received, go_on) from stopped
    except KeyboardInterrupt as interrupt:
        interrupt.add_note(go_on)
        raise


def _check_options(seeds: list, options: dict, *, resume: bool, overwrite: bool) -> None:
    not_options = [name for name in options if name in SET_BY_COMPARE]
    if not_options:
        raise ArgumentError(f"{not_options[0]}: expected other arguments of train, as compare sets this one")
    if options.get("objective") == BASELINE:
        raise ArgumentError(f"objective: expected one to compare with the baseline, got {BASELINE!r} itself")
    if not all(isinstance(seed, int) for seed in seeds) or len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ArgumentError(f"seeds: expected at least two different seeds, got {seeds}")
    if resume and overwrite:
        raise ArgumentError("overwrite: expected False when resuming, got True")


def _check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and not folder.is_dir():
        raise ArgumentError(f"output: expected the folder of a comparison to resume, got {str(folder)!r}")
    if folder.exists() and not (overwrite or resume or is_empty(folder)):
        expected = "a folder that does not exist yet, or overwrite or resume"
        raise FileExistsError(f"output: expected {expected}, got {str(folder)!r}")


def _origins(warmup_from: str | Path | None, seeds: Sequence[int]) -> Mapping[int, Path | None]:
    """Return, by seed, the folders of the runs whose warm-ups are taken over."""
    if warmup_from is None:
        return dict.fromkeys(seeds)
    origins = {seed: Path(warmup_from) / f"seed{seed}" for seed in seeds}
    missing = [str(origin) for origin in origins.values() if not origin.is_dir()]
    if missing:
        expected = f"the folder of a comparison with seeds {seeds}"
        raise ArgumentError(f"warmup_from: expected {expected}, got {str(warmup_from)!r} without {missing[0]}")
    return origins


def _clear_all(folder: Path, seeds: Sequence[int]) -> None:
    """Drop an earlier comparison of these seeds."""
    earlier = [of_seed for seed in seeds if (of_seed := folder / f"seed{seed}").exists()]
    for of_seed in earlier:
        check_free(of_seed, overwrite=True, resume=False)
    for of_seed in earlier:
        clear(of_seed)
    for name in (COMPARISON, ARGUMENTS):
        (folder / name).unlink(missing_ok=True)


def _report_of_seed(folder: Path, seed: int, origin: Path | None, options: dict, *, resume: bool) -> dict:
    """Train with one seed, unless that is done already, and return the report."""
    if resume and (folder / "report.json").exists():
        return _finished(folder / "report.json", options)
    started = resume and (folder / CHECKPOINTS / LAST).exists()
    # All of them: of a seed that goes on, too, what is not given has its default.
    config = Config(output=folder, seed=seed, baseline=True, resume=started, warmup_from=origin, **options)
    report = train(**vars(config))
    assert report is not None  # of a single process
    return report


def _finished(path: Path, options: dict) -> dict:
    """Return the report of a seed that is done, by a run with these options."""
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ArgumentError(f"output: expected the report of a run in {path}, got something else ({error})") from error
    parts = ("arguments", "environment", "images", "titles", "results")
    if not isinstance(report, dict) or not all(isinstance(report.get(part), dict) for part in parts):
        raise ArgumentError(f"output: expected the report of a run in {path}, got one without {' or '.join(parts)}")
    if not is_integer(n := report["images"].get("train")):
        raise ArgumentError(f"output: expected the report of a run in {path}, got one without a number of images")
    given = Config(**options).fitted(n)
    for name, value in fixed_on_resume(given.plain()).items():
        if name not in report["arguments"]:
            raise ArgumentError(f"output: expected a comparison of this version of ccl_fast, got one without {name}")
        was = report["arguments"][name] if name not in SET_BY_COMPARE else value
        if was != value:
            raise ArgumentError(f"{name}: expected {was!r}, as the comparison to resume has it, got {value!r}")
    return report


def _describe(seeds: Sequence[int], reports: Sequence[dict]) -> dict:
    """Return the content of comparison.json."""
    comparison = {
        "seeds": seeds,
        "arguments": fixed_on_resume(reports[0]["arguments"]) | {"seed": None},
        "environments": [report["environment"] for report in reports],
        "default": DEFAULT,
        "titles": reports[0]["titles"],
        "results": summarize([report["results"] for report in reports]),
    }
    if all("knn" in report for report in reports):
        comparison["knn"] = summarize_knn([report["knn"] for report in reports])
    if all("linear" in report for report in reports):
        accuracies = [report["linear"] for report in reports]
        comparison["linear"] = _paired({name: [of_seed[name] for of_seed in accuracies] for name in accuracies[0]})
    return comparison


def summarize(results: Sequence[dict]) -> dict:
    """Collect the results of each seed, with mean and spread: {detector: {group: {metric: {<objective>, "gain"}}}}."""
    baseline, objective = results[0]
    summary: dict = {}
    for detector, by_set in results[0][objective].items():
        summary[detector] = {}
        for group in [group for group in GROUPS if group in by_set]:
            summary[detector][group] = {}
            for metric in by_set[group]:
                of_each = {name: [r[name][detector][group][metric] for r in results] for name in (baseline, objective)}
                summary[detector][group][metric] = _paired(of_each)
    return summary


def summarize_knn(accuracies: Sequence[dict]) -> dict:
    """Collect the k-NN accuracies of each seed: {"encoder" or "head": {<objective>, "gain"}}."""
    return {
        level: _paired(
            {objective: [of_seed[objective][level] for of_seed in accuracies] for objective in accuracies[0]}
        )
        for level in ("encoder", "head")
    }


def _paired(values: dict[str, list[float]]) -> dict:
    """Return values by seed, mean and spread of the baseline, of the objective and of the gain."""
    theirs, ours = values.values()
    gain = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {name: _moments(of_name) for name, of_name in (values | {"gain": gain}).items()}


def _moments(values: list[float]) -> dict:
    deviation = statistics.stdev(values)
    error = deviation / math.sqrt(len(values))
    return {"values": values, "mean": statistics.fmean(values), "deviation": deviation, "standard_error": error}


def format_comparison(comparison: dict) -> str:
    """Return a line for every detector and kind of OOD sets: AUROC of both objectives, and the gain, with the spread.

    If classes are known there is one for the k-NN accuracy of encoder and head, and for the linear one of the encoder.
    """
    titles = comparison["titles"]
    theirs, ours = titles.values()

    def line(name: str, group: str, parts: dict) -> str:
        cells = [f"{parts[of]['mean']:.3f} +- {parts[of]['deviation']:.3f}" for of in titles]
        gain = parts["gain"]
        better = f"{sum(value > 0 for value in gain['values'])} of {len(gain['values'])}"
        of_gain = f"{gain['mean']:+9.3f} +- {gain['deviation']:.3f}{better:>13}"
        return f"{name:29}{group:6}{cells[0]:>16}{cells[1]:>16}{of_gain}"

    lines = [
        f"AUROC (k-NN, linear: accuracy), mean and standard deviation over {len(comparison['seeds'])} seeds",
        f"{'features/detector':29}{'OOD':6}{theirs:>16}{ours:>16}{'gain':>17}{'seeds better':>14}",
    ]
    for detector, groups in comparison["results"].items():
        name = detector + (" *" if detector == comparison["default"] else "")
        for group, metrics in groups.items():
            lines.append(line(name, group, metrics["auroc"]))
    for level, parts in comparison.get("knn", {}).items():
        lines.append(line(f"k-NN accuracy of the {level}", "", parts))
    if "linear" in comparison:
        lines.append(line("linear accuracy, encoder", "", comparison["linear"]))
    lines.append(f"* the default. Gain: {ours} less {theirs} of the same seed.")
    return "\n".join(lines)
