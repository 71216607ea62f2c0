"""The benchmarks run, refuse what is wrong, and the README's figures come from committed files."""

import json
import re
import subprocess
import sys

import pytest
import torch

from benchmarks.clustering import cases as kmeans_cases
from benchmarks.clustering import contenders as kmeans_contenders
from benchmarks.clustering import correctness as kmeans_correctness
from benchmarks.clustering import kmeans
from benchmarks.harness.contender import Size
from benchmarks.harness.memory import bar, peak_on_cpu
from benchmarks.losses import distributed, objectives
from benchmarks.losses.cases import CASES
from benchmarks.losses.contenders import CONTENDERS, find
from benchmarks.losses.correctness import is_wrong, relative_error
from benchmarks.pages import readme, scaling
from tests import ROOT
from tests.tolerance import OF_TORCH_2_11


@pytest.mark.parametrize("case", CASES)
def test_contenders_agree_with_float64_before_they_are_timed(case):
    size, cpu = Size(96, 16, clusters=5), torch.device("cpu")
    for name in set(CASES[case].contenders) - {"dense compiled"}:  # the same, a minute later
        if not CONTENDERS[name].obstacle(size, cpu):
            error = relative_error(CONTENDERS[name], CASES[case], size, cpu)
            assert not is_wrong(error, size), f"{name}: {error}"


def test_a_wrong_contender_is_found_out():
    from dataclasses import replace

    wrong = replace(CONTENDERS["ours"], build=lambda case: lambda x: case.loss()(*x) * 1.01)
    size = Size(96, 16, clusters=5)
    assert is_wrong(relative_error(wrong, CASES["ccl"], size, torch.device("cpu")), size)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_objectives_agree_with_their_dense_form_in_float64_before_they_are_timed(name):
    objective, cpu = objectives.OBJECTIVES[name], torch.device("cpu")
    for contender in objective.contenders.values():
        if not contender.obstacle(objectives.ADMISSION, cpu):
            error = objective.error(contender, objectives.ADMISSION, cpu)
            assert not is_wrong(error, objectives.ADMISSION), f"{contender.name}: {error}"


def test_every_objective_of_the_family_is_measured():
    import ccl_fast.losses

    older = {"Loss", "CCLLoss", "SupConLoss", "InfoNCELoss", "NTXentLoss"}  # the base; these have cases of their own
    assert objectives.OBJECTIVES.keys() == {n for n in ccl_fast.losses.__all__ if n.endswith("Loss")} - older


def test_a_wrong_objective_is_found_out():
    from dataclasses import replace

    objective = objectives.OBJECTIVES["MEOWLoss"]
    ours = objective.contenders["ours"]
    wrong = replace(ours, build=lambda of: lambda x: ours.build(of)(x) * 1.01)
    assert is_wrong(objective.error(wrong, objectives.ADMISSION, torch.device("cpu")), objectives.ADMISSION)


@pytest.mark.slow
def test_the_run_of_the_family_fills_its_table_in_the_docs(tmp_path, monkeypatch):
    chosen = {name: objectives.OBJECTIVES[name] for name in ("SwAVLoss", "CACRLoss")}
    monkeypatch.setattr(objectives, "OBJECTIVES", chosen)
    objectives.run_cpu(True, tmp_path)
    (file,) = tmp_path.glob("*-cpu-objectives.jsonl")
    rows = list(map(json.loads, file.read_text().splitlines()))
    assert {r["objective"] for r in rows} == chosen.keys()
    assert all(r["p50"] > 0 for r in rows if r["contender"] in ("ours", "dense"))
    page = tmp_path / "objectives.md"
    page.write_text("<!-- measured objectives -->\nstale\n<!-- /measured objectives -->\n")
    readme.update(file, page)
    assert page.read_text() == readme.section(file, tmp_path) and "| `CACRLoss` |" in page.read_text()


