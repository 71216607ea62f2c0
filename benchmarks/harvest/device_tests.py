"""The tests that run kernels on the device, by many processes; and in the second call those that failed."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harvest import ROOT
from benchmarks.harvest.run import Harvest, Skipped

FIRST = ROOT / "build" / "harvest" / "first"  # where harvest.sh leaves what the second call wants to know
FIXTURES = re.compile(r"\b(kernel_device|kmeans_device)\b")  # by which a test says that it runs kernels
PROCESSES, DRY_PROCESSES = 14, 2
# Of a dry run: two quick ones.
DRY = ["tests/ops/test_streaming_logsumexp_triton.py", "-k", "broadcast_gradient or wide_and_negative"]
ENDING = 6.0  # seconds that pytest has to write its reports once it is told to end


def run(harvest: Harvest) -> None:
    _pytest(harvest, DRY if harvest.dry_run else files(), "short", DRY_PROCESSES if harvest.dry_run else PROCESSES)


def run_failed(harvest: Harvest) -> None:
    """Of the second call."""
    failed = failures(FIRST / "junit.xml")
    if not failed:
        raise Skipped("no test of the first call failed")
    _pytest(harvest, failed, "long", PROCESSES)


def files() -> list[str]:
    """Without the offline compiles and the builds of the emulation, which need no device."""
    return [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if FIXTURES.search(path.read_text())
    ]


def failures(report: Path) -> list[str]:
    """The names of the tests that failed by a report of pytest, as pytest takes them."""
    try:
        cases = ElementTree.parse(report).iter("testcase")
    except (OSError, ElementTree.ParseError):
        return []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    return [f"{case.get('classname').replace('.', '/')}.py::{case.get('name')}" for case in failed]


def _pytest(harvest: Harvest, what: list[str], traceback: str, processes: int) -> None:
    command = [sys.executable, "-m", "pytest", *what, "-v", "-p", "no:cacheprovider", f"--tb={traceback}"]
    command.append(f"--junitxml={harvest.out / 'junit.xml'}")
    optional = {"xdist": ["-n", str(processes), "--dist", "loadgroup"], "pytest_timeout": ["--timeout=120"]}
    for package, options in optional.items():
        if importlib.util.find_spec(package):
            command += options
        else:
            print(f"without {' '.join(options)}: {package} is not installed")
    # A shell's background processes ignore interrupts, and so would pytest.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # most tests are small, and there are many processes
    with (harvest.out / "pytest.log").open("a") as log:
        log.write(f"{' '.join(command)}\n")
        log.flush()
        running = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            status = running.wait(timeout=max(1.0, harvest.left - ENDING))
        except subprocess.TimeoutExpired:
            running.send_signal(signal.SIGINT)  # it still writes what it knows
            running.wait(timeout=ENDING)
            raise SystemExit("pytest was ended: its time was spent") from None
    if status:
        raise SystemExit(f"pytest ended with {status}")
