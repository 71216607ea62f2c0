"""Pictures of results files say what the files say, and nothing that they do not."""

import json
import re
from itertools import combinations, pairwise
from xml.etree import ElementTree

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")  # the extra "train"

from benchmarks.pages import plots  # noqa: E402
from tests import ROOT  # noqa: E402

MACHINE = {"device": "a CPU", "threads": 3, "torch": "2.15", "commit": "0123456789ab", "date": "2026-11-21T04:31:39"}
RUNS_OUT, OUT = "× runs out of memory beyond", "not started: its arrays would take 24 GiB, over 60% of the 20 GiB free"


def row(contender="ours", n=512, p50=None, peak=None, note="", **other):
    times = {"p20": p50 and p50 * 0.9, "p50": p50, "p80": p50 and p50 * 1.1, "peak_bytes": peak, "floor": None}
    size = {"case": "ccl", "contender": contender, "n": n, "d": 128, "dtype": "float32", "note": note}
    return size | times | MACHINE | other


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def texts(svg):
    """(text, x, y) of every text of a picture."""
    found = ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text")
    return [(t.text, float(t.get("x", "nan")), float(t.get("y", "nan"))) for t in found]


def words(svg):
    return [text for text, _, _ in texts(svg)]


@pytest.fixture
def drawn(tmp_path):
    """Draws rows; {what comes after the file's name: words of the picture}."""

    def draw(*rows):
        paths = plots.draw([write(tmp_path / "made-up.jsonl", rows)], tmp_path / "pictures")
        assert sorted(paths) == sorted((tmp_path / "pictures").iterdir())
        return {path.stem.removeprefix("made-up-"): words(path) for path in paths}

    return draw


def test_lines_are_named_and_end_where_memory_runs_out(drawn):
    found = drawn(
        *(row("ours", n, n * 1e-6, n * 100, floor=n * 5e-7) for n in (512, 2048, 8192)),
        *(row("dense", n, n * 2e-6, n**2) for n in (512, 2048)),
        row("dense", 8192, note=OUT),
        *(row("compiled", n, n * 2e-6) for n in (512, 2048)),
        row("compiled", 8192, note="out of memory"),
        *(row("pml", n, n * 3e-6, n**2, note="without centres") for n in (512, 2048, 8192)),
        *(row("elsewhere", n, note="runs on CUDA only") for n in (512, 2048, 8192)),
        row("ceiling", 0, d=0, case="ceiling", note="1e12"),
    )
    assert set(found) == {"time", "memory"}
    for label in ("ccl", "D = 128", "N", "512", "2,048", "8,192", "ccl_fast", "dense", "pml", "(without centres)"):
        assert label in found["time"] and label in found["memory"], label
    assert found["time"].count(RUNS_OUT) == 2 and found["memory"].count(RUNS_OUT) == 1
    assert found["time"].count("floor") == 1 and "floor" not in found["memory"]
    assert "10 ms" in found["time"] and "1 MiB" in found["memory"]
    assert "compiled" in found["time"] and "compiled" not in found["memory"]  # it has no peaks
    assert not {"elsewhere", "ceiling"} & {*found["time"], *found["memory"]}


def test_the_cross_is_in_the_colour_of_the_line_that_ends(tmp_path):
    rows = [row("ours", n, n * 1e-6) for n in (512, 2048)] + [row("dense", 512, 1e-3), row("dense", 2048, note=OUT)]
    (picture,) = plots.draw([write(tmp_path / "a.jsonl", rows)], tmp_path)
    element = next(e for e in ElementTree.parse(picture).iter() if e.text == RUNS_OUT)
    assert plots.LOOKS[1][0] in element.get("style")
    # matplotlib's marker "x" is two strokes, and no other marker of ours is open.
    assert len(re.findall(rf"L [^M]+M [^z]+\" style=\"stroke: {plots.LOOKS[1][0]}", picture.read_text())) == 1


@pytest.mark.parametrize("note", ["out of memory", "does not fit", "the process died", OUT])
def test_running_out_of_memory_has_many_words(drawn, note):
    found = drawn(*(row("ours", n, 1e-3) for n in (512, 2048)), row("dense", 512, 1e-3), row("dense", 2048, note=note))
    assert RUNS_OUT in found["time"]


@pytest.mark.parametrize("note", ["not started: about 300 s, 10 s are left", "ValueError: no", ""])
def test_what_was_not_measured_for_another_reason_did_not_run_out(drawn, note):
    found = drawn(*(row("ours", n, 1e-3) for n in (512, 2048)), row("dense", 512, 1e-3), row("dense", 2048, note=note))
    assert RUNS_OUT not in found["time"] and "dense" in found["time"]


