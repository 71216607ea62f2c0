"""The table of objectives in docs/objectives.md, made from the docstrings: the summary of each class, and its Cost."""

import inspect
import re
from pathlib import Path

import ccl_fast.losses
import ccl_fast.metrics
from ccl_fast.losses import Loss

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
TABLE = re.compile(r"<!-- classes -->\n.*?<!-- /classes -->\n", re.DOTALL)
COST = re.compile(
    r"^Cost:\n    operators: (?P<operators>.*?)\.\n    units: (?P<units>.*?)\.\n\n", re.DOTALL | re.MULTILINE
)


def losses() -> dict[str, type[Loss]]:
    """All losses by name."""
    found = {name: getattr(ccl_fast.losses, name) for name in ccl_fast.losses.__all__}
    return {name: one for name, one in found.items() if inspect.isclass(one) and issubclass(one, Loss) and one != Loss}


def table() -> list[str]:
    """Return the lines of the table: the losses, then the measures that have a cost."""
    lines = ["| objective | in words | operator calls | cost |", "|---|---|---|---|"]
    lines += [_row(f"`{name}`", loss) for name, loss in losses().items()]
    measures = {name: getattr(ccl_fast.metrics, name) for name in ccl_fast.metrics.__all__}
    costed = {name: measure for name, measure in measures.items() if COST.search(inspect.getdoc(measure) or "")}
    return lines + [_row(f"`{name}` (`ccl_fast.metrics`)", measure) for name, measure in costed.items()]


def update(page: Path = PAGE) -> None:
    """Write the table anew into the page."""
    section = "\n".join(("<!-- classes -->", *table(), "<!-- /classes -->\n"))
    page.write_text(TABLE.sub(lambda _: section, page.read_text()))


def _row(name: str, documented: object) -> str:
    docstring = inspect.getdoc(documented) or ""
    cost = COST.search(docstring)
    if cost is None:
        raise ValueError(f'{name}: expected "Cost:" with "operators: ..." and "units: ..." in its docstring')
    summary = docstring.split("\n\n")[0]
    cells = (re.sub(r"\s+", " ", text).rstrip(".").replace("|", r"\|") for text in (summary, *cost.groups()))
    return f"| {name} | {' | '.join(cells)} |"
