"""Two commits of this repository against each other: first the tests of both, and only if they pass, their times."""

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.results import ResultsFile, Row
from benchmarks.timing import percentiles

ROOT = Path(__file__).parent.parent
D = 128
LEAST_ROUNDS = 20  # in one comparison of fewer, too many of equal commits would seem different by chance
TURN = 0.05  # seconds: a shorter step is repeated for as long
PAUSE = 0.02  # seconds before a turn: until then the threads of the other process may spin after their last work


class Part(NamedTuple):
    modules: str  # what the names of its modules, `cases` and `contenders`, begin with
    sizes: tuple[int, ...]
    clusters: int
    tests: tuple[str, ...]  # of what is compared
    gpu_tests: tuple[str, ...]  # where there is one


LOSS_TESTS = ("streaming_logsumexp", "same_id_similarity", "ccl_loss", "infonce_loss", "loss_contract")
KMEANS_TESTS = ("kmeans", "kmeans_assign", "kmeans_update")
PARTS = {
    "losses": Part("benchmarks.", (512, 2048, 8192), 128, LOSS_TESTS, ("streaming_logsumexp_triton",)),
    "kmeans": Part("benchmarks.kmeans_", (100_000,), 1000, KMEANS_TESTS, ("kmeans_kernels",)),
}


class CompareError(Exception):
    """Why two commits are not compared."""


class Side(NamedTuple):
    name: str  # A or B, and the commit
    row: str  # what stands for the contender in its rows
    tree: Path

    @property
    def place(self) -> dict:
        """Where its processes run: its packages come before those that are installed."""
        return {"cwd": self.tree, "env": os.environ | {"PYTHONPATH": str(self.tree)}, "text": True}


@dataclass
class SideRow(Row):
    timed: str = ""  # the side; "commit" is that of the benchmark
    to_a: tuple[float, float, float] | None = None  # time over A's: percentiles 20, 50, 80 over the rounds


def compare(
    a: str,
    b: str,
    only: str | None = None,
    cases: Sequence[str] = (),
    sizes: Sequence[int] = (),
    seconds: float = 8.0,
    tests: Sequence[str] = (),
    output: Path | None = None,
) -> str:
    """A table of the times of commits `a` and `b`; "." is the working tree with its changes.

    `only` names a part; `cases`, `sizes` (N) and `tests` (arguments of pytest) replace those of the parts; `seconds`
    are for each case and size; `output` is the folder of a results file. CompareError where there is nothing to
    compare, or where a test of either commit fails: then there are no times.
    """
    parts = [PARTS[only]] if only else list(PARTS.values())
    least = max(part.clusters for part in parts)
    if wrong := [n for n in sizes if n < least or n % 2]:
        raise CompareError(f"n: expected even numbers, at least {least}, came {wrong}")
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    with ExitStack() as stack:
        sides = [stack.enter_context(_side(letter, name)) for letter, name in (("A", a), ("B", b))]
        named = [f"tests/test_{x}.py" for part in parts for x in part.tests + part.gpu_tests * (device == "cuda")]
        report = [*_test(sides, named, tests), f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"]
        workers = [stack.enter_context(_worker(side)) for side in sides]
        known = {name: part for part in parts for ask in workers for name in ask("names", part.modules)}
        if not set(cases or known) <= set(known) or not known:
            raise CompareError(f"case: expected some of {list(known)}, came {list(cases)}")
        file = ResultsFile("compare", torch.device(device), output) if output else None
        lines = [("case", "N", "D", "K", "A", "B", "B / A", "p20..p80", "")]
        jobs = [(known[name], name, n) for name in cases or known for n in sizes or known[name].sizes]
        for part, name, n in jobs:
            rows = [SideRow(name, side.row, n, D, dtype, clusters=part.clusters, timed=side.name) for side in sides]
            for row, ask in zip(rows, workers, strict=True):
                row.note = ask("prepare", part.modules, name, n, D, part.clusters, device, dtype)
            if not any(row.note for row in rows):
                _time(workers, rows, seconds)
            if file:
                file.add(rows)
            lines.append(_line(*rows))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    report += ["", *("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)]
    return "\n".join([*report, *(["", str(file.path)] if file else [])])


@contextmanager
def _side(letter: str, name: str) -> Iterator[Side]:
    """A commit in a worktree that is gone afterwards."""
    is_here, shown = name == ".", "working tree" if name == "." else name
    try:
        commit = _git("rev-parse", "--verify", f"{'HEAD' if is_here else name}^{{commit}}")[:10]
    except CompareError:
        raise CompareError(f"expected a commit of {ROOT}, or . for its working tree, came {name!r}") from None
    with tempfile.TemporaryDirectory(prefix="ccl_fast-") as folder:
        tree = ROOT if is_here else Path(folder) / letter
        try:
            if not is_here:
                _git("worktree", "add", "--detach", tree, commit)
            if not (tree / "benchmarks" / "cases.py").exists():
                raise CompareError(f"expected commits with benchmarks/cases.py, came {name!r} without")
            yield Side(f"{letter} ({shown}, {commit})", f"{letter} {shown if is_here else commit}", tree)
        finally:
            if not is_here and tree.exists():
                _git("worktree", "remove", "--force", tree)


def _git(*arguments: str | Path) -> str:
    result = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, text=True)
    if result.returncode:
        raise CompareError(f"git {arguments[0]}: {result.stderr.strip()}")
    return result.stdout.strip()


def _test(sides: list[Side], named: list[str], wanted: Sequence[str]) -> list[str]:
    """What pytest says of each side; CompareError with the tests that fail. Old commits have not all that is named."""
    report, is_red = [], False
    for side in sides:
        tests = wanted or [test for test in named if (side.tree / test).exists()]
        if not tests:
            raise CompareError(f"{side.name}: expected some of {', '.join(named)}, came none")
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--color=no", "--tb=no", *tests]
        result = subprocess.run(command, capture_output=True, **side.place)
        said = (result.stdout + result.stderr).strip().splitlines() or ["pytest said nothing"]
        is_red |= result.returncode != 0
        report.append(f"{side.name}: {said[-1].strip(' =')}")
        report += [f"  {line}" for line in said if line.startswith(("FAILED", "ERROR"))]
    if is_red:
        raise CompareError("\n".join(["nothing is said of speed while tests fail", *report]))
    return report


@contextmanager
def _worker(side: Side) -> Iterator[Callable]:
    """A process with the code of a side; what it is asked with is yielded."""
    command, pipe = [sys.executable, "-c", f"{inspect.getsource(_serve)}\n_serve()"], subprocess.PIPE
    # In a session of its own: Ctrl-C is for this process, which then ends that one.
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True, **side.place)

    def ask(*request):
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=process.stdin, flush=True)
        if answer := process.stdout.readline():
            return json.loads(answer)
        raise CompareError(f"{side.name}: its process died with {process.wait()} at {request}")

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()  # closes the pipes


