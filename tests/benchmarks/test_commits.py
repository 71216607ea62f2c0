"""Two commits are compared only where the tests of both pass, in turns, and leave nothing behind.

In a small repository whose clock is its own: a step takes as many seconds as its commit says.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from benchmarks import commits
from benchmarks.commits import CompareError
from tests import ROOT

FILES = {
    "ccl_fast/__init__.py": """
        import os, time

        SECONDS, NOW = 1.0, 0.0
        time.perf_counter = lambda: NOW
        print("what a library prints is no answer")

        def work():
            global NOW
            NOW += SECONDS
            if "TURNS" in os.environ:
                with open(os.environ["TURNS"], "a") as file:
                    file.write(f"{SECONDS:g} ")
        """,
    "benchmarks/__init__.py": "",
    "benchmarks/cases.py": """
        from typing import NamedTuple

        class Size(NamedTuple):
            n: int
            d: int
            dtype: object
            clusters: int

        class Case:
            def inputs(self, size, device):
                return size

            def step(self, run, inputs):
                return lambda: run(inputs)

        CASES = {"ccl": Case()}
        """,
    "benchmarks/contenders.py": """
        import os
        import signal
        import time

        import ccl_fast

        def interrupt():
            os.kill(os.getppid(), signal.SIGINT)
            time.sleep(1000)

        class Ours:
            def build(self, case):
                return lambda size: ccl_fast.work()

        CONTENDERS = {"ours": Ours()}
        """,
    "benchmarks/timing.py": """
        def step_of(run, case, inputs):
            return lambda: run(inputs)
        """,
    "tests/test_ccl_loss.py": """
        import ccl_fast

        def test_right():
            assert ccl_fast.SECONDS > 0
        """,
    "tests/test_nothing.py": """
        def test_nothing():
            pass
        """,
    # All that the worker asks of it; the real one takes seconds to import.
    "torch.py": """
        import os, sys

        sys.path += os.environ.get("INSTALLED", "").split()
        float32, device = "float32", str

        class cuda:
            is_available = staticmethod(lambda: False)
        """,
}
CASES, PACKAGE, TEST = "benchmarks/cases.py", "ccl_fast/__init__.py", "tests/test_ccl_loss.py"
# What other commits than the first have otherwise: file, old text (None: all of the file), new text.
COMMITS = {
    "base": (PACKAGE, "", ""),
    "slow": (PACKAGE, "SECONDS, NOW = 1.0", "SECONDS, NOW = 3.0"),
    "wrong": (PACKAGE, "SECONDS, NOW = 1.0", "SECONDS, NOW = -1.0"),
    "wrong too": (TEST, "> 0", "< 0"),
    "uncollectable": (TEST, "import ccl_fast", "import nothing_of_that_name"),
    "more": (CASES, '{"ccl": Case()}', '{"ccl": Case(), "clip": Case()}'),
    "raising": ("benchmarks/contenders.py", "ccl_fast.work()", "1 / 0"),
    "dying": ("benchmarks/contenders.py", "ccl_fast.work()", "__import__('os')._exit(7)"),
    "interrupting": ("benchmarks/contenders.py", "ccl_fast.work()", "interrupt()"),
    "old": (CASES, "def step(self, run, inputs)", "def before_it_had_steps(self)"),
    "without benchmarks": (CASES, None, None),
    "without tests": (TEST, None, None),
    "without package": (PACKAGE, None, None),
}


def dedent(text):
    return re.sub(r"^        ", "", text.strip("\n"), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """With a tag for each of COMMITS, checked out at the first."""
    root = tmp_path_factory.mktemp("repository")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("GIT_")]:
            patch.delenv(name)  # of a hook that runs these tests, and that would be of another repository
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
        patch.setattr(commits, "PAUSE", 0)

        def git(*arguments):
            options = "-c", "user.name=a", "-c", "user.email=a@b.c"
            subprocess.run(["git", *options, *arguments], cwd=root, check=True, capture_output=True)

        git("init")
        for tag, (changed, old, new) in COMMITS.items():
            for name, text in FILES.items():
                (root / name).parent.mkdir(exist_ok=True)
                (root / name).write_text(dedent(text))
            if old is None:
                (root / changed).unlink()
            else:
                text = (root / changed).read_text()
                assert old in text
                (root / changed).write_text(text.replace(old, new, 1))
            git("add", "--all")
            git("commit", "--allow-empty", "-m", tag)
            git("tag", tag.replace(" ", "-"))
        git("checkout", "base")
        yield root


@pytest.fixture
def compare(repository, tmp_path, monkeypatch):
    """Compares in the small repository; afterwards there is one worktree, and nothing is left of the others."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(commits, "ROOT", repository)

    def run(a, b, **options):
        return commits.compare(a, b, **{"only": "losses", "sizes": [128], "seconds": 0} | options)

    yield run
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, check=True, capture_output=True, text=True)
    assert len(worktrees.stdout.splitlines()) == 1 and not list(folder.iterdir())


