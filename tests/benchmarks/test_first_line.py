"""The wait for the first line is measured until that line, and what does not come is told."""

import json

import pytest

from benchmarks.training import first_line

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia"):
    pytest.importorskip(extra)  # the extra "train"


@pytest.mark.slow
def test_one_command_becomes_a_row_of_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(first_line, "COMMANDS", {"--help": first_line.COMMANDS["--help"]})
    assert "ccl-fast --help: first line" in first_line.run(1, tmp_path)
    (path,) = tmp_path.iterdir()
    (row,) = map(json.loads, path.read_text().splitlines())
    assert row["case"] == "ccl-fast --help: first line" and 0 < row["p50"] < 600 and row["repetitions"] == 1


@pytest.mark.slow
def test_train_is_followed_to_its_first_epoch():
    seconds = first_line.measure("train", first_line.COMMANDS["train"])
    assert list(seconds) == ["first line", "what is trained", "first epoch"]
    assert sorted(seconds.values()) == list(seconds.values())


@pytest.mark.slow
def test_a_line_that_does_not_come_is_told():
    with pytest.raises(RuntimeError, match="ccl-fast --nothing: no it"):
        first_line.measure("--nothing", {"it": "never"})
