"""The worked examples: that each runs with a seed, repeats, and leaves a results file."""

import json
import math
import sys
import types
from importlib import import_module

import pytest

from benchmarks import worked

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = {"EPOCHS": 3, "WARM_UP": 3}


def test_every_run_is_a_line_of_a_new_file_and_a_figure_a_line_of_the_table(tmp_path, monkeypatch):
    example = types.SimpleNamespace(run=lambda seed: {"accuracy": 0.5 + seed / 4, "clusters": 3})
    monkeypatch.setitem(sys.modules, "benchmarks.worked.made_up", example)
    printed = worked.run(["made_up"], 2, tmp_path)
    (path,) = tmp_path.iterdir()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["example"], line["seed"], line["accuracy"], line["clusters"]) for line in lines] == [
        ("made_up", 0, 0.5, 3),
        ("made_up", 1, 0.75, 3),
    ]
    assert {"device", "torch", "scikit-learn", "python", "commit", "date", "cpu_seconds"} <= lines[0].keys()
    assert ["made_up", "accuracy", "0.625", "0.500..0.750", "2"] in [line.split() for line in printed.splitlines()]
    worked.run(["made_up"], 1, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", worked.names())
def test_an_example_gives_plain_figures_that_repeat(name, monkeypatch):
    example = import_module(f"benchmarks.worked.{name}")
    for option, value in SHORT.items():
        if hasattr(example, option):
            monkeypatch.setattr(example, option, value)
    figures = example.run(1)
    assert all(type(value) in (int, float) and math.isfinite(value) for value in figures.values())
    assert example.run(1) == figures
