"""python -m benchmarks.harvest STAGE: a stage, as benchmarks/harvest.sh calls it; report FOLDER STAGE... at the end."""

import sys
from importlib import import_module

from benchmarks.harvest.run import Harvest, Skipped

# Each in a file of its own that is imported for it alone: what breaks one does not break the others.
STAGES = {
    "environment": "environment:run",
    "wheels": "wheels:run",
    "build": "build:run",
    "warm": "warm:run",
    "smoke": "smoke:run",
    "losses": "losses:run",
    "launches": "launches:run",
    "kmeans": "clusters:run",
    "profile": "tools:profile",
    "sanitize": "tools:sanitize",
    "tests": "device_tests:run",
    "failed_tests": "device_tests:run_failed",
    "large": "losses:run_large",
    "best_launches": "launches:run_best",
    # What the tools of two stages watch.
    "profiled": "tools:profiled",
    "sanitized": "tools:sanitized",
}
SKIPPED = 77


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what == "report":
        from benchmarks.harvest.report import report

        text, complete = report(*arguments)
        print(text)
        sys.exit(not complete)
    module, function = STAGES[what].split(":")
    try:
        getattr(import_module(f"benchmarks.harvest.{module}"), function)(Harvest.of_environment(what))
    except Skipped as reason:
        print(f"skipped: {reason}")
        sys.exit(SKIPPED)


if __name__ == "__main__":
    main()
