"""The stages of one short run on a GPU that leaves every figure in eight files; `benchmarks/harvest.sh` runs them."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The smoke test judges by the tests' own cases and tolerance rule, and builds as they do.
sys.path.append(str(ROOT / "tests"))
