"""The tables of the README, of the losses, of k-means and of OOD detection, and those of docs/scaling.md,
docs/objectives.md and docs/benchmarks.md: generated from results files, never typed. Sections without a file say what
has not been measured."""

import json
import re
from pathlib import Path

from benchmarks.clustering.cases import ITERATIONS
from benchmarks.training import natural

README = Path(__file__).parents[2] / "README.md"
SCALING, OBJECTIVES, BENCHMARKS, NATURAL = (
    README.parent / "docs" / name for name in ("scaling.md", "objectives.md", "benchmarks.md", "natural-images.md")
)
PAGES = {
    " ablation": NATURAL,
    " distributed": SCALING,
    " objectives": OBJECTIVES,
    " GPU k-means": BENCHMARKS,
}  # besides the README
KINDS = "(?P<what>(?: k-means| OOD| natural| ablation| distributed| objectives| GPU| GPU k-means)?)"
SECTION = re.compile(
    rf"<!-- measured{KINDS}(?:: (?P<source>\S+))? -->\n.*?<!-- /measured(?P=what) -->\n",
    re.DOTALL,
)
CASES = ("ccl", "ccl inside", "supcon", "nt-xent", "clip")
# Of the rows of a results file, those that the table shows; the plots show the others.
ROWS, D, K = (512, 2048, 8192, 32768), 128, 128
PACKAGES = {
    "metric-learning SupCon": "pytorch-metric-learning",
    "metric-learning NTXent": "pytorch-metric-learning",
    "lightly": "lightly",
    "torch linear_cross_entropy": "torch's linear_cross_entropy",
}
DETECTORS = ("nearest_neighbor", "mahalanobis", "ensemble")
KMEANS_CONTENDERS = ("ours", "faiss", "scikit-learn", "fast-pytorch-kmeans", "torch")


def update(results: Path, page: Path | None = None) -> None:
    """Replace the section between the markers of its kind by that of a results file.

    That is one of `python -m benchmarks cpu`, or a comparison.json of `ccl-fast compare` with "commit" and "cpu" added.
    The page is the README, for several processes docs/scaling.md and for the family docs/objectives.md, unless it is
    named.
    """
    root = README.parent
    if page is not None and not page.resolve().is_relative_to(root):
        root = page.parent
    sections = section(results, root)
    for match in SECTION.finditer(sections):
        new, what = match[0], match["what"]
        on = page or PAGES.get(what, README)
        on.write_text(
            SECTION.sub(lambda old, new=new, what=what: new if old["what"] == what else old[0], on.read_text())
        )


def section(results: Path, root: Path = README.parent) -> str:
    if results.suffix == ".json":
        return _comparison(json.loads(results.read_text()), results.resolve().relative_to(root.resolve()).as_posix())
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    source = results.resolve().relative_to(root.resolve()).as_posix()
    what, table, words = "", _table, _words
    if "natural" in rows[0]:
        return _natural(rows, source)
    if "stage" in rows[0]:
        return _harvested(rows, source)
    if "setting" in rows[0]:
        what, table, words = " k-means", _kmeans_table, _kmeans_words
    elif "processes" in rows[0]:
        what, table, words = " distributed", _distributed_table, _distributed_words
    elif "objective" in rows[0]:
        what, table, words = " objectives", _objectives_table, _objectives_words
    link = f"../{source}" if what in PAGES else source
    text = f"{words(rows[0])} {_provenance(rows[0], source, link)}"
    return "\n".join((f"<!-- measured{what}: {source} -->", *table(rows), "", text, f"<!-- /measured{what} -->\n"))


def _natural(rows: list[dict], source: str) -> str:
    """Two sections: the gains of the defaults, for the README, and what each part of them does."""
    found = ""
    for what, lines, link in (
        (" natural", natural.table(rows), source),
        (" ablation", natural.ablation(rows), f"../{source}"),
    ):
        text = natural.words(rows, source, link)
        found += "\n".join((f"<!-- measured{what}: {source} -->", *lines, "", text, f"<!-- /measured{what} -->\n"))
    return found


