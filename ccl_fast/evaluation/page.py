"""The report as one HTML file that needs no network: summary, tables, pictures, images, arguments."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor
from torch.nn.functional import normalize

from ccl_fast.evaluation import pictures, samples
from ccl_fast.evaluation.detection import GROUPS, Evaluation
from ccl_fast.evaluation.pictures import OodSet, Picture
from ccl_fast.evaluation.thresholds import threshold
from ccl_fast.files import write_atomically

if TYPE_CHECKING:
    from ccl_fast.data import Images


class Metric(NamedTuple):
    """How a metric is named, and how it is read."""

    name: str
    title: str
    positive: str
    is_better_high: bool


METRICS = (
    Metric("auroc", "AUROC", "", True),
    Metric("aupr_ood", "AUPR", "OOD positive", True),
    Metric("aupr_id", "AUPR", "ID positive", True),
    Metric("fpr95_id", "FPR95", "ID positive", False),
    Metric("fpr95_ood", "FPR95", "OOD positive", False),
)
CURVES = {  # of a line of the log
    "loss": "Loss",
    "encoder_knn": "k-NN accuracy of the encoder’s features",
    "head_knn": "k-NN accuracy of the head’s features",
    "changed_labels": "Share of images that changed cluster",
    "view_agreement": "Share of images whose two views lie in the same cluster",
    "nmi": "NMI of clusters and classes",
    "accuracy": "Accuracy of clusters as classes, one-to-one",
    "purity": "Accuracy of clusters as classes, many-to-one",
    "same_class": "Share of cluster-mates of the same class",
    "smallest_cluster": "Images in the smallest cluster",
    "largest_cluster": "Images in the largest cluster",
    "believed": "Share of images whose cluster is believed",
    "believed_same_class": "Same class, among images that are believed",
}
NO_CURVES = ("stage", "objective", "epoch", "step", "learning_rate")
SHOWN_IMAGES = 12  # most outlying, least outlying
SHOWN_CLUSTERS, SHOWN_PER_CLUSTER = 12, 6

T = TypeVar("T")


class ShownPicture(NamedTuple):
    """A picture of the page: what it shows, and of which objective; None: of all that there are."""

    name: str
    objective: str | None
    picture: Picture


def write_page(
    path: Path, report: dict, evaluations: Mapping[str, Evaluation], images: Mapping[str, Images]
) -> list[ShownPicture]:
    """Write the report as a page that opens in any browser, light or dark, wide or narrow, and prints.

    A picture that cannot be drawn is a note in the page, and a line on stderr.

    Args:
        path: of the HTML file; it is whole or not there.
        report: the content of report.json; without "log", "losses" or "clustering" these parts are left out.
        evaluations: by objective; of two the first is the baseline.
        images: "train", "test" and the OOD sets, by the names that the evaluations use.

    Returns:
        Its pictures.

    Raises:
        OSError: it could not be written.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("ccl_fast.evaluation").joinpath("page.html").read_text("utf-8"))
    content = _content(report, evaluations, images)
    page = template.render(content).encode(errors="replace")
    write_atomically(path, lambda file: file.write(page))
    return list(_shown(content, {title: objective for objective, title in report["titles"].items()}))


def _shown(content: Mapping[str, object], objectives: Mapping[str, str]) -> Iterator[ShownPicture]:
    """Yield the pictures of a page by its section and what they show there; ``objectives`` by their titles."""
    for section, entries in content.items():
        for entry in entries if isinstance(entries, list) else ():
            for key, value in entry.items() if isinstance(entry, dict) else ():
                if isinstance(value, Picture):
                    name = f"{section}/{entry['title'] if key == 'svg' else key}"
                    yield ShownPicture(name, objectives.get(entry.get("objective", "")), value)