@pytest.fixture
def time(compare, monkeypatch):
    """Compares without the tests."""
    monkeypatch.setattr(commits, "_test", lambda *_: [])
    return compare


def line(report, case="ccl"):
    """The cells of a case."""
    (found,) = (text for text in report.splitlines() if text.startswith(f"{case} "))
    return re.split("  +", found)


@pytest.mark.parametrize(
    "a, b, cells",
    [
        ("base", "slow", ["1000 ms", "3000 ms", "3.000", "3.000..3.000", "B is slower"]),
        ("slow", "base", ["3000 ms", "1000 ms", "0.333", "0.333..0.333", "B is faster"]),
        ("old", "base", ["1000 ms", "1000 ms", "1.000", "1.000..1.000"]),
    ],
)
def test_the_ratio_is_of_b_to_a(time, a, b, cells):
    assert line(time(a, b)) == ["ccl", "128", "128", "128", *cells]


def test_the_report_begins_with_what_the_tests_say(compare):
    a, b, load, *_ = compare("base", "slow").splitlines()
    assert re.fullmatch(r"A \(base, \w{10}\): 1 passed in .*s", a)
    assert re.fullmatch(r"B \(slow, \w{10}\): 1 passed in .*s", b)
    assert re.fullmatch(r"load \d+\.\d on \d+ cores", load)


def test_turns_alternate(time, monkeypatch, tmp_path):
    monkeypatch.setenv("TURNS", str(tmp_path / "turns"))
    time("base", "slow")
    turns = (tmp_path / "turns").read_text().split()
    assert turns[:10] == ["1", "3", *"13311331"] and len(turns) == 2 * (1 + commits.LEAST_ROUNDS)  # 1: warm-up


@pytest.mark.parametrize(
    "a, b, said",
    [
        ("wrong", "base", r"A \(wrong, .*1 failed.*\n  FAILED tests/test_ccl_loss.py::test_right.*\nB \(.*1 passed"),
        ("base", "wrong", r"A \(.*1 passed.*\nB \(wrong, .*1 failed.*\n  FAILED tests/test_ccl_loss.py::test_right"),
        ("base", "uncollectable", r"B \(uncollectable, .*\n  ERROR tests/test_ccl_loss.py"),
    ],
)
def test_nothing_is_timed_while_a_test_fails(compare, monkeypatch, a, b, said):
    monkeypatch.setattr(commits, "_worker", lambda side: pytest.fail("a worker was started"))
    with pytest.raises(CompareError, match=said):
        compare(a, b)


def test_other_tests_may_be_named(compare):
    assert "A (wrong-too, " in compare("wrong-too", "base", tests=["tests/test_nothing.py"])
    with pytest.raises(CompareError, match=r"not found: .*tests/test_of_nowhere\.py"):
        compare("base", "slow", tests=["tests/test_of_nowhere.py"])


@pytest.mark.parametrize("a, b, lacks", [("base", "more", "A"), ("more", "base", "B")])
def test_a_case_that_one_commit_lacks_is_a_line_that_says_so(time, a, b, lacks):
    report = time(a, b)
    assert re.fullmatch(rf"{lacks} \(base, .*\): no such case", line(report, "clip")[-1])
    assert "ms" in line(report)[4] and "ms" not in "".join(line(report, "clip"))


def test_cases_may_be_named(time):
    assert not any(text.startswith("clip") for text in time("more", "more", cases=["ccl"]).splitlines())


def test_a_case_that_raises_is_a_line_that_says_so(time):
    assert re.fullmatch(r"B \(raising, .*\): ZeroDivisionError: division by zero", line(time("base", "raising"))[-1])


