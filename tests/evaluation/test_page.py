# ruff: noqa: E402 (the extra must be there)
"""The report's page: what it says, that it needs nothing else, and that no evaluation is too odd for it."""

import base64
import io
import re
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

for extra in ("torchmetrics", "matplotlib", "jinja2", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

import matplotlib
import numpy as np
from PIL import Image
from torch.nn.functional import normalize

from ccl_fast.evaluation import (
    Evaluation,
    describe_thresholds,
    difference_intervals,
    metric_intervals,
    pictures,
    resample_metrics,
    threshold,
)
from ccl_fast.evaluation.page import summarize, write_page
from ccl_fast.ood import auroc, fpr95, ood_metrics

DEFAULT = "head/nearest_neighbor"
DETECTORS = (DEFAULT, "head/mahalanobis", "encoder/nearest_neighbor")
TITLES = {"simclr": "SimCLR", "ccl": "CCL"}
HOSTILE = "/data/<script>alert(\"x\")</script> & 'co' $\\frac{a_b$ 日本 @"
COLUMNS = {
    "auroc": "AUROC ↑",
    "aupr_ood": "AUPR ↑ OOD positive",
    "aupr_id": "AUPR ↑ ID positive",
    "fpr95_id": "FPR95 ↓ ID positive",
    "fpr95_ood": "FPR95 ↓ OOD positive",
}
VOID = {"meta", "link", "br", "img", "wbr", "path", "use", "rect", "line", "g"}


class Noise:
    """Images as the page takes them."""

    def __init__(self, n: int, shape: tuple[int, int, int]):
        self.shape = shape
        self.values = torch.rand(n, *shape)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows):
        assert rows.dtype == torch.int64
        return self.values[rows]


def make(
    objectives=("simclr", "ccl"),
    near=("birds", HOSTILE),
    far=("textures",),
    sizes=(60, 40, 25),
    clusters=5,
    shape=(1, 8, 8),
    change_features=lambda x: x,
    change_scores=lambda x: x,
):
    """A report, evaluations and images of random features; sizes are those of train, test and every OOD set."""
    sets = [*near, *far]
    evaluations, results = {}, {}
    for number, objective in enumerate(objectives):
        torch.manual_seed(number)
        centers = normalize(torch.randn(clusters, 6))
        parts = {"train": sizes[0], "test": sizes[1]} | dict.fromkeys(sets, sizes[2])
        ids = {part: torch.randint(clusters, (n,)) for part, n in parts.items()}
        features = {part: change_features(centers[of] + 0.3 * torch.randn(len(of), 6)) for part, of in ids.items()}
        del parts["train"]
        of_detectors = {
            detector: {part: change_scores(torch.rand(n) ** 2 + 0.2 * (part != "test")) for part, n in parts.items()}
            for detector in DETECTORS
        }
        metrics = {}
        for detector, scores in of_detectors.items():
            by_set = {}
            for name in sets:
                is_ood = torch.arange(sizes[1] + sizes[2]) >= sizes[1]
                by_set[name] = ood_metrics(torch.cat([scores["test"], scores[name]]), is_ood)
            for group, names in (("near", near), ("far", far)):
                if names:
                    of_names = [by_set[name] for name in names]
                    by_set[group] = {m: statistics.fmean(x[m] for x in of_names) for m in of_names[0]}
            metrics[detector] = by_set
        results[objective] = metrics
        both = {part: {"head": x, "encoder": 2 * x} for part, x in features.items()}
        resampled = resample_metrics(of_detectors, {"near": near, "far": far}, resamples=40)
        evaluations[objective] = Evaluation(
            metrics, both, of_detectors[DEFAULT], ids["train"], change_features(centers), resampled=resampled
        )
    report = {
        "arguments": {
            "data": HOSTILE,
            "clusters": clusters,
            "output": None,
            "in_classes": [0, 1],
            "augmentation": "auto",
            "warmup_epochs": None,
        },
        "resolved": {"augmentation": "digits", "warmup_epochs": 20},
        "command": "ccl-fast train --in-classes '[0, 1]'",
        "images": {"train": sizes[0], "test": sizes[1], "ood": dict.fromkeys(sets, sizes[2])},
        "near": list(near),
        "far": list(far),
        "default": DEFAULT,
        "titles": {objective: TITLES[objective] for objective in objectives},
        "results": results,
        "bootstrap": {"resamples": 40, "confidence": 0.95},
        "thresholds": {objective: describe_thresholds(of.scores, sets) for objective, of in evaluations.items()},
        "intervals": {objective: metric_intervals(of.resampled) for objective, of in evaluations.items()},
        "losses": {objective: [2.5, 1.5] for objective in objectives},
        "log": {
            objective: [
                {"epoch": 1, "loss": 2.5, "learning_rate": 1e-3},
                {"epoch": 2, "loss": 1.5, "learning_rate": 1e-4, "changed_labels": 0.25, "nmi": 0.5, "accuracy": 0.75},
            ]
            for objective in objectives
        },
        "classes": 2,
        "clustering": {
            objective: {"nmi": 0.625, "accuracy": 0.875, "purity": 0.925, "same_class": 0.75}
            for objective in objectives
        },
        "seconds": 4000.0,
        "environment": {"ccl_fast": "1", "torch": "2", "python": "3", "device": "a <b>", "date": "2026-01-02T03:04:05"},
    }
    if len(objectives) == 2:
        report["differences"] = difference_intervals(*(of.resampled for of in evaluations.values()))
    parts = {"train": sizes[0], "test": sizes[1]} | dict.fromkeys(sets, sizes[2])
    return report, evaluations, {part: Noise(n, shape) for part, n in parts.items()}


