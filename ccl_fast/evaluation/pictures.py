"""The pictures of the report, one function each: SVG that takes its colours from the page, and thumbnails.

A colour is drawn as ``var(--name, <light colour>)``, and the page, with ``css_colors``, says what the name is in the
light and in the dark. What users named never passes through matplotlib, which reads "$" as mathematics and warns of
glyphs that its font has not: the text is put into the finished SVG.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ccl_fast.evaluation.thresholds import threshold

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# name: (on a light page, on a dark one). Any two of c0 to c7 differ to the colour-blind too, and all from the page;
# c8 to c23 are as far from these and from each other as colours of middling chroma can be.
COLORS = {
    "ink": ("#1b2530", "#e8edf2"),
    "soft": ("#5a6673", "#9ba8b5"),
    "rule": ("#e1e6eb", "#2c353f"),
    "paper": ("#ffffff", "#151b22"),
    "quiet": ("#b4bec8", "#56626f"),
    "baseline": ("#7d8894", "#8d99a6"),
    "objective": ("#0b6bb8", "#58b0f5"),
    "c0": ("#18289e", "#356fee"),
    "c1": ("#a31901", "#d54142"),
    "c2": ("#1fa59e", "#2db888"),
    "c3": ("#d57e1b", "#cf810d"),
    "c4": ("#7b6eff", "#c7c3ff"),
    "c5": ("#78428c", "#9865b3"),
    "c6": ("#68083b", "#aef6e1"),
    "c7": ("#93915e", "#f8d833"),
    "c8": ("#ff78c3", "#1e7800"),
    "c9": ("#004b00", "#ff78b4"),
    "c10": ("#96a5f0", "#007887"),
    "c11": ("#1e6969", "#4ba5e1"),
    "c12": ("#c34b78", "#e1b496"),
    "c13": ("#008700", "#d287ff"),
    "c14": ("#5ac34b", "#69f087"),
    "c15": ("#003c5a", "#96b400"),
    "c16": ("#0069b4", "#b42d78"),
    "c17": ("#b45ac3", "#78875a"),
    "c18": ("#695a1e", "#1ed2e1"),
    "c19": ("#ff7878", "#965a00"),
    "c20": ("#b487a5", "#b47887"),
    "c21": ("#0096d2", "#ffa52d"),
    "c22": ("#5a0f78", "#ff7869"),
    "c23": ("#5a2d0f", "#ffe1a5"),
}
HUES = [name for name in COLORS if re.fullmatch(r"c\d+", name)]  # of clusters, which have numbers too
SET_HUES = HUES[:8]
LIGHT = {name: light for name, (light, _) in COLORS.items()}
_NAMES = {light: name for name, light in LIGHT.items()}

WIDTH = 420  # of a picture, in pixels; shown as wide as there is room: on a phone its letters are of 11 pixels
MAX_LABELLED = 30  # clusters
MAX_DRAWN = 500  # clusters, each with a colour, a bar and a ring of its own
ACCEPTED = 95  # percent of the test images that the threshold accepts
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ccl_fast",
    "font.size": 13,
    "figure.facecolor": "none",
    "figure.dpi": 72,
    "axes.facecolor": "none",
    "axes.edgecolor": LIGHT["quiet"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["rule"],
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["quiet"],
    "ytick.color": LIGHT["quiet"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
}
_UNDRAWN = "@"  # stands for a text while matplotlib draws; its own texts have none


class Picture(Markup):
    """A picture as an element of a page, and, for programs that take no such thing, as pixels."""

    figure: Figure
    texts: Sequence[str]

    @classmethod
    def of(cls, svg: str, figure: Figure, texts: Sequence[str]) -> Picture:
        """Make it of what a page shows, of the figure that it was drawn as, and of that one's undrawn texts."""
        picture = cls(svg)
        picture.figure, picture.texts = figure, texts
        return picture

    def pixels(self) -> np.ndarray:
        """Draw it in its light colours on white: uint8 [h, w, 3], two pixels for one of the page's."""
        texts = iter(self.texts)
        for axes in self.figure.axes:
            if any(label.get_text() == _UNDRAWN for label in axes.get_yticklabels()):
                axes.set_yticks(axes.get_yticks(), [next(texts) for _ in axes.get_yticks()], parse_math=False)
            for artist in axes.texts:
                if artist.get_text() == _UNDRAWN:
                    artist.set(text=next(texts), parse_math=False)
        buffer = io.BytesIO()
        with _style(), warnings.catch_warnings(action="ignore"):  # of glyphs that the font has not
            self.figure.savefig(buffer, format="png", dpi=144, facecolor=LIGHT["paper"])
        return np.array(Image.open(buffer).convert("RGB"))


