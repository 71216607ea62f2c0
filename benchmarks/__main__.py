"""python -m benchmarks cpu [--quick] | memory | gpu [--dry-run] | readme FILE"""

import argparse
from pathlib import Path

import torch

from benchmarks.cpu import run_cpu, run_memory
from benchmarks.gpu import run_gpu
from benchmarks.readme import update
from benchmarks.results import DIRECTORY


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the results file")
    what = parser.add_subparsers(dest="what", required=True)
    what.add_parser("cpu", help="time and memory on this CPU").add_argument(
        "--quick", action="store_true", help="small sizes, no memory"
    )
    what.add_parser("memory", help="peak memory on this CPU against the bar")
    what.add_parser("gpu", help="time and memory on a CUDA device").add_argument(
        "--dry-run", action="store_true", help="the same code on CPU tensors of tiny sizes"
    )
    readme = what.add_parser("readme", help="write the README's table from a results file of the CPU")
    readme.add_argument("file", type=Path)
    a = parser.parse_args()
    if a.what == "readme":
        update(a.file)
    elif a.what == "cpu":
        print(run_cpu(a.quick, a.output))
    elif a.what == "memory":
        print(run_memory(a.output))
    elif a.dry_run or torch.cuda.is_available():
        print(run_gpu(a.dry_run, a.output))
    else:
        parser.exit(2, "no CUDA device here: nothing was measured (--dry-run walks the same code on the CPU)\n")


if __name__ == "__main__":
    main()