class Page(HTMLParser):
    """What a browser would see; an element that is not closed in its turn is an error."""

    def __init__(self, path: Path):
        super().__init__()
        self.bytes = path.read_bytes()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.rows: list[tuple[str, list[str]]] = []  # header, cells of every row of every table, as text
        self.intervals: list[str] = []  # of the cells
        self.best: list[str] = []
        self.headers = ""
        self.captions: list[str] = []
        self._open: list[str] = []
        self._in_best = False
        self.feed(self.bytes.decode())
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID or tag == "g":
            self._open.append(tag)
        if tag == "tr":
            self.rows.append(("", []))
        elif tag == "td":
            self.rows[-1][1].append("")
            self._in_best = "best" in dict(attributes)["class"].split() if "class" in dict(attributes) else False
        elif tag == "caption":
            self.captions.append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag in VOID and tag != "g":
            return
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            return
        self.text += data
        if "td" in self._open and self._open[-1] == "small":
            self.intervals.append(data)
        elif "td" in self._open:
            self.rows[-1][1][-1] += data.strip()
            if self._in_best and data.strip():
                self.best.append(data.strip())
        elif "th" in self._open and "tbody" in self._open:
            self.rows[-1] = (self.rows[-1][0] + data, self.rows[-1][1])
        elif "thead" in self._open:
            self.headers += data + " " * (data != "\xa0")
        elif "caption" in self._open:
            self.captions[-1] += data

    def all(self, *names: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag in names]


def write(folder: Path, *made) -> Page:
    write_page(folder / "report.html", *made)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def made():
    return make()


@pytest.fixture(scope="module")
def page(made, tmp_path_factory):
    return write(tmp_path_factory.mktemp("report"), *made)


def test_needs_nothing_from_outside(page):
    text = page.bytes.decode()
    assert not page.all("script", "iframe", "object", "embed", "base", "form")
    assert [link["rel"] for link in page.all("link")] == ["icon"]
    sources = [tag["src"] for tag in page.all("img")]
    assert sources and all(re.match(r"data:image/(png|jpeg);base64,", source) for source in sources)
    targets = [attributes[name] for _, attributes in page.tags for name in ("href", "xlink:href") if name in attributes]
    assert targets and all(target.startswith(("#", "data:,")) for target in targets)
    assert set(re.findall(r"url\(.", text)) == {"url(#"}
    assert set(re.findall(r"\S*\w+://[^\s>]*", text)) == {'xmlns="http://www.w3.org/2000/svg"'}
    assert "@import" not in text and "srcset" not in text


def test_every_picture_says_what_it_shows(page):
    drawn = [svg for svg in page.all("svg") if "aria-hidden" not in svg]
    assert len(drawn) == 2 + 2 * 4 + 4  # detectors near and far; four pictures an objective; four curves
    assert all(svg["role"] == "img" and len(svg["aria-label"]) > 20 for svg in drawn)
    assert len({svg["aria-label"] for svg in drawn}) == len(drawn)
    assert all(re.search(r"image \d", image["alt"]) for image in page.all("img"))
    assert all("scope" in header for header in page.all("th"))


def test_ids_are_unique_and_every_reference_leads_somewhere(page):
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([\w-]+)", page.bytes.decode())) == set(ids)


