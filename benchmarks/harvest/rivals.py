"""Ours beside those who do the same, as `python -m benchmarks gpu` measures them, at few sizes."""

from dataclasses import asdict

import torch

from benchmarks.clustering import cases as kmeans_cases
from benchmarks.clustering import kmeans
from benchmarks.harness.contender import Size
from benchmarks.harness.results import Row
from benchmarks.harvest import plan
from benchmarks.harvest.run import Harvest
from benchmarks.losses.cases import CASES
from benchmarks.losses.measure import measure

SECONDS = 2.0  # for each size
DRY_CLUSTERS = Size(512, 16, torch.float16, clusters=8)


def run(harvest: Harvest) -> None:
    for n, d in plan.RIVAL_SIZES:
        _losses(harvest, "nt-xent", n, d, ("ours", "inf-cl", "memeff"))
    for size in plan.CLUSTER_RIVAL_SIZES:
        _clusters(harvest, *size)


def run_clip(harvest: Harvest, n: int, d: int) -> None:
    _losses(harvest, "clip", n, d, ("ours", "inf-cl towers"))


def _losses(harvest: Harvest, case: str, n: int, d: int, contenders: tuple[str, ...]) -> None:
    def rows() -> list[Row]:
        size = Size(harvest.rows(n), harvest.width(d), harvest.half)
        return measure(CASES[case], size, harvest.device, harvest.clock, _seconds(harvest), contenders)[0]

    _lines(harvest, {"case": case, "n": n, "d": d}, rows)


def _clusters(harvest: Harvest, n: int, d: int, k: int) -> None:
    """Labels and means of one iteration."""

    def rows() -> list[Row]:
        size = DRY_CLUSTERS if harvest.dry_run else Size(n, d, torch.float16, clusters=k)
        problem = kmeans.Problem.make(size, harvest.device, harvest.clock)
        case = kmeans_cases.CASES["k-means iteration"]
        return problem.measure(case, harvest.clock, _seconds(harvest), ("ours", "flash-kmeans"), {})[0]

    _lines(harvest, {"case": "k-means iteration", "n": n, "d": d, "clusters": k}, rows)


def _seconds(harvest: Harvest) -> float:
    return 0.0 if harvest.dry_run else SECONDS


def _lines(harvest: Harvest, key: dict, measured) -> None:
    """A line for the comparison, and one for each who competed: also for who did not, with the reason."""

    def run() -> dict:
        for row in measured():
            harvest.line(**asdict(row) | key)
        return {"note": ""}

    harvest.record({"comparison": key["case"], "n": key["n"], "d": key["d"]}, run)
