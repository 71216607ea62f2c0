"""The script of a GPU's ten minutes: boxes, lines that are there whatever happens, and what its report finds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.harvest import __main__ as command
from benchmarks.harvest import device_tests, launches, losses, plan, report
from benchmarks.harvest.run import RESULTS, Harvest, read_lines
from tests import ROOT

pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning")
STAGES = {"environment", "wheels", "build", "warm", "smoke", "losses", "launches", "kmeans"}
STAGES |= {"profile", "sanitize", "tests"}

# In the place of Python: stages that hang with a child that will not end, fail, die, or cannot run here.
STAND_IN = """#!/usr/bin/env bash
echo "$3 $HARVEST_BOX" >>"$CALLS"
case $3 in
smoke) bash -c 'trap "" TERM; echo $$ >"$CALLS.child"; while :; do sleep 1; done' & wait ;;
losses) echo "what went wrong"; exit 1 ;;
kmeans) kill -SEGV $$ ;;
wheels) exit 77 ;;
report) echo "reported $*" ;;
*) echo "{\\"stage\\": \\"$3\\"}" >>"$OUT/results.jsonl" ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs one of the scripts with a stand-in for Python; (what it printed, its folder, the stages called)."""
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)

    def run(name="harvest.sh", seconds=60, **environment):
        out, calls = tmp_path / "out", tmp_path / "calls"
        given = {"OUT": out, "PYTHON": python, "CALLS": calls, "HARVEST_DRY_RUN": "1"} | environment
        done = subprocess.run(
            [ROOT / "benchmarks" / name, str(seconds)],
            env=os.environ | {key: str(value) for key, value in given.items()},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, out, calls.read_text().splitlines() if calls.exists() else []

    return run


def is_alive(pid: int) -> bool:
    """A process that has been killed but that nobody has waited for yet is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stage_that_hangs_or_fails_costs_its_box_and_nothing_else(script, tmp_path):
    begin = time.monotonic()
    done, out, calls = script(HARVEST_BOX_SMOKE=2, HARVEST_BOX_LOSSES=7)
    assert time.monotonic() - begin < 40
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == set(report.FILES)
    assert {name.split()[0] for name in calls} == STAGES | {"report"}
    assert "smoke 2" in calls and "losses 7" in calls  # a stage knows its box
    state = report.statuses(out)
    assert state["smoke"].startswith("timed out") and state["losses"].startswith("failed after")
    assert state["kmeans"].startswith("failed") and state["wheels"].startswith("skipped after")
    for stage in ("environment", "build", "warm", "launches", "profile", "sanitize", "tests"):
        assert state[stage].startswith("ok"), state
    assert "    | what went wrong" in (out / "stages.txt").read_text()
    child = int(Path(f"{tmp_path / 'calls'}.child").read_text())
    assert not is_alive(child)  # and nothing of it is left
    without = {"smoke", "losses", "kmeans", "wheels"}
    assert {line["stage"] for line in read_lines(out / RESULTS)} == STAGES - without


def test_stages_for_which_no_time_is_left_say_so(script):
    done, out, _ = script(seconds=3, HARVEST_BOX_SMOKE=60)
    assert done.returncode == 0, done.stderr
    state = report.statuses(out)
    assert state["smoke"].startswith("timed out")
    assert all(state[stage] == "skipped, no time is left" for stage in ("losses", "launches", "tests"))
    assert any("no time is left" in fault for fault in report.faults(out, ("tests",)))


def test_results_are_never_mixed_with_those_of_another_run(script, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / RESULTS).write_text('{"stage": "losses"}\n')
    done, out, calls = script()
    assert done.returncode == 1 and "name another folder" in done.stderr and not calls
    assert (out / RESULTS).read_text() == '{"stage": "losses"}\n'


