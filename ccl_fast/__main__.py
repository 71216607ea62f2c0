"""`python -m ccl_fast`: the versions, and which backends run here, or why not. With arguments: `ccl-fast`.

So that `torchrun -m ccl_fast train ...` trains on several processes.
"""

import platform
import sys

import torch

from ccl_fast.ops.backends import BACKENDS, Backend
from ccl_fast.version import __version__

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def main() -> None:
    print(f"ccl_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        print(f"\n{device}{name}")
        for operator, backends in BACKENDS.items():
            for name, backend in backends.items():
                print(f"  {operator}, {name:9} {_verdict(device, backend)}")


def _verdict(device: torch.device, backend: Backend) -> str:
    obstacles = backend.obstacles
    runs = [_name(dtype) for dtype in DTYPES if not obstacles(device, dtype)]
    if not runs:
        return f"does not run: {'; '.join(obstacles(device, torch.float32))}"
    fails = [f"not {_name(dtype)}: {'; '.join(r)}" for dtype in DTYPES if (r := obstacles(device, dtype))]
    return "; ".join([f"runs {', '.join(runs)}", *fails])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _command() -> int:
    try:
        from ccl_fast.training.command import main as command
    except ModuleNotFoundError as missing:
        print(f"{missing}; try: pip install 'ccl-fast[train]'", file=sys.stderr)
        return 1
    return command()


if __name__ == "__main__":
    sys.exit(_command() if sys.argv[1:] else main())
