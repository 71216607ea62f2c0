"""The benchmarks run, refuse what is wrong, and the README's figures come from a committed file."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks is a folder of the repository, not an installed package

from benchmarks import readme  # noqa: E402
from benchmarks.cases import CASES, Size  # noqa: E402
from benchmarks.contenders import CONTENDERS  # noqa: E402
from benchmarks.correctness import is_wrong, relative_error  # noqa: E402
from benchmarks.memory import bar, peak_on_cpu  # noqa: E402


@pytest.mark.parametrize("case", CASES)
def test_contenders_agree_with_float64_before_they_are_timed(case):
    size, cpu = Size(96, 16, clusters=5), torch.device("cpu")
    for name in {"ours", "dense", "metric-learning SupCon"} & set(CASES[case].contenders):
        if not CONTENDERS[name].obstacle(size, cpu):
            error = relative_error(CONTENDERS[name], CASES[case], size, cpu)
            assert not is_wrong(error, size), f"{name}: {error}"


def test_a_wrong_contender_is_found_out():
    from dataclasses import replace

    wrong = replace(CONTENDERS["ours"], build=lambda case: lambda x: case.loss()(*x) * 1.01)
    size = Size(96, 16, clusters=5)
    assert is_wrong(relative_error(wrong, CASES["ccl"], size, torch.device("cpu")), size)


def test_peak_memory_is_linear_and_within_the_bar():
    """One forward and backward at N = 32,768 in a process of its own: an N x N array alone would be 4 GiB."""
    size = Size(32_768, 128)
    peak = peak_on_cpu(CASES["ccl"], "ours", size)
    assert peak is not None and 0 < peak <= bar(size), f"{peak / 2**20:.0f} MiB above the inputs"


def test_the_gpu_run_walks_its_path_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--output", tmp_path, "gpu", "--dry-run"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (file,) = tmp_path.glob("*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    ours = [r for r in rows if r["contender"] == "ours"]
    assert ours and all(r["p50"] > 0 and not r["note"] for r in ours)


def test_the_readme_table_is_that_of_the_file_it_names():
    found = readme.SECTION.search(readme.README.read_text())
    assert found and found["source"]
    assert found[0] == readme.section(ROOT / found["source"])
    assert not re.search(r"H100|H200|A100", found[0]), "a GPU figure needs a GPU results file"
