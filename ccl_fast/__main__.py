"""`python -m ccl_fast`: the versions, and which backends run here, or why not. With arguments: `ccl-fast`.

So that `torchrun -m ccl_fast train ...` trains on several processes.
"""

import os
import platform
import sys

import torch

from ccl_fast.errors import MissingPackages, packages_of_training
from ccl_fast.ops.backends import BACKENDS, Backend
from ccl_fast.version import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> None:
    """Print which backends of which operators run on which device, and why the others do not."""
    print(f"ccl_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    width = max(len(f"{operator}, {name}") for operator, backends in BACKENDS.items() for name in backends)
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        print(f"\n{device}{name}")
        for operator, backends in BACKENDS.items():
            for name, backend in backends.items():
                print(f"  {f'{operator}, {name}':{width}} {_verdict(device, backend)}")


def _verdict(device: torch.device, backend: Backend) -> str:
    obstacles = backend.obstacles
    runs = [_name(dtype) for dtype in DTYPES if not obstacles(device, dtype)]
    if not runs:
        return f"does not run: {'; '.join(obstacles(device, torch.float32))}"
    fails = [f"not {_name(dtype)}: {'; '.join(r)}" for dtype in DTYPES if (r := obstacles(device, dtype))]
    return "; ".join([f"runs {', '.join(runs)}", *fails])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def command() -> int:
    """``ccl-fast``; without its packages a line that says what to install, and 1."""
    for number in (0, 1, 2):
        # Where the caller has closed one, the next file that is opened would get its number, and what is printed.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    try:
        with packages_of_training():
            from ccl_fast.commands.command_line import main as run_command
        return run_command()
    except MissingPackages as missing:
        print(f"ccl-fast: {missing}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(command() if sys.argv[1:] else main())