def test_colors_are_the_pages(page):
    text = page.bytes.decode()
    style, body = text[: text.index("</style>")], text[text.index("</style>") :]
    named = set(re.findall(r"var\(--([\w-]+)", body))
    for theme in (style[: style.index("@media")], style[style.index("@media") :]):
        assert named <= set(re.findall(r"--([\w-]+):", theme)) | {"of"}
    assert set(re.findall(r"[:,] ?#[0-9a-f]{3,}", re.sub(r"var\([^)]*\)", "", body))) == set()


def test_tables_have_the_reports_numbers(page, made):
    report, evaluations, _ = made
    rows = [(" ".join(header.split()), cells) for header, cells in page.rows if len(cells) == 10]

    def expected(detector, of):
        return [
            f"{report['results'][objective][detector][of][name]:.3f}" for name in COLUMNS for objective in evaluations
        ]

    sets = [*report["near"], *report["far"]]
    wanted = [(d, expected(d, group)) for group in ("near", "far") for d in DETECTORS]
    wanted += [(f"{name} 25 images", expected(DEFAULT, name)) for name in sets]
    wanted += [(d, expected(d, name)) for name in sets for d in DETECTORS]
    assert [(header.removesuffix("default"), cells) for header, cells in rows] == wanted
    assert [header.endswith("default") for header, _ in rows].count(True) == 2 + len(sets)
    exact = [float(data["value"]) for data in page.all("data")]
    assert [f"{value:.3f}" for value in exact] == [cell for _, cells in rows for cell in cells]
    assert exact[0] == report["results"]["simclr"][DEFAULT]["near"]["auroc"]
    above = " ".join(page.headers.split())
    assert above.count(" ".join([*COLUMNS.values(), *["SimCLR CCL"] * 5])) == 2 + len(sets)
    assert page.intervals[0] == "–".join(f"{v:.3f}" for v in report["intervals"]["simclr"][DEFAULT]["near"]["auroc"])
    assert len(page.intervals) == len(exact) + 2 * len(sets) * 3  # and of the thresholds


def test_thresholds_say_what_they_let_through(page, made):
    report, evaluations, _ = made
    rows = [(" ".join(header.split()), cells) for header, cells in page.rows if len(cells) == 3]
    wanted = []
    for objective, evaluation in evaluations.items():
        scores, between = evaluation.scores, report["intervals"][objective][DEFAULT]
        cuts = [scores["test"].sort().values[n - 1] for n in (36, 38, 40)]  # of 40: 90, 95 and 99 %
        wanted.append(("accepts scores up to", [f"{cut:#.3g}" for cut in cuts]))
        for name in report["near"] + report["far"]:
            shares = [f"{100 * (scores[name] <= cut).double().mean():.1f} %" for cut in cuts]
            wanted.append((f"{name} {'far' if name == 'textures' else 'near'}", shares))
            assert between[name]["fpr90_id"][0] <= between[name]["fpr99_id"][1]
    assert rows[: len(wanted)] == [(" ".join(header.split()), cells) for header, cells in wanted]


def test_samples_are_of_every_part_and_views_of_their_images(page, made):
    _, _, images = made
    shown = {image["alt"]: image["src"] for image in page.all("img")}
    titles = {"train": "training images", "test": "test images"}
    for part, of_part in images.items():
        title = titles.get(part, part)
        alts = [alt for alt in shown if alt.startswith(f"sample of {title}, image ")]
        assert len(alts) == min(12, len(of_part))
        rows = [int(alt.rpartition(" ")[2]) for alt in alts]
        assert rows[0] == 0 and rows[-1] == len(of_part) - 1
        assert shown[alts[1]] == pictures.thumbnail(of_part[torch.tensor([rows[1]])][0])
    views = [alt for alt in shown if re.fullmatch(r"training image \d+, view \d", alt)]
    assert len(views) == 6 * 5 and len({shown[alt] for alt in views}) == 30


def test_the_run_can_be_repeated(page):
    text = " ".join(page.text.split())
    assert "ccl-fast train --in-classes '[0, 1]'" in text
    assert "augmentationauto used: digits" in text and "warmup_epochsnull used: 20" in text
    assert text.count("used:") == 2


