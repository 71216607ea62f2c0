"""Tests, in folders that mirror the package; helpers and oracles are imported as `tests.tolerance`."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
