"""Pictures of results files as SVG: how time and peak memory grow with N, D and K, and who runs out of memory.

A figure is of one file, one device and one dtype, and says which. It has lines for each case and each size that grows,
and bars where a case was run at one size only.
"""

import itertools
import json
import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FIELDS = ("case", "contender", "n", "d", "dtype", "note", "device", "threads", "torch", "commit", "date")
SIZES = {"n": "N", "d": "D", "clusters": "K"}
# In the notes of those for whom the memory was not enough, as `contenders`, `measure` and `cpu` write them.
RAN_OUT = ("would take", "out of memory", "does not fit", "the process died")
REMARKS = ("without centres",)  # notes that belong to a time
OURS, YARDSTICK = "ours", "two products"

# Ours, then the others in the order of the file. Every colour is dark enough for text on white, any two differ to the
# colour-blind too, and the markers differ besides.
LOOKS = (
    ("#0b6bb8", "o"),
    ("#e62709", "s"),
    ("#9700fc", "^"),
    ("#0d3801", "D"),
    ("#a6674a", "v"),
    ("#da1a7c", "P"),
    ("#541039", "h"),
    ("#3a0886", "p"),
)
Looks = dict[str, tuple[str, str]]
INK, SOFT, QUIET, RULE = "#1b2530", "#5a6673", "#b4bec8", "#e6eaee"
STYLE = {
    "svg.fonttype": "none",  # text stays text: small, and found by those who search
    "svg.hashsalt": "ccl_fast",
    "text.parse_math": False,  # a name with "$" is a name
    "figure.dpi": 72,  # a point is a pixel
    "figure.facecolor": "white",  # legible on a dark page too
    "font.sans-serif": ["DejaVu Sans"],  # with which it is laid out; other pages' fonts are narrower
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
}

# Pixels. In a cell of the grid, lines have ticks on their left and labels on their right, bars names and values.
COLUMNS, CELL, EDGE, HEAD = 2, 450, 20, 48
LINES_LEFT, LINES_WIDTH, LINES_HEIGHT = 62, 216, 190
BARS_LEFT, BARS_WIDTH, BAR_HEIGHT = 154, 210, 26
ABOVE, BELOW, LINE, DIGIT = 46, 46, 13.5, 6.5  # room for title and ticks of a plot; size of a label's text


class Quantity(NamedTuple):
    name: str  # of the file
    title: str
    value: str  # field of a row, as are those of band and floor
    band: tuple[str, ...]  # two, or none
    floor: str | None
    text: Callable[[float], str]
    unit: float
    base: int  # ticks are powers of it, times the unit; with their multiples where there are few
    multiples: tuple[int, ...]
    least: float  # what is less is drawn as this


class Panel(NamedTuple):
    rows: list[dict]  # of one case
    along: str | None  # which of SIZES grows; None: there is one size

    @property
    def height(self) -> int:
        return LINES_HEIGHT if self.along else BAR_HEIGHT * len(_groups(self.rows, "contender"))

    @property
    def sizes(self) -> str:
        """Those that do not grow."""
        fixed = [size for size in SIZES if size != self.along and self.rows[0][size]]
        return ", ".join(f"{SIZES[size]} = {self.rows[0][size]:,}" for size in fixed)


class Label(NamedTuple):
    end: tuple[float, float] | None  # of its line, in pixels of the plot
    goal: float  # the height at which the line would leave the plot: labels come in this order, and cross no line
    lines: list[str]
    color: str


def draw(results: Sequence[Path], folder: Path) -> list[Path]:
    """<file>-time.svg and <file>-memory.svg, for each device and dtype where a file has several; their paths."""
    if len({path.stem for path in results}) < len(results):
        raise ValueError(f"expected files of different names, as the figures are named after them, came {results}")
    files = {path: _read(path) for path in results}  # all of them, before anything is written
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for path, rows in files.items():
        looks, several = _looks(rows), [field for field in ("device", "dtype") if len(_groups(rows, field)) > 1]
        for group in _groups(rows, "device", "dtype"):
            names = [re.sub(r"[^a-z0-9]+", "-", group[0][field].lower()).strip("-") for field in several]
            for quantity in (TIME, MEMORY):
                if panels := _panels(group, quantity):
                    drawn.append(folder / f"{'-'.join((path.stem, *names, quantity.name))}.svg")
                    _save(panels, quantity, looks, drawn[-1])
    return drawn