def summarize(report: dict) -> str:
    """Say in a sentence what came out, and of two objectives whether they can be told apart."""
    objectives, groups = list(report["results"]), [group for group in GROUPS if report[group]]
    titles, default = [report["titles"][objective] for objective in objectives], report["default"]
    if not groups:
        return "No OOD set was given, so there is nothing to tell from the test images."
    values = {
        group: [round(report["results"][objective][default][group]["auroc"], 3) for objective in objectives]
        for group in groups
    }
    if len(objectives) == 1:
        (objective,), found = objectives, []
        for group, (value,) in values.items():
            between = _interval(report["intervals"][objective][default][group]["auroc"])
            found.append(f"{value:.3f} ({between}) on {group} OOD sets")
        return f"With its default detector, {titles[0]} reaches an AUROC of {' and '.join(found)}."
    first, second = titles
    parts = []
    for group, (a, b) in values.items():
        between = report["differences"][default][group]["auroc"]
        if _excludes_zero(between):
            verdict = f"{abs(b - a):.3f} {'above' if between[0] > 0 else 'below'} {first}’s {a:.3f}"
        else:
            verdict = f"no clear difference from {first}’s {a:.3f}"
        parts.append(f"{b:.3f} on {group} OOD sets, {verdict} ({_signed_interval(between)})")
    return f"With the default detector, {second} reaches an AUROC of {'; and of '.join(parts)}."


def _content(report: dict, evaluations: Mapping[str, Evaluation], images: Mapping[str, Images]) -> dict:
    objectives = list(evaluations)
    sets = [*report["near"], *report["far"]]
    groups = [group for group in GROUPS if report[group]]
    counts = report["images"]
    axis = functools.cache(lambda: pictures.ScoreAxis.of([evaluation.scores for evaluation in evaluations.values()]))
    return {
        "light": Markup(pictures.css_colors(dark=False)),
        "dark": Markup(pictures.css_colors(dark=True)),
        "objectives": report["titles"],
        "colors": _colors(objectives),
        "dashes": pictures.DASHES,
        "default": report["default"],
        "summary": summarize(report),
        "facts": _facts(report, sets),
        "resamples": f"{report['bootstrap']['resamples']:,}",
        "confidence": f"{100 * report['bootstrap']['confidence']:g} %",
        "cards": [_card(report, objectives, group) for group in groups],
        "knn": [
            {"objective": objective, "linear": _percent(report["linear"][objective])}
            | {level: _percent(accuracy) for level, accuracy in of_levels.items()}
            for objective, of_levels in report.get("knn", {}).items()
        ],
        "metrics": METRICS,
        "notes": [
            f"{report['titles'][objective]}: {note}"
            for objective in objectives
            for note in evaluations[objective].notes
        ],
        "overview": [_overview(report, objectives, group) for group in groups],
        "of_groups": [
            {
                "title": f"{group.capitalize()} OOD",
                "note": _mean_of(report[group]),
                "rows": _rows(report, objectives, group),
            }
            for group in groups
        ],
        "of_sets": [
            {
                "title": f"{group.capitalize()} OOD sets",
                "note": "",
                "rows": [
                    {"label": name, "note": _count(counts["ood"][name], "image"), "is_default": False}
                    | {"cells": _cells(report, objectives, report["default"], name)}
                    for name in report[group]
                ],
            }
            for group in groups
        ],
        "of_detectors": [
            {"title": name, "note": group, "rows": _rows(report, objectives, name)}
            for group in groups
            for name in report[group]
        ],
        "scores": [_scores(report, evaluations[objective], objective, axis) for objective in objectives]
        if sets
        else [],
        "samples": _attempted(
            "samples of images", lambda: samples.sample_parts(images, {group: report[group] for group in groups})
        ),
        "views": _attempted(
            "views of training images",
            lambda: samples.sample_views(images["train"], report["arguments"]["augmentation"]),
        ),
        "thresholds": [_thresholds(report, objective, groups) for objective in objectives] if sets else [],
        "clusters": [_clusters(report, evaluations[objective], objective, images) for objective in objectives],
        "training": _training(report, evaluations),
        "borders": [_border(report, evaluations[objective], objective, images, sets) for objective in objectives],
        "command": report.get("command", ""),
        "arguments": [
            (name, _plain(value), _plain(used) if used != value else "")
            for name, value in report["arguments"].items()
            for used in [report.get("resolved", {}).get(name, value)]
        ],
        "environment": {name: _plain(value) for name, value in report["environment"].items()},
        "counts": [("training images", "", counts["train"]), ("test images", "", counts["test"])]
        + [(name, group, counts["ood"][name]) for group in GROUPS for name in report[group]],
        "seconds": _duration(report["seconds"]),
    }


def _attempted(what: str, draw: Callable[[], T]) -> T | Markup:
    """Draw, or return a note in its place: whatever is odd about a picture costs this picture and nothing else."""
    try:
        return draw()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"report: could not draw {what} ({reason})", file=sys.stderr)
        return Markup('<p class="note">Could not be drawn ({}).</p>').format(reason)


