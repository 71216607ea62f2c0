"""python -m benchmarks cpu [--quick] | memory | gpu [--dry-run] | import FOLDER... | predict [FOLDER] | readme FILE |
natural FOLDER... | plots FILE... | scaling | dispatches | first-line | family | worked

cpu, gpu and worked take --only.
"""

import argparse
from pathlib import Path

import torch

from benchmarks import worked
from benchmarks.clustering import kmeans
from benchmarks.harness.results import DIRECTORY
from benchmarks.losses import cpu, dispatches, distributed, gpu, objectives
from benchmarks.pages import family, scaling
from benchmarks.pages.readme import update
from benchmarks.training import first_line, natural, parts, whole_step

# Each with its run_cpu and its run_gpu.
PARTS = {
    "losses": (cpu.run_cpu, gpu.run_gpu),
    "objectives": (objectives.run_cpu, objectives.run_gpu),
    "kmeans": (kmeans.run_cpu, kmeans.run_gpu),
    "training": (whole_step.run_cpu, whole_step.run_gpu),
    "step": (parts.run_cpu, parts.run_gpu),
    "distributed": (distributed.run_cpu, distributed.run_gpu),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of what is written")
    what = parser.add_subparsers(dest="what", required=True)
    on_cpu = what.add_parser("cpu", help="time and memory on this CPU")
    on_cpu.add_argument("--quick", action="store_true", help="small sizes, no memory")
    on_cpu.add_argument("--losses", choices=objectives.OBJECTIVES, nargs="+", help='of "objectives" these alone')
    what.add_parser("memory", help="peak memory of the losses on this CPU against the bar")
    on_gpu = what.add_parser("gpu", help="time and memory on a CUDA device")
    on_gpu.add_argument("--dry-run", action="store_true", help="the same code on CPU tensors of tiny sizes")
    for device in (on_cpu, on_gpu):
        device.add_argument("--only", choices=PARTS, help="this part alone")
    readme = what.add_parser("readme", help="write the README's table from a results file of the CPU")
    readme.add_argument("file", type=Path)
    readme.add_argument("--page", type=Path, help="that has the table, if it is not the one of its kind")
    images = what.add_parser("natural", help="a results file of the folders of ccl-fast compare on natural images")
    images.add_argument("folders", type=Path, nargs="+", help="the first is of the defaults")
    images.add_argument("--commit", help="that they were run at (the present one)")
    plots = what.add_parser("plots", help="time and memory against N, D and K from results files, as SVG")
    plots.add_argument("files", type=Path, nargs="+")
    harvest = what.add_parser("import", help="results files and tables from what benchmarks/harvest.sh left")
    harvest.add_argument("folders", type=Path, nargs="+", help="that of the first call, and that of the second")
    harvest.add_argument("--commit", help="that was measured, if the folder does not name it")
    predict = what.add_parser("predict", help="predicted times of a harvest on an H200, from the compiled code")
    predict.add_argument("folder", type=Path, nargs="?", help="a harvest whose ceilings replace the assumed ones")
    what.add_parser(
        "dispatches", help="operations that a step of a small batch dispatches; Triton's too with TRITON_INTERPRET=1"
    )
    first = what.add_parser("first-line", help="seconds until ccl-fast says something, of --help and of train")
    first.add_argument("--repetitions", type=int, default=7, help="of each, of which the median counts (7)")
    what.add_parser("family", help="write the table of docs/objectives.md from the docstrings of the losses")
    examples = what.add_parser("worked", help="worked examples on real data: their figures, for some seeds")
    examples.add_argument("--only", choices=worked.names(), nargs="+", default=worked.names(), help="these alone")
    examples.add_argument("--seeds", type=int, default=3, help="how many (3)")
    plan = what.add_parser("scaling", help="the plan for many GPUs, as in docs/scaling.md")
    for name, (value, text) in scaling.ASSUMED.items():
        plan.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=f"{text} ({value:g})")
    a = parser.parse_args()
    if a.what == "scaling":
        print(scaling.plan(**{name: getattr(a, name) for name in scaling.ASSUMED}))
    elif a.what == "family":
        family.update()
    elif a.what == "worked":
        print(worked.run(a.only, a.seeds, a.output))
    elif a.what == "dispatches":
        print(dispatches.table())
    elif a.what == "first-line":
        print(first_line.run(a.repetitions, a.output))
    elif a.what == "import":
        from benchmarks.harvest.importing import ImportRefused, import_folders

        try:
            print(import_folders(a.folders, a.output, a.commit))
        except ImportRefused as error:
            parser.exit(1, f"{error}\n")
    elif a.what == "predict":
        _predict(a.folder)
    elif a.what == "natural":
        print(natural.collect(a.folders, a.commit, a.output))
    elif a.what == "readme":
        update(a.file, a.page)
    elif a.what == "plots":
        from benchmarks.pages.plots import draw  # matplotlib is not everywhere

        try:
            print("\n".join(map(str, draw(a.files, a.output))))
        except ValueError as error:
            parser.exit(1, f"{error}\n")
    elif a.what == "memory":
        print(cpu.run_memory(a.output))
    elif a.what == "cpu" and a.losses:
        print(objectives.run_cpu(a.quick, a.output, a.losses))
    elif a.what == "cpu" or a.dry_run or torch.cuda.is_available():
        for part, (run_cpu, run_gpu) in PARTS.items():
            if a.only in (None, part):
                print(run_cpu(a.quick, a.output) if a.what == "cpu" else run_gpu(a.dry_run, a.output))
    else:
        parser.exit(2, "no CUDA device here: nothing was measured (--dry-run walks the same code on the CPU)\n")


def _predict(folder: Path | None) -> None:
    from benchmarks.harvest import prediction
    from benchmarks.harvest.importing import measured_ceilings
    from benchmarks.harvest.machine_code import counts_of_shipped_launches  # needs Triton
    from benchmarks.harvest.run import RESULTS, read_lines

    measured = measured_ceilings(read_lines(folder / RESULTS)) if folder else {}
    source = f"measured: {', '.join(measured)}; the others assumed" if measured else "assumed"
    prediction.write(counts_of_shipped_launches(), prediction.ASSUMED | measured, source)
    print(prediction.FILE.read_text())


if __name__ == "__main__":
    main()
