"""docs/systems.md: its table names every system once, and tests that exist; every system says the same things."""

import re

from tests import ROOT

PAGE = (ROOT / "docs" / "systems.md").read_text()
SECTIONS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^#|\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))


def test_the_table_has_every_system():
    rows = re.findall(r"^\| \[(.*?)\]\(#(.*?)\) \|", PAGE, flags=re.MULTILINE)
    assert [name for name, _ in rows] == list(SECTIONS)
    assert all(anchor == name.lower().replace(" ", "-") for name, anchor in rows)


def test_every_system_says_what_is_certain_here_not_here_and_what_it_costs():
    for name, section in SECTIONS.items():
        said = re.findall(r"^- \*\*(.*?)\*\*: ", section, flags=re.MULTILINE)
        assert said[:4] == ["Certainty", "Here", "Not here", "Cost"], name


def test_tests_that_are_named_exist():
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) == len(SECTIONS)
    for path, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(), (path, name)