def _read(path: Path) -> list[dict]:
    """Rows about a size: the ceilings of a machine have none."""
    rows: dict[tuple, dict] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        where = f"{path}, line {number}"
        try:
            row = {"clusters": 0} | json.loads(line)
        except (ValueError, TypeError):
            raise ValueError(f"{where}: expected a row of a benchmark in JSON, came {line[:60]!r}") from None
        if missing := [field for field in FIELDS if field not in row]:
            raise ValueError(f"{where}: expected the fields {', '.join(FIELDS)}, came none of {', '.join(missing)}")
        if row["n"]:
            key = tuple(row[field] for field in ("case", "contender", *SIZES, "dtype", "device"))
            if key in rows:
                raise ValueError(f"{where}: expected one row for a contender and a size, came a second of {key}")
            rows[key] = row
    if not any(_is_measured(row, quantity) for row in rows.values() for quantity in (TIME, MEMORY)):
        raise ValueError(f"{path}: expected rows with a time or a peak of memory, came {len(rows)} rows without")
    return list(rows.values())


def shown(contender: str) -> str:
    """Its name in the pictures."""
    return re.sub(rf"^{OURS}\b", "ccl_fast", contender)


def _is_measured(row: dict, quantity: Quantity) -> bool:
    return row.get(quantity.value) is not None


def _ran_out(row: dict, quantity: Quantity) -> bool:
    return not _is_measured(row, quantity) and any(words in row["note"] for words in RAN_OUT)


def _groups(rows: list[dict], *fields: str) -> list[list[dict]]:
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[field] for field in fields)].append(row)
    return list(groups.values())


def _remarks(rows: list[dict]) -> list[str]:
    return [f"({note})" for note in dict.fromkeys(row["note"] for row in rows) if note in REMARKS]


def _looks(rows: list[dict]) -> Looks:
    """Colour and marker of everyone who was measured: the same in all figures of a file."""
    measured = [row["contender"] for row in rows if _is_measured(row, TIME) or _is_measured(row, MEMORY)]
    rivals = [name for name in dict.fromkeys(measured) if name not in (OURS, YARDSTICK)]
    looks = dict(zip(rivals, itertools.cycle(LOOKS[1:]), strict=False))
    return looks | {OURS: LOOKS[0], YARDSTICK: (SOFT, "")}


def _panels(rows: list[dict], quantity: Quantity) -> list[Panel]:
    """For each case: N grows, at every D and K; D grows, and K, where most is known; the sizes that remain."""
    rows = [row for row in rows if _is_measured(row, quantity) or _ran_out(row, quantity)]
    # Who was measured nowhere says nothing of this quantity: two products have no peak, yet may "not fit".
    by_contender = [group for group in _groups(rows, "contender") if any(_is_measured(r, quantity) for r in group)]
    panels = []
    for of_case in _groups([row for group in by_contender for row in group], "case"):
        grown = []
        for along in SIZES:
            groups = _groups(of_case, *(size for size in SIZES if size != along))
            groups = [group for group in groups if len(_groups(group, along)) > 1]
            if along != "n":
                groups = sorted(groups, key=lambda g, a=along: (len(_groups(g, a)), g[0]["n"], len(g)))[-1:]
            grown += [Panel(group, along) for group in groups]
        shown = [row for panel in grown for row in panel.rows]
        panels += grown + [Panel(group, None) for group in _groups(of_case, *SIZES) if group[0] not in shown]
    return [panel for panel in panels if any(_is_measured(row, quantity) for row in panel.rows)]


