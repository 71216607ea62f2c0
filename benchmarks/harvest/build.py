"""The CUDA extension for the GPU that is here, into the package; in a dry run its emulation."""

import shutil
import subprocess
import sys
import time

from benchmarks.harvest import ROOT
from benchmarks.harvest.run import Harvest
from tests.kernels import emulated


def run(harvest: Harvest) -> None:
    start = time.monotonic()
    if harvest.dry_run:
        module = emulated.compiled("_cuda_emulated", "-DCCL_FAST_EMULATE=ON")
    else:
        module = emulated.compiled_by_nvcc("_cuda", _architecture())
        shutil.copy(module, ROOT / "ccl_fast")
    harvest.line(case="build", name=module.name, seconds=time.monotonic() - start)


def use_emulation(harvest: Harvest) -> None:
    """In a dry run the extension is the emulated one."""
    if harvest.dry_run:
        from ccl_fast.kernels import extension

        extension.module = emulated.build()


def _architecture() -> str:
    """Such as "90", without the seconds that importing torch takes, where nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()[0]
        return str(int(said.replace(".", "")))
    except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
        print(f"nvidia-smi does not tell the architecture ({error!r})", file=sys.stderr)
        import torch

        return "{}{}".format(*torch.cuda.get_device_capability())