class OodSet(NamedTuple):
    """An OOD set as pictures and their legends show it."""

    name: str
    scores: Tensor
    color: str
    dashes: tuple[int, ...]  # of its line: on, off, ...; () is solid
    note: str  # what the histograms say of it


def look(number: int, is_near: bool) -> tuple[str, tuple[int, ...]]:
    """Choose colour and dashes of a set: near ones solid, far ones dashed; after the last colour they come dotted."""
    dashes = () if is_near else (6, 3)
    return SET_HUES[number % len(SET_HUES)], (*dashes, 1, 2) if number >= len(SET_HUES) else dashes


def css_colors(dark: bool) -> str:
    """Return declarations of the custom properties that the pictures use."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in COLORS.items())


class ScoreAxis(NamedTuple):
    """The scale that the histograms of all objectives share: linear, or logarithmic away from the test images."""

    low: float
    high: float
    center: float
    spread: float | None  # about the centre the scale is linear as far as that; None: all of it is

    @classmethod
    def of(cls, scores: Sequence[Mapping[str, Tensor]]) -> ScoreAxis:
        """Make a scale of scores by objective and part: linear, unless the test images would be a line's breadth."""
        values = torch.cat([of_part for of in scores for of_part in of.values()]).double().numpy()
        quartiles = np.quantile(torch.cat([of["test"] for of in scores]).double().numpy(), (0.25, 0.5, 0.75)).tolist()
        low, high, spread = values.min().item(), values.max().item(), quartiles[2] - quartiles[0]
        if high - low > 20 * spread > 0:
            return cls(low, high, quartiles[1], spread)
        margin = (high - low) / 40 or 0.1 * abs(low) or 0.1
        return cls(low - margin, high + margin, quartiles[1], None)

    def place(self, scores: Tensor | np.ndarray) -> np.ndarray:
        """Return where scores lie, from 0 to 1."""
        values, low, high = (self._scaled(np.asarray(x, dtype=np.float64)) for x in (scores, self.low, self.high))
        return np.clip((values - low) / (high - low), 0, 1)

    def _scaled(self, values: np.ndarray) -> np.ndarray:
        return values if self.spread is None else np.arcsinh((values - self.center) / self.spread)

    def ticks(self) -> list[float]:
        """Return round numbers that do not crowd."""
        ticks = np.asarray(MaxNLocator(6, steps=[1, 2, 5, 10]).tick_values(self.low, self.high)).tolist()
        if self.spread is not None:
            largest = math.floor(math.log10(max(abs(self.low), abs(self.high))))
            decades = range(largest, math.floor(math.log10(self.spread)) - 1, -1)
            ticks = [0.0, *(float(f"{s * step}e{n}") for step in (1, 5, 2) for n in decades for s in (1, -1)), *ticks]
        chosen: list[float] = []
        for tick in ticks:
            places = self.place(np.array([tick, *chosen]))
            if self.low <= tick <= self.high and (np.abs(places[1:] - places[0]) > 0.09).all():
                chosen.append(tick)
        return sorted(chosen)