def test_who_fits_at_no_size_of_a_panel_is_said_so(drawn):
    sizes = [(n, d) for d in (128, 768) for n in (512, 2048)]
    found = drawn(
        *(row("ours", n, 1e-3, d=d) for n, d in sizes),
        *(row("dense", n, 1e-3 if d == 128 else None, note="" if d == 128 else OUT, d=d) for n, d in sizes),
    )
    assert found["time"].count("× out of memory everywhere") == 1


def test_d_and_k_grow_too_and_single_sizes_are_bars(drawn):
    sizes = [(1000, 32, 10), (1000, 64, 10), (1000, 128, 10), (1000, 128, 20), (4000, 128, 10), (7000, 99, 7)]
    of_ours = [row("ours", n, n * d * k * 1e-6, 4096, d=d, clusters=k, floor=1e-3) for n, d, k in sizes]
    of_faiss = [row("faiss", n, n * d * k * 2e-6, 0, d=d, clusters=k) for n, d, k in sizes]
    found = drawn(*of_ours, *of_faiss)["time"]
    assert {"N", "D", "K"} <= set(found)
    assert {"D = 128, K = 10", "N = 1,000, K = 10", "N = 1,000, D = 128", "N = 7,000, D = 99, K = 7"} <= set(found)
    assert {"4.85 s", "9.7 s", "floor 1 ms"} <= set(found)  # beside the bars


def test_bars_say_who_ran_out_and_who_does_less(drawn):
    found = drawn(
        row("ours", p50=1e-4), row("dense", note=OUT), row("dense", p50=2.0, note="without centres", case="b")
    )
    assert {"100 µs", "× runs out of memory", "2 s (without centres)"} <= set(found["time"])


def test_the_caption_is_of_the_file(drawn):
    rows = row(p50=1e-3, dirty=False), row("dense", p50=1e-3, commit="ba9876543210", dirty=False)
    caption = "a CPU, 3 threads, torch 2.15, commit 0123456789 and ba98765432, 2026-11-21."
    assert caption in " ".join(drawn(*rows)["time"])
    assert "commit 0123456789 with changes" in " ".join(drawn(row(p50=1e-3, dirty=True))["time"])


def test_devices_and_dtypes_have_figures_of_their_own(drawn):
    rows = [row(p50=1e-3, device=device, dtype=dtype) for device in ("An H200", "a CPU") for dtype in ("f32", "bf16")]
    found = drawn(*rows)
    assert set(found) == {f"{device}-{dtype}-time" for device in ("an-h200", "a-cpu") for dtype in ("f32", "bf16")}
    for name, text in found.items():
        others = {"An H200", "a CPU"} - {"An H200" if "h200" in name else "a CPU"}
        assert not any(other in t for other in others for t in text)
        assert f"Time, {'bf16' if 'bf16' in name else 'f32'}" in text


def test_the_same_file_gives_the_same_bytes_whatever_the_user_has_set(tmp_path):
    file = write(tmp_path / "a.jsonl", [row(name, n, n * 1e-6, n) for name in ("ours", "b") for n in (512, 2048)])
    first = [path.read_bytes() for path in plots.draw([file], tmp_path / "first")]
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.labelweight": "bold"}):
        assert [path.read_bytes() for path in plots.draw([file], tmp_path / "second")] == first
        assert matplotlib.rcParams["font.size"] == 30
    assert len(first) == 2 and b"<dc:date>" not in first[0]


def test_the_background_is_white_on_any_page(tmp_path):
    (picture,) = plots.draw([write(tmp_path / "a.jsonl", [row(p50=1e-3)])], tmp_path)
    assert re.search(r'id="patch_1">\s*<path[^>]*fill: #ffffff', picture.read_text())


def test_who_was_not_measured_takes_no_colour(tmp_path):
    absent = [row(f"absent {i}", note="runs on CUDA only") for i in range(len(plots.LOOKS) - 2)]
    rows = [row("ours", p50=1e-3), row("a", p50=1e-3), *absent, row("b", p50=1e-3)]
    (picture,) = plots.draw([write(tmp_path / "a.jsonl", rows)], tmp_path)
    labels = [e for e in ElementTree.parse(picture).iter() if e.text in {"ccl_fast", "a", "b"}]
    assert len({re.search(r"fill: (#\w+)", e.get("style"))[1] for e in labels}) == len(labels) == 3


def test_names_may_be_anything(drawn):
    names = ["$x^2$", "a < b & c", "ours"]
    found = drawn(*(row(name, n, 1e-3) for name in names for n in (512, 2048)))["time"]
    assert {"$x^2$", "a < b & c", "ccl_fast"} <= set(found)