def _save(panels: list[Panel], quantity: Quantity, looks: Looks, path: Path) -> None:
    lines = [panels[i : i + COLUMNS] for i in range(0, len(panels), COLUMNS)]
    heights = [ABOVE + max(panel.height for panel in line) + BELOW for line in lines]
    rows = [row for panel in panels for row in panel.rows]
    width = 2 * EDGE + len(lines[0]) * CELL
    caption = _caption(rows, quantity, width - 2 * EDGE)
    height = HEAD + sum(heights) + EDGE + 17 * len(caption)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user has set
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(width / 72, height / 72))
        figure.text(EDGE / width, 1 - 32 / height, f"{quantity.title}, {rows[0]['dtype']}", size=15, weight="bold")
        limits = _limits([row for panel in panels if panel.along for row in panel.rows], quantity)
        for i, line in enumerate(lines):
            for j, panel in enumerate(line):
                left, wide = (LINES_LEFT, LINES_WIDTH) if panel.along else (BARS_LEFT, BARS_WIDTH)
                bottom = height - HEAD - sum(heights[:i]) - ABOVE - panel.height
                at = (EDGE + j * CELL + left) / width, bottom / height
                axes = figure.add_axes((*at, wide / width, panel.height / height))
                axes.tick_params(which="both", length=0)
                heading = _write(axes, -left, panel.height + 24, panel.rows[0]["case"], weight="bold", size=12)
                axes.annotate(panel.sizes, (1, 0), (10, 3), heading, textcoords="offset points", color=SOFT)
                if panel.along:
                    _lines(axes, panel, quantity, looks, limits)
                else:
                    _bars(axes, panel, quantity, looks)
        for number, text in enumerate(caption, 1):
            figure.text(EDGE / width, (EDGE + 17 * (len(caption) - number)) / height, text, color=SOFT)
        figure.savefig(path, metadata={"Date": None, "Creator": None, "Title": f"{quantity.title}: {path.stem}"})


def _lines(axes: Axes, panel: Panel, quantity: Quantity, looks: Looks, limits: tuple[float, float]) -> None:
    """On logarithmic axes; the name beside the end of its line, a cross where the memory runs out."""
    along = panel.along
    sizes = sorted({row[along] for row in panel.rows})
    margin = (sizes[-1] / sizes[0]) ** 0.03
    ends = sizes[0] / margin, sizes[-1] * margin
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=limits)
    axes.set_xticks(sizes, _apart([f"{size:,}" for size in sizes], [LINES_WIDTH * _share(x, *ends) for x in sizes]))
    axes.set_xlabel(SIZES[along])
    ticks = _ticks(limits, quantity)
    axes.set_yticks(ticks, [quantity.text(tick) for tick in ticks])
    axes.minorticks_off()

    def pixels(x: float, y: float) -> tuple[float, float]:
        return LINES_WIDTH * _share(x, *ends), LINES_HEIGHT * _share(y, *limits)

    labels = []
    for rows in _groups(sorted(panel.rows, key=lambda row: row[along]), "contender"):
        name, measured = rows[0]["contender"], [row for row in rows if _is_measured(row, quantity)]
        color, marker = looks[name]
        text = [shown(name), *_remarks(measured)]
        if not measured:
            labels.append(Label(None, math.inf, [*text, "× out of memory everywhere"], color))
            continue
        x, y = [row[along] for row in measured], [max(row[quantity.value], quantity.least) for row in measured]
        style = {"ls": ":"} if name == YARDSTICK else {"marker": marker, "mec": "white", "mew": 0.6}
        axes.plot(x, y, color=color, lw=2.6 if name == OURS else 1.6, ms=6.5, **style, zorder=4 if name == OURS else 3)
        if quantity.band:
            band = ([row[field] for row in measured] for field in quantity.band)
            axes.fill_between(x, *band, color=color, alpha=0.18, lw=0)
        if any(_ran_out(row, quantity) and row[along] > x[-1] for row in rows):
            axes.plot(x[-1], y[-1], "x", color=color, ms=11, mew=2.6, zorder=5)
            text.append("× runs out of memory beyond")
        path = [pixels(*point) for point in zip(x, y, strict=True)]
        labels.append(Label(path[-1], _goal(path), text, color))
    if floors := _floors(panel.rows, quantity, along):
        axes.plot(list(floors), list(floors.values()), color=INK, lw=1.2, ls=(0, (4, 3)), zorder=2)
        path = [pixels(*point) for point in floors.items()]
        labels.append(Label(path[-1], _goal(path), ["floor"], INK))
    _label(axes, labels)