@contextmanager
def _style() -> Iterator[None]:
    """Set matplotlib's defaults and this file's, whatever the user has set; undone after."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


@_style()
def histograms(test: Tensor, sets: Sequence[OodSet], axis: ScoreAxis, alt: str) -> Picture:
    """Draw scores of every OOD set over those of the test images, one below the other, and the threshold."""
    row, gap, top, bottom, side = 62, 24, 26, 40, 16
    height = top + len(sets) * (row + gap) + bottom
    figure, texts = _figure(height), []
    edges = np.linspace(0, 1, 49)
    ticks = axis.ticks()
    labels = [f"{tick:g}".replace("-", "−") for tick in ticks]
    at = axis.place(np.array([threshold(test), *ticks])).tolist()

    def shares(scores: Tensor) -> np.ndarray:
        return np.histogram(axis.place(scores), edges)[0] / len(scores)

    for number, of_set in enumerate(sets):
        panel = _axes(figure, side, top + number * (row + gap) + gap, WIDTH - 2 * side, row)
        color = LIGHT[of_set.color]
        panel.stairs(shares(test), edges, fill=True, color=LIGHT["quiet"], alpha=0.75, lw=0)
        panel.stairs(shares(of_set.scores), edges, fill=True, color=color, alpha=0.35, lw=0)
        panel.stairs(shares(of_set.scores), edges, color=color, lw=1.2, ls=(0, of_set.dashes or None))
        up = (row + gap) / row if number == 0 else 1  # to its label
        panel.axvline(at[0], color=LIGHT["ink"], lw=1, ymax=up, clip_on=False)
        panel.set(xlim=(0, 1), yticks=[], ylim=(0, None))
        panel.set_xticks(at[1:], labels if number == len(sets) - 1 else [""] * len(ticks))
        panel.spines["left"].set_visible(False)
        panel.grid(False)
        texts += [_shorten(of_set.name), of_set.note]
        panel.text(0, 1.03, _UNDRAWN, color=color, weight="bold", transform=panel.transAxes)
        panel.text(1, 1.03, _UNDRAWN, color=LIGHT["soft"], ha="right", transform=panel.transAxes)
    panel.set_xlabel("outlier score" + ("" if axis.spread is None else ", logarithmic away from the test images"))
    label = f"accepts {ACCEPTED} % of the test images: {threshold(test):.3g}"
    anchor = "left" if at[0] < 0.5 else "right"
    figure.text((side + at[0] * (WIDTH - 2 * side)) / WIDTH, 1 - 12 / height, label, ha=anchor, va="center")
    return _picture(figure, alt, texts)


def roc(test: Tensor, ood: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the ROC curve's corners: shares of test and of OOD images with scores above a threshold, from (0, 0)."""
    from sklearn.metrics import roc_curve

    is_ood = np.arange(len(test) + len(ood)) >= len(test)
    x, y, _ = roc_curve(is_ood, torch.cat([test, ood]).double().numpy())
    return x, y


@_style()
def roc_curves(test: Tensor, sets: Sequence[OodSet], alt: str) -> Picture:
    """Draw how many OOD images are rejected at the price of how many test images; below with a logarithmic price."""
    figure, size = _figure(570), WIDTH - 68
    panel, logarithmic = _axes(figure, 56, 10, size, 270), _axes(figure, 56, 334, size, 186)
    panel.plot([0, 1], [0, 1], color=LIGHT["quiet"], lw=1)
    least = 0.5 / len(test)  # stands for none
    diagonal = np.geomspace(least, 1, 60)
    logarithmic.plot(diagonal, diagonal, color=LIGHT["quiet"], lw=1)
    for of_set in sets:
        x, y = roc(test, of_set.scores)
        for axes, at in ((panel, x), (logarithmic, np.clip(x, least, 1))):
            (line,) = axes.plot(at, y, color=LIGHT[of_set.color], lw=1.7, clip_on=False)
            if of_set.dashes:
                line.set_dashes([part / 1.7 for part in of_set.dashes])
    logarithmic.set_xscale("log")
    logarithmic.minorticks_off()
    decades = [10.0**n for n in range(math.ceil(math.log10(2 * least)), 1)]
    logarithmic.set_xticks(decades, [f"{decade:g}" for decade in decades])
    for axes, low in ((panel, 0), (logarithmic, least)):
        axes.axvline(1 - ACCEPTED / 100, color=LIGHT["ink"], lw=1, ls=(0, (1, 2)))
        axes.set(xlim=(low, 1), ylim=(0, 1), ylabel="share of OOD images rejected")
    panel.set_xlabel("share of test images rejected")
    logarithmic.set_xlabel("share of test images rejected, logarithmic")
    return _picture(figure, alt)


