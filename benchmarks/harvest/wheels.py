"""Rivals from a folder of wheels, where HARVEST_WHEELS names one: the machine has no registry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.harvest import ROOT
from benchmarks.harvest.run import Harvest, Skipped

RIVALS = {"inf-cl": "inf_cl", "memeff": "memeff", "flash-kmeans": "flash_kmeans"}
TARGET = ROOT / "build" / "harvest" / "wheels"  # harvest.sh has it on the path


def run(harvest: Harvest) -> None:
    """A line for every rival: whether its wheel was there, and could be installed."""
    shutil.rmtree(TARGET, ignore_errors=True)
    folder = os.environ.get("HARVEST_WHEELS")
    wheels = sorted(Path(folder).glob("*.whl")) if folder else []
    for wheel in wheels:  # each by itself: one that cannot be installed must not take the others along
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", TARGET, wheel])
    for rival, module in RIVALS.items():
        there = any((TARGET / name).exists() for name in (module, f"{module}.py"))
        note = "" if there else f"no wheel of it in {folder}" if folder else "HARVEST_WHEELS names no folder of wheels"
        harvest.line(case="rival", name=rival, note=note)
    if not wheels:
        raise Skipped("no wheels of rivals")