def _facts(report: dict, sets: Sequence[str]) -> list[str]:
    counts, environment = report["images"], report["environment"]
    facts = [
        _count(counts["train"], "training image"),
        _count(counts["test"], "test image"),
        f"{_count(sum(counts['ood'].values()), 'image')} of {_count(len(sets), 'OOD set')}" if sets else "",
        _duration(report["seconds"]),
        str(environment["device"]),
        str(environment["date"])[:10],
    ]
    return [fact for fact in facts if fact]


def _colors(objectives: Sequence[str]) -> dict[str, str]:
    """Choose the objectives' colours: the last one is what the page is about."""
    return dict.fromkeys(objectives, "baseline") | {objectives[-1]: "objective"}


def _card(report: dict, objectives: Sequence[str], group: str) -> dict:
    default, rows = report["default"], []
    for objective in objectives:
        values, between = (report[of][objective][default][group] for of in ("results", "intervals"))
        auroc, fpr95 = f"{values['auroc']:.3f}", _percent(values["fpr95_id"])
        auroc_between, fpr95_between = _interval(between["auroc"]), _interval(between["fpr95_id"], percent=True)
        rows.append({"objective": objective, "auroc": (auroc, auroc_between), "fpr95": (fpr95, fpr95_between)})
    return {
        "title": f"{group.capitalize()} OOD",
        "note": _mean_of(report[group]),
        "rows": rows,
        "difference": _difference(report, objectives, group) if len(objectives) > 1 else "",
    }


def _difference(report: dict, objectives: Sequence[str], group: str) -> str:
    """Say how the objective's default detector differs from the baseline's, and whether that is told from nothing."""
    default, parts = report["default"], []
    first, second = (report["results"][objective][default][group] for objective in objectives)
    for metric, name, scale, unit in (("auroc", "AUROC", 1, ""), ("fpr95_id", "FPR95", 100, " points")):
        between = report["differences"][default][group][metric]
        value = _signed(scale * (second[metric] - first[metric]), 4 if scale == 1 else 1)
        includes = "" if _excludes_zero(between) else ", includes 0"
        parts.append(f"{name} {value}{unit} ({_signed_interval(between, scale)}{includes})")
    return "; ".join(parts)


def _interval(between: Sequence[float], *, percent: bool = False) -> str:
    return "–".join(f"{100 * value:.1f}" if percent else f"{value:.3f}" for value in between) + " %" * percent


def _signed_interval(between: Sequence[float], scale: float = 1) -> str:
    return " to ".join(_signed(scale * value, 4 if scale == 1 else 1) for value in between)


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")


def _excludes_zero(between: Sequence[float]) -> bool:
    low, high = between
    return low > 0 or high < 0


def _overview(report: dict, objectives: Sequence[str], group: str) -> dict:
    values = {
        objective: {detector: by_set[group]["auroc"] for detector, by_set in report["results"][objective].items()}
        for objective in objectives
    }
    best = {objective: max(of_objective, key=of_objective.__getitem__) for objective, of_objective in values.items()}
    titles, colors = report["titles"], _colors(objectives)
    words = ", ".join(
        f"{titles[o]} {values[o][report['default']]:.3f}, at best {values[o][best[o]]:.3f}" for o in objectives
    )
    alt = f"AUROC of every detector on {group} OOD sets; the default detector: {words}."
    words = "; ".join(f"{titles[o]}: {best[o]}" for o in objectives)
    return {
        "title": f"{group.capitalize()} OOD",
        "svg": _attempted(
            f"the detectors on {group} OOD",
            lambda: pictures.detectors(
                {colors[o]: values[o] for o in objectives},
                {colors[o]: _aurocs_between(report["intervals"][o], group) for o in objectives},
                report["default"],
                alt,
            ),
        ),
        "caption": f"{_mean_of(report[group]).capitalize()}. Highest with {words}.",
    }


def _aurocs_between(intervals: Mapping[str, Mapping], group: str) -> dict[str, Sequence[float]]:
    return {detector: by_set[group]["auroc"] for detector, by_set in intervals.items()}


def _rows(report: dict, objectives: Sequence[str], of: str) -> list[dict]:
    detectors = report["results"][objectives[0]]
    return [
        {"label": detector, "note": "", "is_default": detector == report["default"]}
        | {"cells": _cells(report, objectives, detector, of)}
        for detector in detectors
    ]


