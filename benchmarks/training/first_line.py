"""How long a user waits for the first words: of ``ccl-fast --help``, and of ``ccl-fast train`` on digits.

Every measurement is a process of its own, begun with warm disk caches: the first one does not count.
"""

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness.results import DIRECTORY, ResultsFile, Row, table

IMAGES = 512  # digits, drawn at random
TRAIN = ["train", f"--limit={IMAGES}", "--epochs=2", "--warmup-epochs=1", "--loggers=[]"]
# What is begun, and by what is waited for which line.
COMMANDS = {
    "--help": {"first line": r"usage: "},
    "train --help": {"first line": r"usage: "},
    "train": {"first line": r"ccl-fast ", "what is trained": r"epochs of ", "first epoch": r"warm-up 1/1: loss "},
}


def run(repetitions: int = 7, directory: Path = DIRECTORY) -> str:
    """Measure, write a results file, and return a table of seconds."""
    rows = []
    for command, marks in COMMANDS.items():
        seconds = [measure(command, marks) for _ in range(repetitions + 1)][1:]
        for name in marks:
            p20, p50, p80 = np.quantile([of[name] for of in seconds], (0.2, 0.5, 0.8)).tolist()
            n = IMAGES if command == "train" else 0
            case = f"ccl-fast {command}: {name}"
            rows.append(Row(case, "ours", n, 0, "", p20=p20, p50=p50, p80=p80, repetitions=repetitions))
    file = ResultsFile("first-line", torch.device("cpu"), directory)
    file.add(rows)
    return f"{table(rows)}\n{file.path}"


def measure(command: str, marks: dict[str, str]) -> dict[str, float]:
    """Return the seconds until each line came; the process is then ended.

    Raises:
        RuntimeError: it ended before.
    """
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        of_train = [*TRAIN, f"--output={folder}/run"]
        arguments = of_train if command == "train" else command.split()
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "ccl_fast", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stderr is not None
        for line in process.stdout:
            found |= {
                name: time.perf_counter() - start
                for name, mark in marks.items()
                if name not in found and re.match(mark, line)
            }
            if found.keys() == marks.keys():
                break
        process.kill()
        errors = process.communicate()[1]
    if found.keys() != marks.keys():
        raise RuntimeError(f"ccl-fast {command}: no {', '.join(marks.keys() - found.keys())}\n{errors}")
    return found