def test_without_a_gpu_nothing_is_measured(script, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    done, _, calls = script(HARVEST_DRY_RUN="", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1 and "no GPU here" in done.stdout and not calls


@pytest.mark.parametrize("name", ("harvest.sh", "harvest2.sh"))
def test_the_scripts_call_stages_that_there_are(name, script):
    _, _, calls = script(name, HARVEST_BOX_SMOKE=1)
    called = {call.split()[0] for call in calls} - {"report"}
    assert called and called <= command.STAGES.keys()


# ---- the stages themselves; .ci/run walks through all of them


def harvest(stage: str, out: Path, seconds: float = 1000.0) -> Harvest:
    return Harvest(stage, out, dry_run=True, deadline=time.monotonic() + seconds)


@pytest.fixture
def one_of_each(monkeypatch):
    monkeypatch.setattr(plan, "PROBLEMS", (plan.Problem(100, 16), plan.Problem(200, 260, ids=True)))
    monkeypatch.setattr(plan, "CANDIDATES", {("backward_rows", 128): ((128, 64, 128, 4, 2), (64, 128, 128, 4, 3))})
    monkeypatch.setattr("benchmarks.harvest.rivals.run", lambda harvest: None)
    monkeypatch.setattr("ccl_fast.ops.logsumexp.triton.TRIANGLE_MIN_ROWS", 1)


@pytest.mark.slow
def test_every_case_of_a_stage_has_its_line(one_of_each, tmp_path):
    losses.run(harvest("losses", tmp_path))
    launches.run(harvest("launches", tmp_path))
    lines = read_lines(tmp_path / RESULTS)
    for stage, keys in (("losses", plan.loss_keys()), ("launches", plan.launch_keys())):
        of_stage = [line for line in lines if line["stage"] == stage]
        assert len(of_stage) == len(keys) > 2
        for key in keys:
            (line,) = (line for line in of_stage if key.items() <= line.items())
            assert line["p50"] > 0 and line["dry_run"] and not line["note"]
    launched = [line["launch"] for line in lines if line["stage"] == "launches"]
    assert launched[1:] == [[128, 64, 128, 4, 2], [64, 128, 128, 4, 3]] and launched[0] not in launched[1:]


def test_what_is_wrong_is_not_timed(one_of_each, tmp_path, monkeypatch):
    right = losses.streaming_logsumexp
    monkeypatch.setattr(losses, "streaming_logsumexp", lambda z, **options: right(z * 1.05, **options))
    losses.measure(harvest("losses", tmp_path), plan.PROBLEMS[0])
    lines = read_lines(tmp_path / RESULTS)
    assert len(lines) == 4 and all("wrong" in line["note"] and "p50" not in line for line in lines)


def test_a_case_that_raises_or_has_no_time_is_a_line_with_a_note(tmp_path):
    stage = harvest("losses", tmp_path)
    stage.record({"case": "a"}, lambda: 1 / 0)
    harvest("losses", tmp_path, seconds=0).record({"case": "b"}, dict)
    assert [line["note"] for line in read_lines(tmp_path / RESULTS)] == [
        "ZeroDivisionError: division by zero",
        "not started: the stage's time is spent",
    ]


def test_a_stage_whose_device_is_lost_goes_on_after_its_lines(tmp_path, monkeypatch):
    began_again = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: began_again.append(arguments[1:]))
    monkeypatch.setattr(Harvest, "device_is_lost", lambda self: True)
    monkeypatch.setenv("HARVEST_BOX", "1000")
    stage = harvest("losses", tmp_path, seconds=100)
    stage.record({"case": "a"}, lambda: 1 / 0)
    assert began_again == [["-m", "benchmarks.harvest", "losses"]]
    assert float(os.environ["HARVEST_BOX"]) <= 100  # no box of its own
    stage.record({"case": "a"}, lambda: pytest.fail("measured twice"))
    assert len(read_lines(tmp_path / RESULTS)) == 1


def test_the_tests_of_the_device_are_those_that_run_kernels():
    files = device_tests.files()
    assert "tests/ops/test_streaming_logsumexp_triton.py" in files and "tests/ops/test_kmeans_kernels.py" in files
    builds = ("test_triton_offline", "test_emulation", "test_build", "test_harvest")
    assert not any(name in file for name in builds for file in files)


def test_failed_tests_are_found_by_their_names(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 2])\ndef test_it(x): assert x == 2\n"
    )
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    quick = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run([*command, f"--junitxml={tmp_path / 'junit.xml'}", "test_two.py"], cwd=tmp_path, env=quick)
    assert device_tests.failures(tmp_path / "junit.xml") == ["test_two.py::test_it[a b]"]
    assert device_tests.failures(tmp_path / "none.xml") == []


def test_the_report_names_what_is_missing_and_what_is_wrong(tmp_path):
    for name in report.FILES:
        (tmp_path / name).touch()
    (tmp_path / "stages.txt").write_text(
        "stage losses: ok after 3 s of 100 s\nstage smoke: timed out after 3 s of 3 s\n"
    )
    (tmp_path / "smoke.jsonl").write_text(json.dumps({"stage": "smoke", "check": "NaN in a bias", "note": "finite"}))
    keys = plan.loss_keys()
    lines = [{"stage": "losses", **key, "note": "", "p50": 0.002} for key in keys[1:]]
    lines[0]["note"] = "RuntimeError: lost"
    lines.append({"stage": "launches", "kernel": "a", "tried": "(1, 2)", "note": "out of resources"})
    (tmp_path / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, complete = report.report(tmp_path, "losses", "smoke")
    assert not complete and "2.0000 ms" in text
    assert report.faults(tmp_path, ("losses", "smoke")) == [
        "stage smoke: timed out after 3 s of 3 s",
        "smoke: NaN in a bias: finite",
        "losses: no line of self-contrast ours forward graph n=65536 d=128",
        "losses: self-contrast ours forward eager n=65536 d=128: RuntimeError: lost",
    ]


def test_the_second_call_tries_the_best_launches_of_the_first_again(tmp_path, monkeypatch):
    tried = (("shipped", 1.0, ""), ("a", 3.0, ""), ("b", 2.0, ""), ("c", 0.5, ""), ("d", None, "out of resources"))
    keys = {"stage": "launches", "kernel": "backward_rows", "d": 128}
    lines = [
        keys | {"tried": x, "p50": p50, "note": note, "launch": [i, 64, 128, 4, 2]}
        for i, (x, p50, note) in enumerate(tried)
    ]
    (tmp_path / RESULTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(device_tests, "FIRST", tmp_path)
    again = {}
    monkeypatch.setattr(launches, "compare", lambda _, kernel, d, candidates: again.update({(kernel, d): candidates}))
    launches.run_best(harvest("best_launches", tmp_path))
    assert again["backward_rows", 128] == [(3, 64, 128, 4, 2), (2, 64, 128, 4, 2)]