def _cells(report: dict, objectives: Sequence[str], detector: str, of: str) -> list[dict]:
    """Return one metric after the other, of each the objectives side by side, with their intervals.

    The better one stands out if the interval of the difference excludes 0.
    """
    cells = []
    for metric in METRICS:
        values = [report["results"][objective][detector][of][metric.name] for objective in objectives]
        best = None
        if len(objectives) > 1 and _excludes_zero(report["differences"][detector][of][metric.name]):
            best = (max if metric.is_better_high else min)(values)
        for objective, value in zip(objectives, values, strict=True):
            between = _interval(report["intervals"][objective][detector][of][metric.name])
            cells.append({"value": value, "text": f"{value:.3f}", "interval": between, "is_best": value == best})
    return cells


def _scores(report: dict, evaluation: Evaluation, objective: str, axis: Callable[[], pictures.ScoreAxis]) -> dict:
    """Draw histograms and ROC curves of the default detector."""
    title, metrics = report["titles"][objective], report["results"][objective][report["default"]]
    test = evaluation.scores["test"]
    cut = threshold(test)
    sets, accepted = [], []
    for number, name in enumerate((*report["near"], *report["far"])):
        scores, is_near = evaluation.scores[name], name in report["near"]
        accepted.append(_percent((scores <= cut).double().mean().item()))
        note = f"{'near' if is_near else 'far'} · {accepted[-1]} accepted"
        sets.append(OodSet(name, scores, *pictures.look(number, is_near), note))
    of_sets = ", ".join(f"{s.name} {share}" for s, share in zip(sets, accepted, strict=True))
    alt = f"{title}: histograms of the outlier scores of the test images and of every OOD set."
    alt += f" The threshold {cut:.3g} accepts 95 % of the test images, and of the OOD sets: {of_sets}."
    aurocs = [f"{metrics[s.name]['auroc']:.3f}" for s in sets]
    of_rocs = ", ".join(f"{s.name} {auroc}" for s, auroc in zip(sets, aurocs, strict=True))
    return {
        "objective": title,
        "histograms": _attempted(f"{title}'s histograms", lambda: pictures.histograms(test, sets, axis(), alt)),
        "roc": _attempted(
            f"{title}'s ROC curves",
            lambda: pictures.roc_curves(test, sets, f"{title}: ROC curves. AUROC: {of_rocs}."),
        ),
        "legend": list(zip(sets, aurocs, strict=True)),
    }


def _thresholds(report: dict, objective: str, groups: Sequence[str]) -> dict:
    """Return what each threshold of the default detector lets through, a row for every OOD set."""
    of_percents, between = report["thresholds"][objective], report["intervals"][objective][report["default"]]
    return {
        "objective": report["titles"][objective],
        "percents": list(of_percents),
        "cuts": [_rounded(of["threshold"]) for of in of_percents.values()],
        "rows": [
            {
                "label": name,
                "note": group,
                "cells": [
                    (_percent(of["accepted"][name]), _interval(between[name][f"fpr{percent}_id"], percent=True))
                    for percent, of in of_percents.items()
                ],
            }
            for group in groups
            for name in report[group]
        ],
    }


def _clusters(report: dict, evaluation: Evaluation, objective: str, images: Mapping[str, Images]) -> dict:
    """Draw the map, the sizes and the images of one objective's clusters."""
    title, k = report["titles"][objective], len(evaluation.centers)
    features = {part: of_part["head"] for part, of_part in evaluation.features.items()}
    near, far = ([features[name] for name in report[group]] for group in GROUPS)
    colors = functools.cache(lambda: pictures.cluster_colors(evaluation.centers))
    sizes = evaluation.cluster_ids.bincount(minlength=k)
    empty = int((sizes == 0).sum())
    words = f"from {sizes.min():,} to {sizes.max():,} training images" if k > 1 else "of all training images"
    words += f", {empty} of them empty" if empty else ""

    def draw_map() -> Picture:
        points = pictures.sample(features["train"], evaluation.cluster_ids, evaluation.centers, near, far)
        alt = f"{title}: map of {len(points.train):,} training images in the colours of their clusters, with"
        of_near, of_far = (sum(map(len, of_group)) for of_group in (points.near, points.far))
        alt += f" {of_near} images of near and {of_far} of far OOD sets."
        return pictures.cluster_map(points, colors(), alt)

    def draw_sizes() -> Picture:
        alt = f"{title}: sizes of {_count(k, 'cluster')}, {words}."
        return pictures.cluster_sizes(sizes, colors(), alt)

    return {
        "objective": title,
        "map": _attempted(f"{title}'s map of clusters", draw_map),
        "sizes": _attempted(f"{title}'s sizes of clusters", draw_sizes),
        "sets": [
            (name, _outline(pictures.mark(number, group == "near")))
            for group in GROUPS
            for number, name in enumerate(report[group])
        ],
        "repeats": f"{k:,} clusters share {len(pictures.HUES)} colours; those next to each other differ."
        if k > len(pictures.HUES)
        else "",
        "caption": f"{_count(k, 'cluster')}, {words}.",
        "quality": _quality(report, objective, sizes) if objective in report.get("clustering", {}) else "",
        "gallery": _attempted(
            f"{title}'s images of clusters", lambda: _gallery(evaluation, images["train"], sizes, colors())
        ),
    }