def _serve() -> None:
    """The worker answers requests, a line of JSON each, with the benchmarks of its commit as they are there.

    That commit need not have this file: the source of this function is all that the process is given.
    """
    import json
    import os
    import sys
    import time
    from importlib import import_module, util
    from statistics import median

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch

    import ccl_fast

    if not os.path.realpath(ccl_fast.__file__).startswith(os.getcwd() + os.sep):
        sys.exit(f"expected the ccl_fast of {os.getcwd()}, came {ccl_fast.__file__}")
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    step = None

    def names(modules):
        return list(import_module(f"{modules}cases").CASES) if util.find_spec(f"{modules}cases") else []

    def prepare(modules, name, n, d, clusters, device, dtype):
        """Why there is nothing to time, or nothing."""
        nonlocal step
        if name not in names(modules):
            return "no such case"
        try:
            case = import_module(f"{modules}cases").CASES[name]
            run = import_module(f"{modules}contenders").CONTENDERS["ours"].build(case)
            size = import_module("benchmarks.cases").Size(n, d, getattr(torch, dtype), clusters)
            inputs = case.inputs(size, torch.device(device))
            timing = import_module("benchmarks.timing")  # which made the steps before there were benchmarks of k-means
            step = case.step(run, inputs) if hasattr(case, "step") else timing.step_of(run, case, inputs)
            step()  # compiles and allocates
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def seconds(least):
        times, end = [], time.perf_counter() + least
        while not times or time.perf_counter() < end:
            wait()
            start = time.perf_counter()
            step()
            wait()
            times.append(time.perf_counter() - start)
        return median(times)

    for line in sys.stdin:
        command, *arguments = json.loads(line)
        answer = {"names": names, "prepare": prepare, "seconds": seconds}[command](*arguments)
        print(json.dumps(answer), file=answers, flush=True)


def _time(workers: list[Callable], rows: list[SideRow], seconds: float) -> None:
    """Rounds of a turn each, A B B A and so on, so that what drifts falls on both."""
    times, end = ([], []), time.perf_counter() + seconds
    while len(times[0]) < LEAST_ROUNDS or time.perf_counter() < end:
        for i in (0, 1) if len(times[0]) % 2 == 0 else (1, 0):
            time.sleep(PAUSE)
            times[i].append(workers[i]("seconds", TURN))
    for row, of_side in zip(rows, times, strict=True):
        row.repetitions = len(of_side)
        row.p20, row.p50, row.p80 = percentiles(of_side)
        row.to_a = percentiles([x / of_a for x, of_a in zip(of_side, times[0], strict=True)])


def _line(a: SideRow, b: SideRow) -> tuple[str, ...]:
    size = a.case, str(a.n), str(a.d), str(a.clusters)
    if b.to_a is None:
        return *size, "", "", "", "", "; ".join(f"{row.timed}: {row.note}" for row in (a, b) if row.note)
    low, ratio, high = b.to_a
    verdict = "B is slower" if low > 1 else "B is faster" if high < 1 else ""
    times = (f"{row.p50 * 1e3:.4g} ms" for row in (a, b))
    return *size, *times, f"{ratio:.3f}", f"{low:.3f}..{high:.3f}", verdict