def _apart(texts: list[str], places: list[float]) -> list[str]:
    """From the right, those that do not touch the one before; the others are empty."""
    shown, left = [], math.inf
    for text, place in zip(reversed(texts), reversed(places), strict=True):
        is_free = place + DIGIT * len(text) / 2 < left
        shown.append(text if is_free else "")
        left = place - DIGIT * (len(text) / 2 + 1) if is_free else left
    return shown[::-1]


def _goal(path: list[tuple[float, float]]) -> float:
    """Where a line goes on to at the right edge; from a single point on, as steeply as the plot is."""
    (x, y), before = path[-1], path[-2] if len(path) > 1 else (path[-1][0] - 1, path[-1][1] - 1)
    return y + (LINES_WIDTH - x) * (y - before[1]) / (x - before[0])


def _label(axes: Axes, labels: list[Label]) -> None:
    """Beside the plot, each as near to the end of its line as the others leave it."""
    labels = sorted(labels, key=lambda label: label.goal)
    heights = [LINE * len(label.lines) + 3 for label in labels]
    wanted = [(label.end[1] if label.end else LINES_HEIGHT) - h / 2 for label, h in zip(labels, heights, strict=True)]
    bottoms, low, high = [], -LINE, LINES_HEIGHT + 1.4 * LINE
    for bottom, height in zip(wanted, heights, strict=True):
        bottoms.append(max(low, bottom))
        low = bottoms[-1] + height
    for i in reversed(range(len(labels))):
        bottoms[i] = high = min(bottoms[i], high - heights[i])
    for label, height, bottom in zip(labels, heights, bottoms, strict=True):
        for number, text in enumerate(label.lines):
            style = {"size": 9.5} if number else {"weight": "bold"}
            y = bottom + height - LINE * (number + 0.5) - 1.5
            _write(axes, LINES_WIDTH + 13, y, text, color=label.color, va="center", **style)
        if label.end:
            x, y = zip(label.end, (LINES_WIDTH + 10, bottom + height / 2), strict=True)
            x, y = [v / LINES_WIDTH for v in x], [v / LINES_HEIGHT for v in y]
            axes.plot(x, y, color=label.color, lw=0.7, alpha=0.55, transform=axes.transAxes, clip_on=False)


def _bars(axes: Axes, panel: Panel, quantity: Quantity, looks: Looks) -> None:
    """From zero, with the value beside each; a whisker where lines have a band."""
    axes.set_axis_off()
    rows, fields, floors = panel.rows, (quantity.value, *quantity.band), _floors(panel.rows, quantity, "n")
    values = [row[field] for row in rows for field in fields if row.get(field) is not None]
    longest = max(*values, *floors.values(), quantity.least)
    axes.set(xlim=(0, longest), ylim=(len(rows) - 0.5, -0.5))
    for number, row in enumerate(rows):
        name, color = row["contender"], looks[row["contender"]][0]
        style = {"va": "center", "weight": "bold" if name == OURS else "normal"}
        y = BAR_HEIGHT * (len(rows) - number - 0.5)
        _write(axes, -8, y, shown(name), ha="right", color=color, **style)
        if not _is_measured(row, quantity):
            _write(axes, 6, y, "× runs out of memory", color=color, **style)
            continue
        value, *band = ends = [row[field] for field in fields]
        axes.barh(number, value, 0.66, color=color, alpha=1 if name == OURS else 0.55)
        if band:
            axes.plot(band, [number, number], color=INK, lw=1.1, clip_on=False)
        _write(
            axes, BARS_WIDTH * max(ends) / longest + 7, y, " ".join([quantity.text(value), *_remarks([row])]), **style
        )
    for floor in floors.values():
        axes.axvline(floor, color=INK, lw=1.2, ls=(0, (4, 3)))
        style = {"size": 8.5, "ha": "center", "va": "top", "textcoords": "offset points"}
        axes.annotate(f"floor {quantity.text(floor)}", (floor, len(rows) - 0.5), (0, -4), **style)