def _outline(ends: Sequence[tuple[float, float]]) -> str:
    """Return strokes as the data of an SVG path, whose y grows downwards."""
    return "".join(f"{'ML'[number % 2]}{x:g} {-y:g}" for number, (x, y) in enumerate(ends))


def _quality(report: dict, objective: str, sizes: Tensor) -> str:
    """Say how clusters compare with classes, and what their number alone does to the figures."""
    values, classes = report["clustering"][objective], report["classes"]
    limit = ""
    if len(sizes) > classes:
        highest = sizes.topk(classes).values.sum().item() / sizes.sum().item()
        limit = f", which {len(sizes)} clusters of these sizes cannot bring above {highest:.3f}, as"
        limit += f" {_count(len(sizes) - classes, 'cluster')} must stand for no class"
    return (
        f"Against the {_count(classes, 'class', 'classes')}, which training never saw: accuracy {values['purity']:.3f}"
        " many-to-one (each cluster stands for its most frequent class; more clusters make it higher by themselves) and"
        f" {values['accuracy']:.3f} one-to-one (each class has one cluster at most{limit});"
        f" NMI {values['nmi']:.3f}; cluster-mates of the same class {values['same_class']:.3f}."
    )


def _gallery(evaluation: Evaluation, train: Images, sizes: Tensor, colors: Sequence[str]) -> list[dict]:
    """Return, of the largest clusters, the training images nearest to the centre."""
    features = normalize(evaluation.features["train"]["head"])
    rows = []
    for number in sizes.argsort(descending=True, stable=True)[:SHOWN_CLUSTERS].tolist():
        members = (evaluation.cluster_ids == number).nonzero().flatten()
        cosines = features[members] @ evaluation.centers[number].to(features)
        chosen = members[cosines.argsort(descending=True, stable=True)[:SHOWN_PER_CLUSTER]]
        if len(chosen):
            shown = [
                (pictures.thumbnail(image), f"cluster {number}, training image {row}")
                for image, row in zip(train[chosen], chosen.tolist(), strict=True)
            ]
            rows.append({"number": number, "size": f"{sizes[number]:,}", "color": colors[number], "images": shown})
    return rows


def _curves_of(log: Mapping[str, Sequence[Mapping]]) -> dict[str, str]:
    """Return titles by the keys of the log's lines; of several numbers of clusters, the key ends with theirs."""
    keys = dict.fromkeys(key for lines in log.values() for line in lines for key in line)
    others = dict.fromkeys(key.partition("/")[0] for key in keys)
    plain = {name: name.replace("_", " ").capitalize() for name in others if name not in NO_CURVES}
    titles = {}
    for name, title in (CURVES | {name: title for name, title in plain.items() if name not in CURVES}).items():
        for key in keys:
            base, _, k = key.partition("/")
            if base == name:
                titles[key] = f"{title}, K = {k}" if k else title
    return titles


