"""The stages of one short run on a GPU that leaves every figure in eight files; `benchmarks/harvest.sh` runs them."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
