"""CPU seconds of tests and files, all processes that they start included: what a busy machine does not change.

python -m pytest -n 0 -p tests.cpu_seconds tests/training
"""

import collections

import psutil
import pytest

SHOWN = 40  # tests

_by_phase: dict[tuple[str, str], float] = {}


def cpu_seconds() -> float:
    """Of this process, of those that it has started and of those that have ended."""
    total = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # its parent has the time now
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _measure(item, phase: str):
    start = cpu_seconds()
    try:
        return (yield)
    finally:
        _by_phase[item.nodeid, phase] = cpu_seconds() - start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    return (yield from _measure(item, "setup"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    return (yield from _measure(item, "call"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item):
    return (yield from _measure(item, "teardown"))


def pytest_terminal_summary(terminalreporter) -> None:
    by_file = collections.Counter()
    for (name, _), seconds in _by_phase.items():
        by_file[name.partition("::")[0]] += seconds
    terminalreporter.section("CPU seconds")
    for (name, phase), seconds in collections.Counter(_by_phase).most_common(SHOWN):
        terminalreporter.write_line(f"{seconds:8.2f} {phase:8} {name}")
    for name, seconds in by_file.most_common():
        terminalreporter.write_line(f"{seconds:8.2f} {name}")
    terminalreporter.write_line(f"{sum(by_file.values()):8.2f} in all; {cpu_seconds():.2f} with collection")