def _training(report: dict, evaluations: Mapping[str, Evaluation]) -> list[dict]:
    """Draw every number that the log has, of an objective's own epochs: the warm-up has another's loss."""
    log = report.get("log") or {
        objective: [{"epoch": number, "loss": loss} for number, loss in enumerate(losses, 1)]
        for objective, losses in report.get("losses", {}).items()
    }
    lines = [line for of_objective in log.values() for line in of_objective]
    last = max((line["epoch"] for line in lines), default=1)
    warm_up = max((line["epoch"] for line in lines if line.get("stage") == "warm-up"), default=0)
    own = {o: [line for line in log.get(o, []) if line.get("objective", o) == o] for o in evaluations}
    shown, colors = [], _colors(list(evaluations))
    for key, title in _curves_of(own).items():
        curves = {o: _curve(report, evaluations[o], o, colors[o], own[o], key) for o in evaluations}
        if any(curve.values for curve in curves.values()):
            found = {o: curve for o, curve in curves.items() if curve.values or curve.at_end is not None}
            ends = "; ".join(f"{report['titles'][o]} {_ends(curve)}" for o, curve in found.items())
            draw = functools.partial(
                pictures.curves,
                list(found.values()),
                f"{title} by epoch: {ends}.",
                last=last,
                warm_up=warm_up,
                apart=key == "loss",
            )
            svg = _attempted(f"the curve of {key}", draw)
            is_marked = any(curve.at_end is not None for curve in found.values())
            shown.append({"title": title, "svg": svg, "objectives": list(found), "is_marked": is_marked})
    return shown


def _curve(
    report: dict, evaluation: Evaluation, objective: str, color: str, lines: Sequence[Mapping], key: str
) -> pictures.Curve:
    """Return the finite numbers that the log has of a key, and of clusters the same of those made for the report."""
    points = [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]
    points = [(epoch, value) for epoch, value in points if math.isfinite(value)]
    epochs, values = zip(*points, strict=True) if points else ((), ())
    name, _, k = key.partition("/")
    at_end = None
    if (k or str(report["arguments"]["clusters"]).strip("[]")) == str(len(evaluation.centers)):  # as many
        sizes = evaluation.cluster_ids.bincount(minlength=len(evaluation.centers))
        of_report = {"smallest_cluster": int(sizes.min()), "largest_cluster": int(sizes.max())}
        at_end = (of_report | report.get("clustering", {}).get(objective, {})).get(name)
    return pictures.Curve(color, epochs, values, at_end)


def _ends(curve: pictures.Curve) -> str:
    """Say where a curve begins and ends."""
    line = f"from {curve.values[0]:.3g} to {curve.values[-1]:.3g}" if curve.values else ""
    own = "" if curve.at_end is None else f"{curve.at_end:.3g} with the report’s own clusters"
    return ", ".join(filter(None, (line, own)))


def _border(
    report: dict, evaluation: Evaluation, objective: str, images: Mapping[str, Images], sets: Sequence[str]
) -> dict:
    """Show the most outlying test images and the least outlying OOD images, each with its nearest training image."""
    level = "head" if report["default"].startswith("head/") else "encoder"
    features = {part: normalize(of_part[level]) for part, of_part in evaluation.features.items()}
    title = report["titles"][objective]

    def row(part: str, number: int) -> dict:
        nearest = int((features["train"] @ features[part][number]).argmax())
        picture, neighbor = (
            images[part][torch.tensor([number], device="cpu")][0],
            images["train"][torch.tensor([nearest], device="cpu")][0],
        )
        score = _rounded(evaluation.scores[part][number].item())
        return {
            "set": part if part in sets else "",
            "note": f"no. {number} · {score}",
            "image": (pictures.thumbnail(picture), f"{part}, image {number}, score {score}"),
            "nearest": (pictures.thumbnail(neighbor), f"training image {nearest}"),
        }

    alarms = evaluation.scores["test"].argsort(descending=True, stable=True)[:SHOWN_IMAGES].tolist()
    of_each = max(1, SHOWN_IMAGES // max(1, len(sets)))
    missed = [(s, n) for s in sets for n in evaluation.scores[s].argsort(stable=True)[:of_each].tolist()]
    return {
        "objective": title,
        "alarms": _attempted(f"{title}'s outlying test images", lambda: [row("test", number) for number in alarms]),
        "missed": _attempted(f"{title}'s missed OOD images", lambda: [row(*entry) for entry in missed]),
    }


def _mean_of(names: Sequence[str]) -> str:
    return f"mean of {len(names)} sets" if len(names) > 1 else "one set"


def _count(n: int, noun: str, plural: str = "") -> str:
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def _rounded(score: float) -> str:
    """Return three digits."""
    return f"{score:#.3g}".removesuffix(".").replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
