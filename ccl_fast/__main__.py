"""`python -m ccl_fast`: the versions, and which backends run here, or why not."""

import platform

import torch

from ccl_fast.ops.streaming_logsumexp import BACKENDS
from ccl_fast.version import __version__

OPERATORS = {"streaming_logsumexp": BACKENDS}


def main() -> None:
    print(f"ccl_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    for device in devices:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        print(f"\n{device} ({name})")
        for operator, backends in OPERATORS.items():
            for backend, obstacles in backends.items():
                for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                    reasons = obstacles(device, dtype)
                    verdict = "runs" if not reasons else f"does not run: {'; '.join(reasons)}"
                    print(f"  {operator:20} {backend:10} {str(dtype).removeprefix('torch.'):9} {verdict}")


if __name__ == "__main__":
    main()