@_style()
def detectors(
    values: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Sequence[float]]],
    default: str,
    alt: str,
) -> Picture:
    """Draw a dot an objective, and its interval, on a row a detector: ``values[its colour][detector]`` is an AUROC."""
    names = list(next(iter(values.values())))
    row, top, left = 15 + 11 * len(values), 6, 186
    figure = _figure(top + row * len(names) + 40)
    panel = _axes(figure, left, top, WIDTH - left - 14, row * len(names))
    rows, low = np.arange(len(names)), 1.0
    for number, (color, by_name) in enumerate(values.items()):
        at = rows + (number - (len(values) - 1) / 2) * 11 / row
        ends = np.array([intervals[color][name] for name in names])
        low = min(low, *by_name.values(), ends.min())
        panel.hlines(at, ends[:, 0], ends[:, 1], color=LIGHT[color], lw=2, clip_on=False)
        marker = "s" if color == "objective" else "o"  # colour alone tells nothing to some
        panel.plot(list(by_name.values()), at, marker, color=LIGHT[color], ms=6.5, mew=0, ls="", clip_on=False)
    panel.set(xlim=(max(0, math.floor(low * 20 - 0.2) / 20), 1), ylim=(len(names) - 0.5, -0.5), xlabel="AUROC")
    panel.set_yticks(rows, [_UNDRAWN] * len(names), color=LIGHT["ink"])
    panel.get_yticklabels()[names.index(default)].set_fontweight("bold")
    panel.tick_params(length=0)
    panel.grid(axis="y", visible=False)
    panel.spines["left"].set_visible(False)
    return _picture(figure, alt, [_shorten(name.replace("_", " ").replace("/", " · "), 27) for name in names])


def cluster_colors(centers: Tensor) -> list[str]:
    """Choose a colour for every cluster, another than those of the clusters next to it if few enough are drawn."""
    if len(centers) > MAX_DRAWN:
        return [HUES[number % len(HUES)] for number in range(len(centers))]
    cosines = normalize(centers.double()) @ normalize(centers.double()).T
    chosen: list[int] = []
    for number, row in enumerate(cosines):
        nearest = row[:number].argsort(descending=True, stable=True)[: len(HUES) - 1]
        taken = {chosen[i] for i in nearest.tolist()}
        free = [hue for hue in range(len(HUES)) if hue not in taken]
        chosen.append(min(free, key=chosen.count))
    return [HUES[hue] for hue in chosen]


@_style()
def cluster_sizes(sizes: Tensor, colors: Sequence[str], alt: str) -> Picture:
    """Draw the sizes of clusters, the largest first, in the colours of the map if there are few enough."""
    figure = _figure(210)
    panel = _axes(figure, 56, 10, WIDTH - 66, 152)
    order: list[int] = sizes.argsort(descending=True, stable=True).tolist()
    hues = [LIGHT[colors[number]] for number in order]
    if len(order) <= MAX_DRAWN:
        panel.bar(range(len(order)), sizes[order].tolist(), 0.8, color=hues, alpha=0.85)
    else:
        panel.stairs(sizes[order].tolist(), [i - 0.5 for i in range(len(order) + 1)], fill=True, color=LIGHT["quiet"])
    even = sizes.double().mean().item()
    panel.axhline(even, color=LIGHT["ink"], lw=1, ls=(0, (4, 3)))
    panel.text(0.995, even, "even", transform=panel.get_yaxis_transform(), ha="right", va="bottom", size=11)
    labelled = order if len(order) <= MAX_LABELLED else []
    panel.set_xticks(range(len(labelled)), [str(number) for number in labelled])
    panel.set(xlim=(-0.6, len(order) - 0.4), xlabel="cluster, the largest first", ylabel="training images")
    panel.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panel.tick_params(axis="x", length=0)
    panel.grid(axis="x", visible=False)
    return _picture(figure, alt)


