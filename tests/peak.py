"""How much memory a step takes, in a process of its own."""

import subprocess
import sys

from tests import ROOT

CODE = """
import torch
from benchmarks.harness.memory import forget_peak, status
{definition}

def peak(*sizes):
    run = prepare(*sizes)
    before = forget_peak()
    run()
    return status("VmHWM") - before

peak(*{warm_up})
print(peak(*{sizes}))
"""


def peak_bytes(definition: str, sizes: tuple[int, ...], warm_up: tuple[int, ...]) -> int:
    """Bytes above the inputs that a step takes.

    Args:
        definition: of a function ``prepare(*sizes)`` that makes the inputs and returns the step.
        sizes: of the step that counts.
        warm_up: of one before, which loads libraries and starts threads.
    """
    code = CODE.format(definition=definition, warm_up=warm_up, sizes=sizes)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(result.stdout)
