"""python -m benchmarks cpu [--quick] | memory | gpu [--dry-run] | readme FILE; cpu and gpu take --only PART"""

import argparse
from pathlib import Path

import torch

from benchmarks import cpu, gpu, kmeans
from benchmarks.readme import update
from benchmarks.results import DIRECTORY

# Each with its run_cpu and its run_gpu.
PARTS = {"losses": (cpu.run_cpu, gpu.run_gpu), "kmeans": (kmeans.run_cpu, kmeans.run_gpu)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of the results file")
    what = parser.add_subparsers(dest="what", required=True)
    on_cpu = what.add_parser("cpu", help="time and memory on this CPU")
    on_cpu.add_argument("--quick", action="store_true", help="small sizes, no memory")
    what.add_parser("memory", help="peak memory of the losses on this CPU against the bar")
    on_gpu = what.add_parser("gpu", help="time and memory on a CUDA device")
    on_gpu.add_argument("--dry-run", action="store_true", help="the same code on CPU tensors of tiny sizes")
    for device in (on_cpu, on_gpu):
        device.add_argument("--only", choices=PARTS, help="this part alone")
    readme = what.add_parser("readme", help="write the README's table from a results file of the CPU")
    readme.add_argument("file", type=Path)
    a = parser.parse_args()
    if a.what == "readme":
        update(a.file)
    elif a.what == "memory":
        print(cpu.run_memory(a.output))
    elif a.what == "cpu" or a.dry_run or torch.cuda.is_available():
        for part, (run_cpu, run_gpu) in PARTS.items():
            if a.only in (None, part):
                print(run_cpu(a.quick, a.output) if a.what == "cpu" else run_gpu(a.dry_run, a.output))
    else:
        parser.exit(2, "no CUDA device here: nothing was measured (--dry-run walks the same code on the CPU)\n")


if __name__ == "__main__":
    main()