# Strokes of a set's images in the map, each from a point to the next: outlines of near sets, crosses of far ones.
_NEAR_MARKS = (
    [(0, -4), (4, 0), (4, 0), (0, 4), (0, 4), (-4, 0), (-4, 0), (0, -4)],
    [(-3, -3), (3, -3), (3, -3), (3, 3), (3, 3), (-3, 3), (-3, 3), (-3, -3)],
    [(-3.5, -3), (3.5, -3), (3.5, -3), (0, 3.5), (0, 3.5), (-3.5, -3)],
    [(-3.5, 3), (3.5, 3), (3.5, 3), (0, -3.5), (0, -3.5), (-3.5, 3)],
)
_FAR_MARKS = (
    [(-3.5, 0), (3.5, 0), (0, -3.5), (0, 3.5)],
    [(-2.8, -2.8), (2.8, 2.8), (-2.8, 2.8), (2.8, -2.8)],
    [(0, 0), (0, -3.5), (0, 0), (-3, 2.5), (0, 0), (3, 2.5)],
    [(-3.2, -1.8), (3.2, 1.8), (-3.2, 1.8), (3.2, -1.8), (0, -3.6), (0, 3.6)],
    [(-3.5, 0), (3.5, 0)],
    [(0, -3.5), (0, 3.5)],
)


