"""Choosing a backend, and saying why."""

import subprocess
import sys

import pytest
import torch

from ccl_fast.ops.backends import choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def backends(**obstacles):
    return {name: (lambda device, dtype, reasons=reasons: reasons) for name, reasons in obstacles.items()}


def test_auto_takes_the_first_that_runs():
    assert choose_backend("op", backends(triton=[], blocked=[]), "auto", CUDA, torch.float32) == "triton"
    assert choose_backend("op", backends(triton=["no"], blocked=[]), "auto", CUDA, torch.float32) == "blocked"


def test_auto_never_takes_the_interpreter():
    assert choose_backend("op", backends(triton=[], blocked=[]), "auto", CPU, torch.float32) == "blocked"
    assert choose_backend("op", backends(triton=[], blocked=[]), "triton", CPU, torch.float32) == "triton"


def test_a_backend_that_cannot_run_lists_its_reasons():
    with pytest.raises(ValueError, match=r"'triton' cannot run op on cpu with torch\.float64: too old; too cold"):
        choose_backend("op", backends(triton=["too old", "too cold"], blocked=[]), "triton", CPU, torch.float64)


def test_the_module_prints_what_runs():
    done = subprocess.run([sys.executable, "-m", "ccl_fast"], capture_output=True, text=True, check=True)
    assert "streaming_logsumexp, blocked   runs float32, bfloat16, float16, float64" in done.stdout
    assert "streaming_logsumexp, triton" in done.stdout