@pytest.mark.parametrize("others", [1e9, 1e-9], ids=["low", "high"])
def test_labels_and_ticks_keep_apart(tmp_path, others):
    """Eight lines end in one point, low or high in the plot, at sizes that are close to each other."""
    sizes = [1000 + 10 * i for i in range(20)] + [1_000_000]
    names = ["ours", *"abcdefg"]
    rows = [row(name, n, 1e-3 * n) for name in names for n in sizes]
    rows += [row(n=n, p50=others, case="another") for n in sizes[-2:]]
    (picture,) = plots.draw([write(tmp_path / "a.jsonl", rows)], tmp_path)
    found = [(text, x, y) for text, x, y in texts(picture) if x < 400]  # of the panel on the left
    labels = sorted((y, x) for text, x, y in found if text in {"ccl_fast", *"abcdefg"})
    (title,) = (y for text, _, y in found if text == "ccl")
    (tick,) = (y for text, _, y in found if text == "1,000,000")
    assert len(labels) == 8 and len({x for _, x in labels}) == 1
    assert title + 12 < labels[0][0] and labels[-1][0] < tick + 5
    assert all(b[0] - a[0] > 12 for a, b in pairwise(labels))
    ticks = sorted((x, len(text)) for text, x, _ in found if text in {f"{n:,}" for n in sizes})
    assert len(ticks) >= 2
    assert all(b[0] - a[0] > 6 * (a[1] + b[1]) / 2 for a, b in pairwise(ticks))


@pytest.mark.parametrize(
    "lines, expected",
    [
        ("", "came 0 rows without"),
        (json.dumps(row(note=OUT)), "came 1 rows without"),
        (json.dumps(row("ceiling", 0, p50=1.0)), "came 0 rows without"),
        ("{", "line 1: expected a row of a benchmark in JSON, came '{'"),
        ("[1]", r"line 1: expected a row of a benchmark in JSON, came '\[1\]'"),
        (f"{json.dumps(row(p50=1.0))}\n{{}}", "line 2: expected the fields case, .*, came none of case, contender"),
        ("\n".join([json.dumps(row(p50=1.0))] * 2), "line 2: expected one row for a contender and a size"),
    ],
)
def test_a_file_that_cannot_be_drawn_is_named_and_nothing_is_written(tmp_path, lines, expected):
    good, bad = write(tmp_path / "good.jsonl", [row(p50=1.0)]), tmp_path / "bad.jsonl"
    bad.write_text(lines)
    with pytest.raises(ValueError, match=f"{re.escape(str(bad))}.*{expected}"):
        plots.draw([good, bad], tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()


def test_files_of_one_name_would_overwrite_each_other(tmp_path):
    (tmp_path / "b").mkdir()
    files = [write(tmp_path / folder / "x.jsonl", [row(p50=1.0)]) for folder in ("", "b")]
    with pytest.raises(ValueError, match="expected files of different names"):
        plots.draw(files, tmp_path / "pictures")


# Not all that are in the folder: to one of those a benchmark may be adding rows. Those of natural images have no times.
NAMED = set(re.findall(r"benchmarks/results/[\w.-]+\.jsonl", (ROOT / "README.md").read_text()))
SHOWN = sorted(name for name in NAMED if not re.search(r"-natural(-\d+)?\.jsonl$", name))


def test_the_readme_shows_results():
    assert SHOWN


@pytest.mark.parametrize("file", [ROOT / name for name in SHOWN], ids=lambda file: file.stem)
def test_the_results_of_the_readme_can_be_drawn(file, tmp_path):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = {path.stem: words(path) for path in plots.draw([file], tmp_path)}
    shown = {text for of_picture in found.values() for text in of_picture}
    assert {plots.shown(r["contender"]) for r in rows if r["p50"] or r["peak_bytes"]} <= shown
    assert all(any(r["commit"][:10] in text for text in of_picture) for of_picture in found.values() for r in rows)


# Linear RGB as seen without cones for long, middle, short waves (Machado, Oliveira, Fernandes 2009), and XYZ of it.
VISIONS = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(color):
    value = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def lab(rgb):
    x = XYZ @ rgb.clip(0, 1) / (0.95047, 1, 1.08883)
    f = np.where(x > 0.008856, np.cbrt(x), 7.787 * x + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_differ_to_everyone(vision):
    seen = [lab(VISIONS[vision] @ linear(color)) for color, _ in plots.LOOKS]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 20  # 2 can just be told apart
    assert len({marker for _, marker in plots.LOOKS}) == len(plots.LOOKS)


@pytest.mark.parametrize("color", [*(color for color, _ in plots.LOOKS), plots.INK, plots.SOFT])
def test_text_in_every_colour_is_legible_on_white(color):
    assert 1.05 / (0.05 + (XYZ @ linear(color))[1]) >= 4.5  # WCAG, level AA