@pytest.mark.parametrize("name", kmeans_contenders.CONTENDERS)
def test_kmeans_contenders_agree_with_float64_before_they_are_timed(name):
    contender, cpu = kmeans_contenders.CONTENDERS[name], torch.device("cpu")
    for size in kmeans.QUICK_SIZES:
        if reason := contender.obstacle(size, cpu):
            pytest.skip(reason)
        assert not is_wrong(kmeans_correctness.relative_error(contender, size, cpu), size)
        inputs = kmeans_cases.CASES["k-means fit"].inputs(size, cpu)
        wrong = kmeans_correctness.truth(inputs).wrong_labels(contender.assign(*inputs))
        assert wrong <= (0 if contender.ours else size.n // 1000)


@pytest.mark.parametrize("name", ["ours", "torch"])
def test_wrong_kmeans_labels_are_found_out(name):
    from dataclasses import replace

    contender, size = kmeans_contenders.CONTENDERS[name], kmeans.QUICK_SIZES[0]
    wrong = replace(contender, assign=lambda x, centers: contender.assign(x, centers).roll(1))
    assert is_wrong(kmeans_correctness.relative_error(wrong, size, torch.device("cpu")), size)


@pytest.mark.slow
def test_the_kmeans_run_fills_its_table_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.setattr(kmeans, "QUICK_SECONDS", 0.0)
    kmeans.run_cpu(True, tmp_path)
    (file,) = tmp_path.glob("*-cpu-kmeans.jsonl")
    ours = [r for r in map(json.loads, file.read_text().splitlines()) if r["contender"] == "ours"]
    assert {r["case"] for r in ours} == set(kmeans_cases.CASES)
    for row in ours:
        assert row["p50"] > 0 and row["floor"] > 0 and row["wrong_labels"] == 0 and not row["note"]
    page = tmp_path / "README.md"
    losses = "<!-- measured: a -->\nof the losses\n<!-- /measured -->\n"
    page.write_text(f"{losses}<!-- measured k-means -->\nstale\n<!-- /measured k-means -->\n")
    readme.update(file, page)
    assert page.read_text() == losses + readme.section(file, tmp_path)
    assert f"| {ours[0]['case']} |" in page.read_text()


@pytest.mark.slow
def test_the_run_of_several_processes_fills_its_table_in_the_docs(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "QUICK_SECONDS", 0.0)
    distributed.run_cpu(True, tmp_path)
    (file,) = tmp_path.glob("*-cpu-distributed.jsonl")
    rows = {r["contender"]: r for r in map(json.loads, file.read_text().splitlines())}
    assert rows.keys() == {*distributed.CONTENDERS, distributed.ALONE_NAME}
    size = distributed.QUICK_SIZES[0]
    for name, row in rows.items():
        assert row["p50"] > 0 and not row["note"], row
        assert row["processes"] == (1 if name == distributed.ALONE_NAME else distributed.PROCESSES)
        # The other process's rows, at least, and with all that goes with them less than twice as much.
        if name.startswith("ours") and row["processes"] > 1 and row["sent"]:
            hops = 2 if name == "ours ring" else 1
            assert 0.9 < row["sent"] / (hops * size.n / 2 * (4 * size.d + 8)) < 2
    page = tmp_path / "scaling.md"
    page.write_text("<!-- measured distributed -->\nstale\n<!-- /measured distributed -->\n")
    readme.update(file, page)
    assert page.read_text() == readme.section(file, tmp_path) and f"| {size.n:,} |" in page.read_text()


def test_the_plan_in_the_docs_is_what_the_command_prints():
    tables = scaling.plan(**{name: value for name, (value, _) in scaling.ASSUMED.items()})
    assert f"<!-- plan -->\n{tables}\n<!-- /plan -->" in readme.SCALING.read_text()


def test_the_plan_counts_what_the_losses_send():
    """The bytes of `tests/losses/test_distributed.py`, for embeddings of two bytes."""
    step = scaling.Step(rows=600, processes=2, width=128, tflops=100, gbytes=10)
    assert step.own == 300
    assert step.gather_bytes == 300 * (2 * 128 + 8) + 300 * 4.5 * 4
    assert step.ring_bytes == 2 * 300 * (2 * 128 + 8) + 300 * 4.5 * 4
    assert step.seconds == pytest.approx(3 * 2 * 600**2 * 128 / 2 / 1e14)


@pytest.mark.parametrize("n", [16_384, pytest.param(32_768, marks=pytest.mark.slow)])
def test_peak_memory_is_linear_and_within_the_bar(n):
    """One forward and backward in a process of its own: an N x N array alone would be 1 GiB, or 4.

    What the allocator keeps of freed memory comes on top, 20 MiB more in one process than in another: any may do.
    """
    size, peaks = Size(n, 128), []
    while len(peaks) < 4:
        peaks.append(peak_on_cpu(find, "ccl", "ours", size))
        if peaks[-1] is not None and 0 < peaks[-1] <= bar(size) + OF_TORCH_2_11:
            return
    pytest.fail(f"bytes above the inputs: {peaks}, expected at most {bar(size)}")


@pytest.mark.slow  # as `make gpu-dry-run` does
def test_the_gpu_run_walks_its_path_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--output", tmp_path, "gpu", "--dry-run"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    files = list(tmp_path.glob("*.jsonl"))
    assert len(files) == 5  # of the losses, the family, k-means, training, several processes
    for file in files:
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        ours = [r for r in rows if r["contender"] == "ours"]
        assert ours and all(r["p50"] > 0 and not r["note"] for r in ours)


def test_the_readme_tables_are_those_of_the_files_they_name():
    text = "".join(page.read_text() for page in (readme.README, *readme.PAGES.values()))
    found = list(readme.SECTION.finditer(text))
    assert len(found) == 9 == text.count("<!-- measured")
    for section in found:
        if section["source"]:
            assert section[0] in readme.section(ROOT / section["source"])
        else:
            assert "GPU" in section["what"] and "not measured yet" in section[0]
        of_a_gpu = "-gpu" in (section["source"] or "")
        assert of_a_gpu or not re.search(r"H100|H200|A100", section[0]), "a GPU figure needs a GPU results file"
