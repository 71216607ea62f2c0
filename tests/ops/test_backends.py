"""Choosing a backend, and saying why."""

import math
import subprocess
import sys
from typing import get_args

import pytest
import torch

from ccl_fast.ops.backends import BACKENDS, Backend, ContrastBackend, KMeansBackend, choose_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def kernel(monkeypatch):
    """Obstacles of the backend "kernel" of an operator "op", made for CUDA, before "plain", which runs anywhere."""
    reasons = []
    backends = {"kernel": Backend(math, lambda device, dtype: reasons, native="cuda"), "plain": Backend(math)}
    monkeypatch.setitem(BACKENDS, "op", backends)
    return reasons


def test_auto_takes_the_first_that_runs(kernel):
    assert choose_backend("op", "auto", CUDA, torch.float32) == "kernel"
    kernel.append("no")
    assert choose_backend("op", "auto", CUDA, torch.float32) == "plain"


def test_auto_never_takes_the_interpreter(kernel):
    assert choose_backend("op", "auto", CPU, torch.float32) == "plain"
    assert choose_backend("op", "kernel", CPU, torch.float32) == "kernel"


def test_a_backend_that_cannot_run_lists_its_reasons(kernel):
    kernel += ["too old", "too cold"]
    with pytest.raises(ValueError, match=r"'kernel' cannot run op on cpu with torch\.float64: too old; too cold"):
        choose_backend("op", "kernel", CPU, torch.float64)


def test_types_name_the_backends_of_the_table():
    for operator, backends in BACKENDS.items():
        requested = ContrastBackend if operator == "streaming_logsumexp" else KMeansBackend
        assert get_args(requested) == ("auto", *backends)


def test_every_operator_runs_anywhere():
    for operator in BACKENDS:
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            assert choose_backend(operator, "auto", torch.device("meta"), dtype) == "blocked"


def test_the_module_prints_what_runs():
    done = subprocess.run([sys.executable, "-m", "ccl_fast"], capture_output=True, text=True, check=True)
    assert "streaming_logsumexp, blocked   runs float32, bfloat16, float16, float64" in done.stdout
    assert "streaming_logsumexp, triton" in done.stdout