def _write(axes: Axes, x: float, y: float, text: str, **style):
    """At pixels from the plot's lower left corner."""
    return axes.annotate(text, (0, 0), (x, y), "axes fraction", "offset points", **style)


def _floors(rows: list[dict], quantity: Quantity, along: str) -> dict[int, float]:
    """By size; ours where contenders have different ones, for methods need not take the same products."""
    known = [row for row in rows if quantity.floor and row.get(quantity.floor) is not None]
    known.sort(key=lambda row: (row[along], row["contender"] != OURS))
    return {group[0][along]: group[0][quantity.floor] for group in _groups(known, along)}


def _limits(rows: list[dict], quantity: Quantity) -> tuple[float, float]:
    """The scale that all lines of a figure share."""
    fields = [quantity.value, *quantity.band, quantity.floor]
    values = [row[field] for row in rows for field in fields if row.get(field) is not None] or [1]
    return max(min(values), quantity.least) / 1.5, max(*values, quantity.least) * 1.5


def _share(x: float, low: float, high: float) -> float:
    """Where it lies on a logarithmic axis, from 0 to 1."""
    return math.log(x / low) / math.log(high / low)


def _ticks(limits: tuple[float, float], quantity: Quantity) -> list[float]:
    low, high = (math.log(x / quantity.unit, quantity.base) for x in limits)
    powers = range(math.ceil(low) - 1, math.floor(high) + 1)
    step, multiples = 1 + len(powers) // 9, quantity.multiples if len(powers) < 4 else (1,)
    ticks = [m * quantity.unit * quantity.base ** float(p) for p in powers if p % step == 0 for m in multiples]
    return [tick for tick in ticks if limits[0] <= tick <= limits[1]]


def _caption(rows: list[dict], quantity: Quantity, width: float) -> list[str]:
    what, lines = "Above the inputs.", []
    if quantity is TIME:
        what = "Medians of interleaved runs; bands and whiskers: 20th to 80th percentile."
    if any(row["contender"] == YARDSTICK for row in rows):
        lines.append("Dotted: two bare N × N × D matrix products.")
    if _floors(rows, quantity, "n"):
        lines.append("Dashed: the floor that the machine's rates set.")

    def of_rows(field: str, longest: int | None = None) -> str:
        return " and ".join(dict.fromkeys(str(row[field] or "unknown")[:longest] for row in rows))

    machine = f"{of_rows('device')}, {of_rows('threads')} threads, torch {of_rows('torch')}"
    commit = f"commit {of_rows('commit', 10)}{' with changes' * any(row.get('dirty') for row in rows)}"
    texts = what, " ".join(lines), f"{machine}, {commit}, {of_rows('date', 10)}."
    return [line for text in texts for line in textwrap.wrap(text, int(width / DIGIT))]


def _seconds(x: float) -> str:
    return _in_units(x, ((1, "s"), (1e-3, "ms"), (1e-6, "µs")))


def _bytes(x: float) -> str:
    return _in_units(x, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")))


def _in_units(x: float, units: Sequence[tuple[float, str]]) -> str:
    """Three digits."""
    size, unit = next((unit for unit in units if x >= 0.9995 * unit[0]), units[-1])
    return f"{float(f'{x / size:.3g}'):,g} {unit}"


TIME = Quantity("time", "Time", "p50", ("p20", "p80"), "floor", _seconds, 1, 10, (1, 2, 5), 1e-7)
# The kernel counts resident memory in pages of 4 KiB.
MEMORY = Quantity("memory", "Peak memory", "peak_bytes", (), None, _bytes, 2**20, 4, (1, 2), 4096)
