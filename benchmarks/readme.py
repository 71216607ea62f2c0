"""The README's table of measurements: generated from a results file, never typed."""

import json
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
SECTION = re.compile(r"<!-- measured(?:: (?P<source>\S+))? -->\n.*?<!-- /measured -->\n", re.DOTALL)
CASES = ("ccl", "ccl inside", "supcon", "nt-xent")
CONTENDERS = ("ours", "dense", "dense compiled", "metric-learning SupCon")


def update(results: Path, readme: Path = README) -> None:
    """Replace the section between the markers by that of a results file of `python -m benchmarks cpu`."""
    readme.write_text(SECTION.sub(lambda _: section(results), readme.read_text()))


def section(results: Path) -> str:
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    source = results.resolve().relative_to(README.parent).as_posix()
    return "\n".join(
        (f"<!-- measured: {source} -->", *_table(rows), "", _provenance(rows[0], source), "<!-- /measured -->\n")
    )


def _table(rows: list[dict]) -> list[str]:
    by_key = {(r["case"], r["n"], r["contender"]): r for r in rows}
    lines = [
        "| case | N | ccl_fast | / 2 products | dense | compiled | pytorch-metric-learning | peak: ours | dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        for n in sorted({r["n"] for r in rows if r["case"] == case}):
            ours, *others = (by_key.get((case, n, contender), {}) for contender in CONTENDERS)
            products = f"{ours['to_products']:.2f}" if ours.get("to_products") else "-"
            cells = [
                case,
                f"{n:,}",
                _time(ours["p50"]),
                products,
                *map(_rival, others),
                _memory(ours),
                _memory(others[0]),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _rival(row: dict) -> str:
    if row.get("p50"):
        return f"{_time(row['p50'])} ({row['to_ours']:.1f}x)"
    return "does not fit" if "would take" in row.get("note", "") else "-"


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def _memory(row: dict) -> str:
    return f"{row['peak_bytes'] / 2**20:,.0f} MiB" if row.get("peak_bytes") is not None else "-"


def _provenance(row: dict, source: str) -> str:
    d = row["d"]
    return (
        f"Forward and backward, D = {d}, {row['dtype']}, median of interleaved runs; in brackets the median ratio to "
        f'ccl_fast. "2 products": two bare N x N x {d} matrix products. Peak memory is above the inputs. '
        f'pytorch-metric-learning\'s SupConLoss has no centres and no "inside": it does less than CCL. '
        f"{row['device']}, {row['threads']} threads, torch {row['torch']}, Python {row['python']}, "
        f"{row['date'][:10]}, commit {row['commit'][:10]}; [{source}]({source})."
    )