def test_bold_is_what_the_interval_of_the_difference_bears_out(made, tmp_path):
    report, evaluations, images = made
    rows = [(d, group) for group in ("near", "far") for d in DETECTORS]
    rows += [(DEFAULT, name) for name in report["near"] + report["far"]]
    rows += [(d, name) for name in report["near"] + report["far"] for d in DETECTORS]
    for between in ([-0.1, 0.2], [0.0, 0.0], [0.001, 0.2], [-0.2, -0.001]):
        is_clear = between[0] > 0 or between[1] < 0
        all_between = {
            d: {of: dict.fromkeys(metrics, between) for of, metrics in by_set.items()}
            for d, by_set in report["differences"].items()
        }
        page = write(tmp_path, report | {"differences": all_between}, evaluations, images)
        best = []
        for detector, of in rows if is_clear else ():
            for name in COLUMNS:
                pair = [report["results"][objective][detector][of][name] for objective in evaluations]
                best.append(max(pair) if name.startswith("au") else min(pair))
        assert page.best == [f"{value:.3f}" for value in best]
        assert ("includes 0" in page.text) == ("no clear difference" in page.text) == (not is_clear)


@pytest.mark.parametrize(
    ("objectives", "values", "between", "expected"),
    [
        (
            ("simclr", "ccl"),
            {"near": (0.9004, 0.91), "far": (0.97, 0.96)},
            {"near": [0.00521, 0.02], "far": [-0.0141, 0.001]},
            "With the default detector, CCL reaches an AUROC of 0.910 on near OOD sets, 0.010 above SimCLR’s 0.900 "
            "(+0.0052 to +0.0200); and of 0.960 on far OOD sets, no clear difference from SimCLR’s 0.970 (−0.0141 to "
            "+0.0010).",
        ),
        (
            ("simclr", "ccl"),
            {"far": (0.95, 0.9402)},
            {"far": [-0.02, -0.001]},
            "With the default detector, CCL reaches an AUROC of 0.940 on far OOD sets, 0.010 below SimCLR’s 0.950 "
            "(−0.0200 to −0.0010).",
        ),
        (
            ("ccl",),
            {"near": (0.9,), "far": (0.8,)},
            {"near": [0.88, 0.92], "far": [0.7, 0.9]},
            "With its default detector, CCL reaches an AUROC of 0.900 (0.880–0.920) on near OOD sets and 0.800 "
            "(0.700–0.900) on far OOD sets.",
        ),
    ],
)
def test_summary_says_what_came_out(objectives, values, between, expected):
    by_objective = {
        objective: {DEFAULT: {group: {"auroc": of_group[number]} for group, of_group in values.items()}}
        for number, objective in enumerate(objectives)
    }
    sets = {group: ["some"] * (group in values) for group in ("near", "far")}
    intervals = {DEFAULT: {group: {"auroc": of_group} for group, of_group in between.items()}}
    report = {"titles": TITLES, "results": by_objective, "default": DEFAULT, "differences": intervals} | sets
    assert summarize(report | {"intervals": dict.fromkeys(objectives, intervals)}) == expected


def test_what_users_named_is_text(page, made):
    assert summarize(made[0]) in page.text
    assert page.text.count(HOSTILE) == 2 + 2 + 2 + 2 + 1 + 8 + 1 + 1  # tables, thresholds, legends, ...
    assert "a <b>" in page.text
    labels = [svg["aria-label"] for svg in page.all("svg") if HOSTILE in svg.get("aria-label", "")]
    assert len(labels) == 4  # histograms and ROC curves of both objectives


def test_same_input_same_bytes_whatever_else_is_set(page, made, tmp_path):
    torch.manual_seed(5)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    threads = torch.get_num_threads()
    with matplotlib.rc_context(
        {"font.size": 30, "svg.fonttype": "path", "axes.linewidth": 5, "lines.dashed_pattern": [9, 9]}
    ):
        torch.set_num_threads(3)
        try:
            again = write(tmp_path, *made)
        finally:
            torch.set_num_threads(threads)
        assert matplotlib.rcParams["font.size"] == 30
    assert again.bytes == page.bytes
    assert torch.get_rng_state().equal(state) and (np.random.get_state()[1] == numpy_state).all()


def test_a_page_that_cannot_be_made_leaves_the_old_one(made, tmp_path):
    report, evaluations, images = made
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(KeyError):
        write_page(tmp_path / "report.html", {**report, "results": {"ccl": {}}}, evaluations, images)
    assert (tmp_path / "report.html").read_text() == "old"