def test_the_working_tree_has_its_changes(compare, repository):
    package = repository / PACKAGE
    before = package.read_text()
    try:
        package.write_text(before.replace("SECONDS, NOW = 1.0", "SECONDS, NOW = 5.0"))
        report = compare("HEAD", ".")
        assert "SECONDS, NOW = 5.0" in package.read_text()
    finally:
        package.write_text(before)
    assert line(report)[4:7] == ["1000 ms", "5000 ms", "5.000"] and "B (working tree, " in report


def test_rows_are_appended_to_a_file_of_their_own(time, tmp_path):
    first = Path(time("base", "slow", output=tmp_path).splitlines()[-1])
    text = first.read_text()
    second = Path(time("base", "more", output=tmp_path).splitlines()[-1])
    assert {first, second} == set(tmp_path.glob("*.jsonl")) and first.read_text() == text
    a, b = map(json.loads, text.splitlines())
    assert a["contender"][0] == "A" and b["contender"][0] == "B" and "slow" in b["timed"]
    assert (a["case"], a["n"], a["d"], a["clusters"], a["p50"], a["to_a"]) == ("ccl", 128, 128, 128, 1.0, [1, 1, 1])
    assert b["p20"] == b["p50"] == b["p80"] == 3.0 and b["to_a"] == [3, 3, 3]
    assert a["repetitions"] == commits.LEAST_ROUNDS and a["device"] and a["torch"] and a["commit"] and a["date"]
    notes = [json.loads(row)["note"] for row in second.read_text().splitlines()]
    assert notes == ["", "", "no such case", ""]


@pytest.mark.parametrize(
    "a, b, said",
    [
        ("base", "no-such-commit", "expected a commit of .*, or . for its working tree, came 'no-such-commit'"),
        ("without-benchmarks", "base", "expected commits with benchmarks/cases.py, came 'without-benchmarks' without"),
        ("base", "without-tests", r"B \(without-tests, .*\): expected some of tests/test_streaming_.*, came none"),
    ],
)
def test_a_commit_that_cannot_be_compared_is_named(compare, a, b, said):
    with pytest.raises(CompareError, match=said):
        compare(a, b)


@pytest.mark.parametrize(
    "b, options, said",
    [
        ("slow", {"cases": ["clip"]}, r"case: expected some of \['ccl'\], came \['clip'\]"),
        ("slow", {"only": "kmeans", "sizes": []}, r"case: expected some of \[\], came \[\]"),
        ("slow", {"sizes": [128, 129]}, r"n: expected even numbers, at least 128, came \[129\]"),
        ("slow", {"sizes": [64]}, r"n: expected even numbers, at least 128, came \[64\]"),
        ("dying", {}, r"B \(dying, .*\): its process died with 7 at \('prepare', "),
    ],
)
def test_what_cannot_be_timed_is_named(time, b, options, said):
    with pytest.raises(CompareError, match=said):
        time("base", b, **options)


def test_the_installed_package_is_never_taken_for_that_of_a_commit(time, monkeypatch, tmp_path, capfd):
    installed = tmp_path / "installed" / "ccl_fast" / "__init__.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("def work(): pass")
    monkeypatch.setenv("INSTALLED", str(tmp_path / "installed"))
    with pytest.raises(CompareError, match=r"B \(without-package, .*\): its process died with 1"):
        time("base", "without-package")
    assert f"came {installed}" in capfd.readouterr().err


def test_an_interrupt_leaves_no_process_and_no_worktree(time, monkeypatch):
    """While a step runs that takes long. The worktrees are looked for by `compare`."""
    started, popen = [], subprocess.Popen

    class Popen(popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    monkeypatch.setattr(subprocess, "Popen", Popen)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            time("base", "interrupting")
    finally:
        signal.signal(signal.SIGINT, before)
    workers = [process for process in started if "-c" in process.args]
    assert [process.returncode for process in workers] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("part", commits.PARTS.values(), ids=commits.PARTS)
def test_the_parts_have_the_files_that_they_name(part):
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in part.tests + part.gpu_tests)


def test_a_worker_times_the_benchmarks_of_this_repository():
    """As they are, with the real torch."""
    with commits._worker(commits.Side("A (here)", "A", ROOT)) as ask:
        for part, case in zip(commits.PARTS.values(), ("ccl", "k-means iteration"), strict=True):
            assert case in ask("names", part.modules)
            assert ask("prepare", part.modules, case, 64, 16, 8, "cpu", "float32") == ""
            assert ask("seconds", 0) > 0
        assert "no such case" in ask("prepare", "benchmarks.", "nothing", 64, 16, 8, "cpu", "float32")
