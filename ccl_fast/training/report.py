"""What a run is judged by: OOD metrics, the table, the picture, and the files that keep them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ccl_fast.ood import Mahalanobis, NearestCenter, NearestNeighbor, auroc, fpr95
from ccl_fast.training.checkpoint import write_atomically
from ccl_fast.training.data import Digits
from ccl_fast.training.model import Model, embed

# The figures to quote; the picture shows their scores.
DEFAULT = "head/nearest_neighbor"
TITLES = {"simclr": "SimCLR", "ccl": "CCL"}


def evaluate(model: Model, digits: Digits, *, clusters: int, seed: int) -> tuple[dict, dict[str, list[float]]]:
    """Metrics of every detector on the features before ("encoder") and after ("head") the projection head.

    The detectors see the training images and nothing else. Every model gets its own k-means clusters for the
    detectors that need some, so that none depends on how the model was trained.

    Returns:
        {"<features>/<detector>": {"auroc", "fpr95_id"}}, the false-positive rate with ID as the positive class
        (its threshold can be set without any OOD sample), and the default's scores {"test", "ood"}.
    """
    train, test, ood = (embed(model, images) for images in digits)
    is_ood = torch.arange(len(digits.test) + len(digits.ood)) >= len(digits.test)
    metrics, default_scores = {}, {}
    for features in ("head", "encoder"):
        detectors = {
            "nearest_neighbor": NearestNeighbor(),
            "nearest_center": NearestCenter(clusters, seed=seed),
            "mahalanobis": Mahalanobis(clusters, seed=seed),
        }
        for detector_name, detector in detectors.items():
            name = f"{features}/{detector_name}"
            detector.fit_features(train[features])
            scores = detector.predict_features(torch.cat([test[features], ood[features]])).cpu()
            metrics[name] = {"auroc": auroc(scores, is_ood), "fpr95_id": fpr95(scores, is_ood, positive="id")}
            if name == DEFAULT:
                default_scores = {"test": scores[~is_ood].tolist(), "ood": scores[is_ood].tolist()}
    return metrics, default_scores


def format_table(report: dict) -> str:
    """The report's metrics, one detector a line, one pair of columns a method."""
    results = report["results"]
    lines = [
        "{train} training, {test} test, {ood} OOD images".format(**report["images"]),
        " " * 29 + "".join(f"{TITLES[method]:>18}" for method in results),
        f"{'features/detector':29}" + f"{'AUROC':>10}{'FPR95':>8}" * len(results),
    ]
    for name in next(iter(results.values())):
        values = "".join(f"{r[name]['auroc']:10.3f}{r[name]['fpr95_id']:8.3f}" for r in results.values())
        lines.append(f"{name + (' *' if name == DEFAULT else ''):29}{values}")
    lines.append("* the default. FPR95: share of OOD images accepted when 95 % of the test images are.")
    return "\n".join(lines)


def write_report(folder: Path, report: dict, scores: dict, models: dict[str, Model]) -> None:
    """Write report.json, scores.png and <method>.pt (a state_dict) and drop an earlier run's other weights."""
    for method in TITLES.keys() - models.keys():
        (folder / f"{method}.pt").unlink(missing_ok=True)
    for method, model in models.items():
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
        write_atomically(folder / f"{method}.pt", lambda file, weights=weights: torch.save(weights, file))
    write_atomically(folder / "scores.png", _picture(report, scores).savefig)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / "report.json", lambda file: file.write(text.encode()))


def _picture(report: dict, scores: dict[str, dict[str, list[float]]]) -> Figure:
    """Histograms of the default detector's scores, a panel a method, on the same axes."""
    figure = Figure(figsize=(5 * len(scores), 3.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(scores), sharex=True, sharey=True, squeeze=False)[0]
    # Cosines crowd near 1 and the scores near 0, so the axis is logarithmic.
    values = torch.tensor([score for parts in scores.values() for part in parts.values() for score in part])
    low, high = values.quantile(torch.tensor([0.002, 1.0])).clamp(min=1e-6).log10().tolist()
    bins = torch.logspace(low, high + 1e-3, 41).tolist()
    for panel, (method, parts) in zip(panels, scores.items(), strict=True):
        for part, label in (("test", "in distribution"), ("ood", "out of distribution")):
            n = len(parts[part])
            panel.hist(parts[part], bins=bins, weights=[1 / n] * n, alpha=0.6, label=f"{label} ({n})")
        panel.set_title(f"{TITLES[method]}: AUROC {report['results'][method][DEFAULT]['auroc']:.3f}")
        panel.set_xscale("log")
        panel.set_xlabel(f"outlier score ({DEFAULT})")
    panels[0].set_ylabel("share of images")
    panels[0].legend()
    return figure