def test_shows_the_images_at_the_border_first(page, made):
    _, evaluations, images = made
    alts = [image["alt"] for image in page.all("img")]
    sources = [image["src"] for image in page.all("img")]
    for evaluation in evaluations.values():
        worst = int(evaluation.scores["test"].argmax())
        at = alts.index(f"test, image {worst}, score {evaluation.scores['test'][worst]:#.3g}")
        assert sum(alt.startswith("test,") for alt in alts[at : at + 24]) == 12
        decoded = np.array(Image.open(io.BytesIO(base64.b64decode(sources[at].split(",")[1]))))
        assert np.abs(decoded / 255 - images["test"].values[worst, 0].numpy()).max() <= 0.5 / 255 + 1e-6
        features = {part: normalize(of_part["head"]) for part, of_part in evaluation.features.items()}
        nearest = int((features["train"] @ features["test"][worst]).argmax())
        assert alts[at + 1] == f"training image {nearest}"
        for name in ("birds", HOSTILE, "textures"):
            least = evaluation.scores[name].argsort()[:4].tolist()
            shown = [alt for alt in alts if alt.startswith(f"{name}, image")]
            wanted = [f"{name}, image {row}, score {evaluation.scores[name][row]:#.3g}" for row in least]
            assert any(shown[i : i + 4] == wanted for i in (0, 4))


ODD = {
    "both objectives, no set": {"objectives": ("simclr", "ccl"), "near": [], "far": []},
    "no near": {"near": []},
    "no far": {"far": []},
    "tiny": {"sizes": (3, 2, 1), "clusters": 1},
    "one training image": {"sizes": (1, 1, 1), "clusters": 1},
    "equal scores": {"change_scores": lambda x: torch.full_like(x, 0.25)},
    "scores of zero": {"change_scores": torch.zeros_like},
    "negative scores": {"change_scores": lambda x: -5 - x},
    "some zeros": {"change_scores": lambda x: (x - 0.2).clamp(min=0) ** 4},
    "mostly zeros": {"change_scores": lambda x: (x - 1).clamp(min=0)},
    "huge scores": {"change_scores": lambda x: 1e6 + x},
    "a hundred clusters": {"clusters": 100, "sizes": (300, 40, 5)},
    "more clusters than the map has images": {"clusters": 1300, "sizes": (2600, 40, 5)},
    "twelve sets": {"near": [f"n{i}" for i in range(6)], "far": [f"f{i}" for i in range(6)], "sizes": (60, 40, 5)},
    "long names": {"near": ["x" * 300], "far": ["/very/long" * 30]},
    "other scripts": {"near": ["звук", "צליל", "音 🎵"], "far": ["not \udcff Unicode", "$", "tab\tline\n"]},
    "constant features": {"change_features": torch.ones_like},
    "no features": {"change_features": torch.zeros_like},
    "duplicates": {"change_features": lambda x: x.sign()},
    "one feature": {"change_features": lambda x: x[:, :1]},
    "photographs": {"shape": (3, 100, 150), "sizes": (200, 40, 25)},
}


ALIKE = {  # others in ODD are odd in nearly the same way
    *("no far", "scores of zero", "negative scores", "mostly zeros", "huge scores"),
    *(
        "a hundred clusters",
        "more clusters than the map has images",
        "long names",
        "constant features",
        "duplicates",
        "one feature",
    ),
}


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if c in ALIKE else c for c in ODD])
def test_odd_judgements(case, tmp_path):
    report, evaluations, images = make(**{"objectives": ("ccl",), "sizes": (40, 20, 6)} | ODD[case])
    del report["log"], report["losses"]
    for evaluation in evaluations.values():
        evaluation.cluster_ids[evaluation.cluster_ids == 2] = 0
    page = write(tmp_path, report, evaluations, images)
    assert len(page.bytes) < 3e6
    assert not re.search(r"\b(nan|inf|None)\b", page.text)
    drawn = " ".join(f"{tag.get('d')} {tag.get('x')} {tag.get('y')}" for tag in page.all("path", "text", "use", "rect"))
    assert "M" in drawn and "nan" not in drawn and "inf" not in drawn
    sets = report["near"] + report["far"]
    labels = [svg["aria-label"] for svg in page.all("svg") if "aria-label" in svg]
    assert sum("ROC curves" in label for label in labels) == (len(evaluations) if sets else 0)
    assert sum("map of" in label for label in labels) == len(evaluations)
    for evaluation in evaluations.values():
        empty = len(evaluation.centers) - len(evaluation.cluster_ids.unique())
        assert (f"{empty} of them empty" in page.text) == (empty > 0)
    for name in sets:
        assert page.text.count(name.encode(errors="replace").decode()) >= 4


def test_centers_keep_their_numbers_where_the_map_shows_no_image_of_theirs():
    ids = torch.cat([torch.arange(600), torch.arange(300, 600), torch.full((600,), 7)])
    centers = torch.randn(700, 3)
    points = pictures.sample(torch.randn(1500, 3), ids, centers, [], [])
    assert set(points.numbers.tolist()) - set(points.ids.tolist())
    assert points.centers.equal(centers[points.numbers])
    assert len(points.numbers) == pictures.MAX_DRAWN
    assert {7, *range(300, 600)} <= set(points.numbers.tolist())  # the largest