def _comparison(comparison: dict, source: str) -> str:
    lines = [
        "| features, detector | OOD | AUROC SimCLR | AUROC CCL | gain | better for | FPR95 SimCLR | FPR95 CCL |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for detector, groups in comparison["results"].items():
        level, name = detector.split("/")
        if name not in DETECTORS:
            continue
        default = " (default)" if detector == comparison["default"] else ""
        for group, metrics in groups.items():
            auroc, fpr = metrics["auroc"], metrics["fpr95_id"]
            better = sum(value > 0 for value in auroc["gain"]["values"])
            cells = [
                f"{level}, {name.replace('_', ' ')}{default}",
                group,
                _spread(auroc["simclr"]),
                _spread(auroc["ccl"]),
                _spread(auroc["gain"], "+.3f"),
                f"{better} of {len(comparison['seeds'])}",
                _spread(fpr["simclr"]),
                _spread(fpr["ccl"]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    run = comparison["environments"][0]
    words = (
        f"Mean ± standard deviation over {len(comparison['seeds'])} seeds; gain: CCL less SimCLR of the same seed. "
        "Near: digits of the held-out classes; far: mean over textures, noise, blobs and letters. FPR95: share of OOD "
        f"images accepted when 95 % of the test images are. {comparison['cpu']}, torch {run['torch']}, "
        f"Python {run['python']}, {run['date'][:10]}, commit {comparison['commit'][:10]}; [{source}]({source}), which "
        "has the other detectors."
    )
    return "\n".join((f"<!-- measured OOD: {source} -->", *lines, "", words, "<!-- /measured OOD -->\n"))


def _spread(moments: dict, form: str = ".3f") -> str:
    return f"{moments['mean']:{form}} ± {moments['deviation']:.3f}"


def _kmeans_table(rows: list[dict]) -> list[str]:
    by_key = {(r["case"], r["n"], r["d"], r["clusters"], r["contender"]): r for r in rows}
    rivals = KMEANS_CONTENDERS[1:]
    heads = ("case", "N, D, K", "ccl_fast", "/ floor", *rivals, "wrong labels", "peak: ours", rivals[0])
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for key in dict.fromkeys(key[:-1] for key in by_key):
        runs = ours, *others = [by_key.get((*key, contender), {}) for contender in KMEANS_CONTENDERS]
        wrong = [str(run["wrong_labels"]) for run in runs if run.get("wrong_labels") is not None]
        cells = [
            key[0],
            ", ".join(f"{x:,}" for x in key[1:]),
            _time(ours["p50"]),
            f"{ours['p50'] / ours['floor']:.2f}",
            *map(_rival, others),
            f"{', '.join(wrong)} of {ours['checked']:,}",
            _memory(ours),
            _memory(others[0]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _kmeans_words(row: dict) -> str:
    return (
        f"k-means of {row['dtype']} rows: one iteration, or {ITERATIONS} and the labels of the centres they end in, "
        "from given or from drawn centres (by the plain k-means++, scikit-learn's by its greedy one); median of "
        "interleaved runs; in brackets the median ratio to ccl_fast. Floor: the matrix products of the iterations, "
        "without seeding, at the rate of torch's fastest product. Wrong labels: given the same starting centres, of "
        "the rows checked against all distances in float64; in the order of the columns. Peak memory is above the "
        "inputs. No sub-sampling; the file has every library's configuration."
    )


def _distributed_table(rows: list[dict]) -> list[str]:
    by_key = {(r["n"], r["contender"]): r for r in rows}
    rivals = ("ours ring", "ours alone", "plain", "lightly")
    heads = ("N", "ccl_fast", "ring", "one process", "plain", "lightly", "sent: ccl_fast", "ring", "plain", "lightly")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for n in sorted({key[0] for key in by_key}):
        ours, *others = (by_key.get((n, name), {}) for name in ("ours", *rivals))
        sent = [ours] + [other for other, name in zip(others, rivals, strict=True) if name != "ours alone"]
        cells = [f"{n:,}", _time(ours["p50"]), *map(_rival, others), *map(_sent, sent)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _sent(row: dict) -> str:
    return f"{row['sent'] / 2**20:.2f} MiB" if row.get("sent") else "-"


def _distributed_words(row: dict) -> str:
    return (
        f"NT-Xent over {row['processes']} processes on one machine (gloo over the loopback interface; each has its "
        f'part of the cores, "one process" has all), N rows in all, D = {row["d"]}, {row["dtype"]}, forward and '
        "backward, median of interleaved runs; in brackets the median ratio to ccl_fast. Sent: bytes that the loopback "
        "interface carried, for each process. Plain: our dense reference behind an all-gather with gradients, the "
        "whole matrix on every process; lightly: `NTXentLoss(gather_distributed=True)`."
    )


def _objectives_table(rows: list[dict]) -> list[str]:
    by_key = {(r["objective"], r["n"], r["clusters"], r["contender"]): r for r in rows}
    heads = ("objective", "N", "K", "ccl_fast", "dense", "lightly", "peak: ccl_fast", "dense")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, n, clusters in dict.fromkeys(key[:-1] for key in by_key):
        ours, dense, lightly = (by_key.get((name, n, clusters, who), {}) for who in ("ours", "dense", "lightly"))
        cells = [f"`{name}`", f"{n:,}", f"{clusters:,}", _time(ours["p50"]), _rival(dense), _rival(lightly)]
        lines.append(f"| {' | '.join((*cells, _memory(ours), _memory(dense)))} |")
    return lines


def _objectives_words(row: dict) -> str:
    return (
        f"Forward and backward, N rows in all (two views of N / 2 samples), D = {row['d']}, {row['dtype']}; K: "
        "clusters, prototypes, or rows of a queue or bank. Median of interleaved runs (the largest: a single one); in "
        "brackets the median ratio to ccl_fast. Dense: the module with its dense backend, or where it has none what "
        "one would write without the library. Peak memory is above the inputs."
    )


def _harvested(rows: list[dict], source: str) -> str:
    """Of a file that `python -m benchmarks import` has written."""
    what, tables, words, link = " GPU", _gpu_tables, GPU_WORDS, source
    if rows[0]["case"].startswith("k-means"):
        what, tables, words, link = " GPU k-means", _gpu_kmeans_tables, GPU_KMEANS_WORDS, f"../{source}"
    row = rows[0]
    where = (
        f"{row['device']}, driver {row['driver']}, torch {row['torch']}, Triton {row['triton']}, {row['date'][:10]}, "
        f"commit {row['commit'][:10]}; [{source}]({link})."
    )
    lines = [line for table in tables(rows) if len(table) > 2 for line in (*table, "")]
    return "\n".join((f"<!-- measured{what}: {source} -->", *lines, f"{words} {where}", f"<!-- /measured{what} -->\n"))


GPU_WORDS = (
    "Log-sum-exp of N unit rows of bfloat16 against each other: replays of a CUDA graph, median; forward and backward "
    "apart. Floor: the products that the passes need at the rate of a bare one, or the exponentials if they take "
    "longer. As called: what a caller waits for both in eager mode. Two products: bare N x N x D ones. Rivals: forward "
    "and backward of NT-Xent or CLIP in turns, in brackets the median ratio to ccl_fast."
)
GPU_KMEANS_WORDS = (
    "K-means step by step, in the first iteration, whose centres are rows, and in a later one; median of a few. "
    "Prepare is once for all iterations. In doubt: rows whose label the tensor cores' rounding left open; re-checked: "
    "those of them that met all centres again. Rivals: one iteration in turns."
)


def _gpu_tables(rows: list[dict]) -> list[list[str]]:
    ours = {(r["case"], r["n"], r["d"], r["pass"], r["mode"]): r for r in rows if "pass" in r and r.get("p50")}
    products = {(r["n"], r["d"]): r for r in rows if r["case"] == "two products" and "stage" in r and r.get("p50")}
    heads = ("case", "N", "D", "forward", "backward", "/ floor", "as called", "two products", "peak")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for case, n, d in dict.fromkeys(key[:3] for key in ours):
        runs = [ours.get((case, n, d, which, mode)) for mode in ("graph", "eager") for which in ("forward", "backward")]
        graph, eager = (pair if all(pair) else None for pair in (runs[:2], runs[2:]))
        floor = sum(run.get("floor") or 0 for run in graph) if graph else 0
        cells = [
            case,
            f"{n:,}",
            f"{d:,}",
            *(_time(run["p50"]) if run else "-" for run in runs[:2]),
            f"{sum(run['p50'] for run in graph) / floor:.2f}" if floor else "-",
            _time(sum(run["p50"] for run in eager)) if eager else "-",
            _time(products[n, d]["p50"]) if (n, d) in products else "-",
            _memory(eager[1]) if eager else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [lines, _rivals([r for r in rows if "pass" not in r and r["contender"] != "two products"])]


def _gpu_kmeans_tables(rows: list[dict]) -> list[list[str]]:
    steps = [r for r in rows if "iteration" in r]
    names = list(dict.fromkeys(name for r in steps for name in r if name.endswith(" p50")))
    heads = ("N, D, K", "rows", "iteration", *(name.removesuffix(" p50") for name in names), "in doubt", "re-checked")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for r in (r for r in steps if any(name in r for name in names)):
        counts = [f"{r[name]:,}" if name in r else "-" for name in ("doubtful", "rechecked")]
        times = [_time(r[name]) if name in r else "-" for name in names]
        size = ", ".join(f"{r[name]:,}" for name in ("n", "d", "clusters"))
        lines.append(f"| {' | '.join((size, r['dtype'], str(r['iteration']), *times, *counts))} |")
    return [lines, _rivals([r for r in rows if "contender" in r])]


def _rivals(rows: list[dict]) -> list[str]:
    """A line for each comparison in which someone besides ours has a time."""
    by_key = {}
    for r in rows:
        by_key.setdefault((r["case"], r["n"], r["d"], r.get("clusters") or 0), {})[r["contender"]] = r
    timed = {
        key: found
        for key, found in by_key.items()
        if found.get("ours", {}).get("p50") and sum(bool(r.get("p50")) for r in found.values()) > 1
    }
    rivals = list(dict.fromkeys(name for found in timed.values() for name in found if name != "ours"))
    lines = [f"| case | N | D | ccl_fast | {' | '.join(rivals)} |", "|---" * (4 + len(rivals)) + "|"]
    for (case, n, d, _), found in timed.items():
        cells = [
            case,
            f"{n:,}",
            f"{d:,}",
            _time(found["ours"]["p50"]),
            *(_rival(found.get(name, {})) for name in rivals),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _table(rows: list[dict]) -> list[str]:
    by_key = {(r["case"], r["n"], r["contender"]): r for r in rows if r["d"] == D and r.get("clusters", K) == K}
    lines = [
        "| case | N | ccl_fast | / floor | / 2 products | dense | compiled | fastest package | peak: ours | dense |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for n in sorted({key[1] for key in by_key if key[0] == case and key[1] in ROWS}):
            ours, *dense = (by_key.get((case, n, contender), {}) for contender in ("ours", "dense", "dense compiled"))
            packages = [(name, by_key.get((case, n, contender), {})) for contender, name in PACKAGES.items()]
            cells = [
                case,
                f"{n:,}",
                _time(ours["p50"]),
                f"{ours['p50'] / ours['floor']:.2f}" if ours.get("floor") else "-",
                f"{ours['to_products']:.2f}" if ours.get("to_products") else "-",
                *map(_rival, dense),
                _fastest(packages),
                _memory(ours),
                _memory(dense[0]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _fastest(packages: list[tuple[str, dict]]) -> str:
    timed = [(row["p50"], f"{name} {_rival(row)}") for name, row in packages if row.get("p50")]
    return min(timed)[1] if timed else next((found for _, row in packages if (found := _rival(row)) != "-"), "-")


def _rival(row: dict) -> str:
    if row.get("p50"):
        return f"{_time(row['p50'])} ({row['to_ours']:.1f}x)"
    return "does not fit" if "would take" in row.get("note", "") else "-"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _memory(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:,.0f} MiB" if row.get("peak_bytes") is not None else "-"


def _words(row: dict) -> str:
    return (
        f"Forward and backward, D = {D}, {row['dtype']}, median of interleaved runs; in brackets the median ratio to "
        "ccl_fast. Floor: the method's products at the rate of torch's fastest product and its exponentials at that of "
        f'torch\'s on one array in the cache. "2 products": two bare N x N x {D} products of torch.mm. Peak memory is '
        "above the inputs. "
        'pytorch-metric-learning\'s SupConLoss has no centres and no "inside": it does less than CCL.'
    )


def _provenance(row: dict, source: str, link: str) -> str:
    return (
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, Python {row['python']}, "
        f"{row['date'][:10]}, commit {row['commit'][:10]}; [{source}]({link})."
    )