def mark(number: int, is_near: bool) -> list[tuple[float, float]]:
    """Choose the mark of the number-th near or far set: ends of its strokes, in pixels; the next round is larger."""
    marks = _NEAR_MARKS if is_near else _FAR_MARKS
    size = 1 + 0.5 * (number // len(marks))
    return [(size * x, size * y) for x, y in marks[number % len(marks)]]


@dataclass
class Points:
    """Features to be laid out in the plane: training images with their clusters, and centres with their numbers."""

    train: Tensor
    ids: Tensor
    centers: Tensor
    numbers: Tensor
    near: list[Tensor]  # of each set
    far: list[Tensor]


def sample(
    train: Tensor, ids: Tensor, centers: Tensor, near: Sequence[Tensor], far: Sequence[Tensor], seed: int = 0
) -> Points:
    """Take 1,000 training images, 120 images of near and 120 of far sets, so that t-SNE takes seconds.

    And the centres that have images, of more than ``MAX_DRAWN`` those that have most.
    """
    generator = torch.Generator().manual_seed(seed)

    def some(x: Tensor, n: int) -> Tensor:
        return torch.randperm(len(x), generator=generator, device="cpu")[:n].sort().values

    def of_sets(sets: Sequence[Tensor]) -> list[Tensor]:
        return [x[some(x, -(-120 // len(sets)))] for x in sets]

    rows = some(train, 1000)
    sizes = ids.bincount(minlength=len(centers))
    largest = sizes.argsort(descending=True, stable=True)[: min(MAX_DRAWN, int((sizes > 0).sum()))]
    numbers = largest.sort().values
    return Points(train[rows], ids[rows], centers[numbers], numbers, of_sets(near), of_sets(far))


def plane(x: Tensor) -> np.ndarray:
    """Lay rows of features out in a plane, [n, 2]: t-SNE of their cosine distances, from two principal components.

    Half the squared distance of unit vectors is the cosine distance, and the perplexity settles the scale.
    """
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    x = normalize(x.double())
    _, _, axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    start = (x @ axes[:2].T).numpy()
    start = np.pad(start, ((0, 0), (0, 2 - start.shape[1])))
    start = (start / (start.std(0).max() or 1)).astype(np.float32)
    if len(x) < 4:
        return start
    tsne = TSNE(
        perplexity=min(30, (len(x) - 1) / 3),
        init=1e-4 * start,  # pyright: ignore[reportArgumentType] - inferred from the default, which is a name
        max_iter=500,
        random_state=0,
    )
    with threadpool_limits(1):  # sums of several threads come in any order
        return tsne.fit_transform(x.float().numpy())


@_style()
def cluster_map(points: Points, colors: Sequence[str], alt: str) -> Picture:
    """Draw training images in the colours of their clusters, centres with their numbers, OOD images as their marks."""
    parts = [points.train, points.centers, *points.near, *points.far]
    at = plane(torch.cat(parts))
    low, high = at.min(0), at.max(0)
    height, margin = 390, 14
    scale = min((side - 2 * margin) / (span or 1) for side, span in zip((WIDTH, height), high - low, strict=True))
    at = (at - (low + high) / 2) * scale + (WIDTH / 2, height / 2)
    train, centers, *sets = np.split(at, np.cumsum([len(part) for part in parts])[:-1])
    figure = _figure(height)
    panel = _axes(figure, 0, 0, WIDTH, height)
    panel.set(xlim=(0, WIDTH), ylim=(0, height))
    panel.set_axis_off()
    of_train = np.array([colors[number] for number in points.ids.tolist()])
    for color in dict.fromkeys(colors):
        _draw(panel, train[of_train == color], [(0, 0), (0.01, 0)], LIGHT[color], 4.2, 0.55)
    marks = [mark(number, near) for near, of in ((True, points.near), (False, points.far)) for number in range(len(of))]
    for strokes, of_set in zip(marks, sets, strict=True):
        _draw(panel, of_set, strokes, LIGHT["ink"], 1.1, 0.9)
    numbers: list[int] = points.numbers.tolist()
    is_few = len(numbers) <= MAX_LABELLED
    for number, (x, y) in zip(numbers, centers.tolist(), strict=True):
        panel.plot(x, y, "o", color=LIGHT["paper"], mec=LIGHT[colors[number]], mew=1.8, ms=17 if is_few else 6)
        if is_few:
            panel.text(x, y, str(number), size=10, weight="bold", ha="center", va="center_baseline")
    return _picture(figure, alt)


def _draw(
    panel: Axes, at: np.ndarray, shape: list[tuple[float, float]], color: str, width: float, alpha: float
) -> None:
    """Draw the same strokes, given by their two ends, at many points: one path, small in the file."""
    if len(at):
        ends = (at[:, None] + np.array(shape)).reshape(-1, 2)
        outline = Outline(ends, [Outline.MOVETO, Outline.LINETO] * (len(ends) // 2))
        panel.add_patch(PathPatch(outline, fill=False, color=color, lw=width, alpha=alpha, capstyle="round"))


class Curve(NamedTuple):
    """A number of one objective by epoch."""

    color: str
    epochs: Sequence[float]
    values: Sequence[float]
    at_end: float | None = None  # the same of the report's own clusters


DASHES = {"baseline": (5, 3), "objective": ()}  # of a curve by its colour, which tells nothing to some


@_style()
def curves(lines: Sequence[Curve], alt: str, *, last: int, warm_up: int = 0, apart: bool = False) -> Picture:
    """Draw the lines of one number, by epoch up to the last one.

    Args:
        lines: one or two.
        alt: what the picture shows.
        last: epoch at which the axis ends.
        warm_up: epochs of the warm-up, whose end is marked.
        apart: each line has an axis of its own, as they cannot be compared in height.
    """
    panels = [[line] for line in lines] if apart else [lines]
    height, gap = (178, 0) if len(panels) == 1 else (110, 16)
    figure = _figure(len(panels) * (height + gap) - gap + 52)
    for number, of_panel in enumerate(panels):
        panel = _axes(figure, 56, 10 + number * (height + gap), WIDTH - 70, height)
        shown = [value for line in of_panel for value in (*line.values, line.at_end) if value is not None]
        for color, epochs, values, at_end in of_panel:
            marker = "os"[color == "objective"] if len(epochs) <= 12 else ""
            (line,) = panel.plot(epochs, values, color=LIGHT[color], lw=1.8, marker=marker, ms=4.5, mew=0)
            if DASHES[color]:
                line.set_dashes([part / 1.8 for part in DASHES[color]])
            if at_end is not None:
                panel.plot(last, at_end, "D", ms=7.5, color=LIGHT["paper"], mec=LIGHT[color], mew=1.8, clip_on=False)
        if 0 < warm_up < last:
            panel.axvline(warm_up + 0.5, color=LIGHT["quiet"], lw=1)
        low, high = min(shown), max(shown)
        missing = (0.04 * max(abs(low), abs(high)) or 0.1) - (high - low)  # what hardly changes is not blown up
        are_counts = all(isinstance(value, int) for value in shown)
        margin = max(0.06 * (high - low) + max(0, missing) / 2, 1.0 if are_counts else 0)
        panel.set(xlim=(0.5, last + 0.5), ylim=(low - margin, high + margin))
        panel.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        panel.yaxis.set_major_locator(MaxNLocator(5, integer=are_counts, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10]))
        if number < len(panels) - 1:
            panel.tick_params(labelbottom=False)
    panel.set_xlabel("epoch")
    return _picture(figure, alt)


def thumbnail(image: Tensor) -> str:
    """Return an image [1 or 3, h, w] in [0, 1] as a data URI: as it is up to 32 pixels, or else in 64, as JPEG."""
    pixels = (image.clamp(0, 1) * 255).round().byte().cpu().numpy()
    picture = Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    buffer = io.BytesIO()
    if max(picture.size) > 32:
        picture.thumbnail((64, 64))
        picture.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        picture.save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _figure(height: int) -> Figure:
    return Figure(figsize=(WIDTH / 72, height / 72))


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place given in points from the upper left corner."""
    total = figure.get_figheight() * 72
    return figure.add_axes((left / WIDTH, 1 - (top + height) / total, width / WIDTH, height / total))


def _shorten(text: str, longest: int = 36) -> str:
    """Leave out the beginning, for the end of a path says more."""
    return text if len(text) <= longest else "…" + text[1 - longest :]


def _picture(figure: Figure, alt: str, texts: Sequence[str] = ()) -> Picture:
    """Return the figure as an element of a page: colours are the page's, ids its own, texts in their places."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn, flags=re.DOTALL)
    own = hashlib.sha256((alt + drawn).encode(errors="replace")).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(|href=")#(\w+)', drawn))

    def tidy(match: re.Match) -> str:
        tag = re.sub(r"\s+", " ", match[0])
        tag = re.sub(r' id="([^"]*)"', lambda id: f' id="{id[1]}-{own}"' if id[1] in used else "", tag)
        tag = re.sub(r'(url\(|href=")#(\w+)', rf"\1#\2-{own}", tag).replace("xlink:href", "href")
        tag = re.sub(r' transform="rotate\(-0 [^"]*"|font-family: [^;"]*;? ?', "", tag)
        tag = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", tag)
        return re.sub(r"#[0-9a-f]{6}(?=[;\"])", lambda color: f"var(--{_NAMES[color[0]]}, {color[0]})", tag)

    drawn = re.sub(r">\s+<", "><", re.sub(r"<[^>]+>", tidy, drawn)).strip()
    rest = iter(texts)
    drawn = re.sub(_UNDRAWN, lambda _: html.escape(next(rest)), drawn)
    size = f"0 0 {WIDTH} {round(figure.get_figheight() * 72)}"
    root = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" aria-label="{html.escape(alt)}"'
    svg = f'{root} style="stroke-linejoin: round; font-family: system-ui, sans-serif">{drawn}\n'
    return Picture.of(svg, figure, texts)