PICTURES = {
    "ScoreAxis.of": "histograms",
    "histograms": "histograms",
    "roc_curves": "ROC curves",
    "detectors": "the detectors on near OOD",
    "cluster_colors": "CCL's map of clusters",
    "sample": "map of clusters",
    "plane": "map of clusters",
    "cluster_map": "map of clusters",
    "cluster_sizes": "sizes of clusters",
    "curves": "the curve of loss",
    "thumbnail": "images of clusters",
}


# Common to several pictures, of features, of the log, of images: the guard is the same for all.
BROKEN_FIRST = {"cluster_map", "curves", "thumbnail"}


@pytest.mark.parametrize(
    "broken", [pytest.param(x, marks=() if x in BROKEN_FIRST else pytest.mark.slow) for x in PICTURES]
)
def test_a_picture_that_cannot_be_drawn_costs_this_picture(broken, made, page, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise ValueError("zip() argument 2 is <longer> than argument 1\nand more")

    monkeypatch.setattr(f"ccl_fast.evaluation.pictures.{broken}", fail)
    ours = write(tmp_path, *made)
    lost = ours.text.count("Could not be drawn (ValueError: zip() argument 2 is <longer> than argument 1).")
    drawn, all_drawn = (
        sum("aria-label" in svg for svg in p.all("svg")) + (len(p.all("img")) > 0) for p in (ours, page)
    )
    assert 1 <= lost <= 8 and all_drawn - 4 <= drawn < all_drawn
    assert ours.rows == page.rows
    error = capsys.readouterr().err
    assert error.count("\n") == lost
    assert "report: could not draw " in error and PICTURES[broken] in error


def test_parts_that_are_not_there_are_left_out(tmp_path):
    report, evaluations, images = make(objectives=("ccl",), sizes=(40, 20, 6))
    del report["log"], report["clustering"]
    page = write(tmp_path, report, evaluations, images)
    assert "Training" in page.text and "Loss" in page.text and "NMI" not in page.text
    del report["losses"]
    page = write(tmp_path, report, evaluations, images)
    assert "Loss" not in page.text and "#training" not in page.bytes.decode()


@pytest.mark.parametrize(("classes", "limit"), [(2, 28 / 40), (5, None), (9, None)])
def test_accuracy_of_clusters_says_what_their_number_makes_of_it(classes, limit, tmp_path):
    report, evaluations, images = make(objectives=("ccl",), sizes=(40, 20, 6))
    evaluations["ccl"].cluster_ids[:] = torch.tensor([3] * 18 + [1] * 10 + [0] * 5 + [2] * 4 + [4] * 3)
    text = " ".join(write(tmp_path, report | {"classes": classes}, evaluations, images).text.split())
    assert "accuracy 0.925 many-to-one (each cluster stands for its most frequent class" in text
    assert "0.875 one-to-one (each class has one cluster at most" in text
    assert ("cannot bring above" in text) == (limit is not None)
    assert limit is None or f"cannot bring above {limit:.3f}, as 3 clusters must stand for no class" in text


def test_whatever_is_in_the_log_has_a_curve(tmp_path):
    report, evaluations, images = make(objectives=("ccl",), sizes=(40, 20, 6))
    for epoch, line in enumerate(report["log"]["ccl"]):
        line |= {"stage": "ccl", "objective": "ccl", "step": 9, "head_knn": 0.25 + epoch, "some_new_share": 0.5}
        line |= {"same_class/7": 0.75, "same_class/9": 0.5}
    page = write(tmp_path, report, evaluations, images)
    labels = [svg["aria-label"] for svg in page.all("svg") if " by epoch: " in svg.get("aria-label", "")]
    assert [label.split(" by epoch")[0] for label in labels] == [
        "Loss",
        "k-NN accuracy of the head’s features",
        "Share of images that changed cluster",
        "NMI of clusters and classes",
        "Accuracy of clusters as classes, one-to-one",
        "Share of cluster-mates of the same class, K = 7",
        "Share of cluster-mates of the same class, K = 9",
        "Some new share",
    ]
    assert labels[1].endswith(": CCL from 0.25 to 1.25.")


def test_the_accuracy_of_neighbors_is_beside_the_auroc(tmp_path):
    report, evaluations, images = make(sizes=(40, 20, 6))
    assert "Classes" not in write(tmp_path, report, evaluations, images).text
    report["knn"] = {"simclr": {"encoder": 0.5931, "head": 0.6152}, "ccl": {"encoder": 0.7, "head": 0.8}}
    report["linear"] = {"simclr": 0.25, "ccl": 0.5}
    text = " ".join(write(tmp_path, report, evaluations, images).text.split())
    of_simclr = "SimCLR 59.3 % encoder 61.5 % head 25.0 % encoder, linear"
    assert f"{of_simclr} CCL 70.0 % encoder 80.0 % head 50.0 % encoder, linear" in text


def test_curves_of_clusters_have_the_baseline_beside_them(tmp_path):
    report, evaluations, images = make(sizes=(40, 20, 6))
    own = {"smallest_cluster": 3, "nmi": 0.5, "purity/5": 0.5, "purity/7": 0.75, "changed_labels": 0.125}
    report["log"] = {"simclr": [{"epoch": 1, "loss": 2.5}], "ccl": [{"epoch": 1, "loss": 1.5} | own]}
    page = write(tmp_path, report, evaluations, images)
    labels = [svg["aria-label"] for svg in page.all("svg") if " by epoch: " in svg.get("aria-label", "")]
    smallest = [int(of.cluster_ids.bincount(minlength=5).min()) for of in evaluations.values()]
    of_report = "with the report’s own clusters"
    assert set(labels) == {
        "Loss by epoch: SimCLR from 2.5 to 2.5; CCL from 1.5 to 1.5.",
        f"Images in the smallest cluster by epoch: SimCLR {smallest[0]} {of_report}; "
        f"CCL from 3 to 3, {smallest[1]} {of_report}.",
        f"NMI of clusters and classes by epoch: SimCLR 0.625 {of_report}; CCL from 0.5 to 0.5, 0.625 {of_report}.",
        "Accuracy of clusters as classes, many-to-one, K = 5 by epoch: "
        f"SimCLR 0.925 {of_report}; CCL from 0.5 to 0.5, 0.925 {of_report}.",
        "Accuracy of clusters as classes, many-to-one, K = 7 by epoch: CCL from 0.75 to 0.75.",
        "Share of images that changed cluster by epoch: CCL from 0.125 to 0.125.",
    }


def ticks_of(svg: str) -> list[str]:
    """The labels of both axes."""
    return re.findall(r"<text[^>]*>([−0-9.]+)</text>", svg)


def test_axes_of_counts_are_of_whole_numbers():
    for values in ((3, 4), (397, 396, 405), (7,)):
        epochs = range(1, len(values) + 1)
        svg = pictures.curves([pictures.Curve("objective", epochs, values)], "counts", last=len(values))
        labels = ticks_of(svg)
        assert labels and all(re.fullmatch(r"\d+", label) for label in labels)
    shares = pictures.curves([pictures.Curve("objective", (1, 2), (0.7900, 0.7901))], "shares", last=2)
    assert max(map(len, ticks_of(shares))) <= 5  # what hardly changes is not blown up
    assert all(label in ("1", "2") or "." in label for label in ticks_of(shares))


@pytest.mark.parametrize("objectives", [("simclr", "ccl"), ("ccl",), ("simclr",)])
def test_the_loss_of_the_warm_up_is_in_the_line_of_the_baseline_alone(objectives, tmp_path):
    report, evaluations, images = make(objectives=objectives, sizes=(40, 20, 6))
    warm_up = [{"stage": "warm-up", "objective": "simclr", "epoch": epoch, "loss": 6 - epoch} for epoch in (1, 2)]
    for objective, scale in (("simclr", 1), ("ccl", -0.125)):
        own = [{"stage": objective, "objective": objective, "epoch": e, "loss": scale * (6 - e)} for e in (3, 4)]
        report["log"] |= {objective: warm_up + own} if objective in objectives else {}
    page = write(tmp_path, report, evaluations, images)
    label = next(svg["aria-label"] for svg in page.all("svg") if svg.get("aria-label", "").startswith("Loss"))
    said = {"simclr": "SimCLR from 5 to 2", "ccl": "CCL from -0.375 to -0.25"}
    assert label == f"Loss by epoch: {'; '.join(said[objective] for objective in objectives)}."
    assert ("A warm-up is SimCLR’s" in page.text) == (len(objectives) > 1)


@pytest.mark.parametrize("n", [1, 2, 19, 20, 21, 40, 600])
def test_threshold_and_curve_are_those_of_the_metrics(n):
    for digits in (1, 3, None):  # with and without ties
        test, ood = torch.rand(n), torch.rand(33) + 0.3
        if digits:
            test, ood = test.round(decimals=digits), ood.round(decimals=digits)
        scores, is_ood = torch.cat([test, ood]), torch.arange(n + 33) >= n
        accepted = (ood <= threshold(test)).double().mean().item()
        assert accepted == pytest.approx(fpr95(scores, is_ood, positive="id"), abs=1e-6)
        x, y = pictures.roc(test, ood)
        assert x[0] == y[0] == 0 and x[-1] == y[-1] == 1
        assert np.trapezoid(y, x) == pytest.approx(auroc(scores, is_ood), abs=1e-6)


@pytest.mark.parametrize(
    ("test", "ood", "is_linear"),
    [
        ([0.001, 0.002, 0.003, 0.004], [0.003, 0.5], False),  # cosine distances
        ([-0.5, 0.0, 0.2, 1.1], [0.5, 30.0, 800.0], False),  # standardised scores
        ([-300.0, -299.0, -298.5], [-299.0, -2.0], False),
        ([0.4, 0.5, 0.6], [0.5, 0.9], True),
        ([-0.1, 0.001, 0.002, 0.5], [0.3], True),
        ([0.0] * 4, [0.0], True),
        ([0.0] * 4, [0.0, 7.0], True),
        ([-7.0] * 3, [-7.0], True),
        ([1e6, 1e6 + 1], [1e6 + 2], True),
    ],
)
def test_score_axis(test, ood, is_linear):
    test, ood = (torch.tensor(x, dtype=torch.float64) for x in (test, ood))
    axis = pictures.ScoreAxis.of([{"test": test[:1], "birds": ood}, {"test": test[1:], "birds": ood}])
    assert (axis.spread is None) == is_linear
    at = axis.place(torch.cat([test, ood]).sort().values)
    assert (at >= 0).all() and (at <= 1).all() and (np.diff(at) >= 0).all()
    if not is_linear:  # the test images have room
        at = axis.place(test)
        assert at.max() - at.min() > 0.1
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 12 and all(axis.low <= tick <= axis.high for tick in ticks)
    assert (np.diff(axis.place(np.array(ticks))) > 0.09).all()


def test_every_set_looks_different():
    looks = [pictures.look(number, number < 6) for number in range(12)]
    assert len(set(looks)) == 12


def test_neighboring_clusters_differ_in_color():
    place = torch.arange(40) % 8 * 5 + torch.arange(40) // 8  # on a ring: 0 and 8 are neighbours, as are 8 and 16
    angles = place * 2 * torch.pi / 40
    colors = pictures.cluster_colors(torch.stack([angles.cos(), angles.sin()], 1))
    around = [colors[i] for i in place.argsort()]
    assert len(set(colors)) == 24
    assert all(color != after for color, after in zip(around, around[1:] + around[:1], strict=True))


@pytest.mark.parametrize("k", [8, 12, 24])
def test_as_many_clusters_as_there_are_colors_share_none(k):
    colors = pictures.cluster_colors(torch.randn(k, 5))
    assert len(set(colors)) == k and set(colors) == set(pictures.HUES[:k])


def test_marks_of_sets_differ():
    marks = [tuple(pictures.mark(number, near)) for near in (True, False) for number in range(10)]
    assert len(set(marks)) == 20


def test_map_keeps_what_is_alike_together():
    ids = torch.arange(120) % 4
    x = torch.eye(8)[ids] + 0.1 * torch.randn(120, 8)
    at = torch.tensor(pictures.plane(x))
    assert at.equal(torch.tensor(pictures.plane(x * 2.0 ** torch.randint(-3, 3, (120, 1)))))  # lengths do not count
    nearest = torch.cdist(at, at).fill_diagonal_(torch.inf).argmin(1)
    assert (ids[nearest] == ids).double().mean() > 0.98


def test_sample_is_bounded_and_of_every_set():
    train, ids, centers = torch.randn(1500, 3), torch.arange(1500) % 7, torch.randn(9, 3)
    near, far = [torch.zeros(500, 3), torch.ones(500, 3)], []
    points = pictures.sample(train, ids, centers, near, far)
    assert len(points.train) == len(points.ids) == 1000 and points.far == []
    assert [len(of_set) for of_set in points.near] == [60, 60] and bool((points.near[1] == 1).all())
    assert points.centers.equal(centers[:7])  # the two that have no image are left out
    assert points.numbers.equal(torch.arange(7))
    again = pictures.sample(train, ids, centers, near, far)
    assert again.train.equal(points.train)
    assert all(
        bool((train[ids == i] == row).all(1).any()) for row, i in zip(points.train[:5], points.ids, strict=False)
    )
