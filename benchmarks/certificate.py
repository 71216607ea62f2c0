"""How many rows the certificate of k-means leaves in doubt, and how many of them must meet all centres again.

`python -m benchmarks.certificate` needs no GPU: it repeats the arithmetic of csrc/kmeans_assign.cuh and
kmeans_runoff.cuh with torch, from the same packed rows (rounded to float16) and the same bounds; a test compares it
with the kernels.
Beside stands the former rule, by which every row in doubt met all centres.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.clustering.cases import CASES
from benchmarks.harness.contender import Size
from benchmarks.harness.results import DIRECTORY, ResultsFile, Row, table
from ccl_fast.ops.kmeans.assign import prepare_rows
from ccl_fast.ops.kmeans.update import kmeans_update

CPU, HALF = torch.device("cpu"), torch.float16
# And the iterations whose assignment is looked at. Only rows are counted that are no centre of the start: among a
# million there are few of those, here many, and they are never in doubt.
RUNS = (
    (Size(40_000, 128, HALF, 1000), (1, 2, 5)),
    (Size(20_000, 128, HALF, 10_000), (1,)),
    (Size(16_000, 512, HALF, 4000), (1, 2)),
    (Size(14_096, 2048, HALF, 10_000), (1,)),
)
QUICK_RUNS = ((Size(600, 64, HALF, 40), (1, 2)),)

BLOCK, TILE, COLUMNS = 1024, 128, 64  # rows here; centres and columns as in the kernel
UNIT = 2.0**-24
INDEX = 16 * 2 * UNIT
LARGEST_HALF = 65504.0


class Counts(NamedTuple):
    former: int  # rows in doubt by the former rule, each compared with all centres
    doubtful: int  # rows in doubt
    rechecked: int  # of these compared with all centres


@dataclass
class CertificateRow(Row):
    iteration: int = 0
    former: int | None = None
    doubtful: int | None = None
    rechecked: int | None = None


class _Packed(NamedTuple):
    exact: Tensor  # float64
    rounded: Tensor  # float16's values, as float32
    norm: Tensor
    residue: Tensor


def count(x: Tensor, centers: Tensor, origin: Tensor, scale: float) -> Counts:
    """Of rows x [n, d] and centers [k, d] (euclidean), moved by the origin [d] and scaled by a power of two."""
    (k, d), total = centers.shape, torch.zeros(3, dtype=torch.int64)
    packed = _pack(centers, origin, scale)
    half_square = packed.exact.square().sum(1) / 2
    norm, residue = (_largest_of_tile(v) for v in (packed.norm + packed.residue, packed.residue))
    padded_d = -(-d // COLUMNS) * COLUMNS
    first_order = 2 * UNIT * (9 / 8 * padded_d + 2) + INDEX
    gamma, rho = first_order / (1 - first_order), 4 * UNIT + INDEX
    former_gamma, former_rho = 2 * UNIT * (17 / 16 * padded_d + 2), 4 * UNIT
    for rows in x.split(BLOCK):
        p = _pack(rows, origin, scale)
        score = half_square.float() - p.rounded @ packed.rounded.T

        def error(gamma: float, rho: float, p=p) -> Tensor:
            tile = p.residue[:, None] * norm + p.norm[:, None] * (residue + gamma * norm) + rho / 2 * norm**2
            return tile.float().repeat_interleave(TILE, 1)[:, :k]

        former = error(former_gamma, former_rho)
        upper, lowest = (score + former).amin(1), (score - former).topk(2, largest=False).values
        total[0] += (lowest[:, 1] <= upper).sum()

        ours = error(gamma, rho)
        upper, (lowest, nearest) = (score + ours).amin(1), (score - ours).topk(3, largest=False)
        unsure = lowest[:, 1] <= upper
        two = nearest[unsure, :2]
        exact = half_square[two] - (p.exact[unsure, None] * packed.exact[two]).sum(2)
        total[1] += unsure.sum()
        total[2] += (lowest[unsure, 2] <= exact.amin(1)).sum()
    return Counts(*total.tolist())


def frame(x: Tensor) -> tuple[Tensor, float]:
    """The origin and the scale that the extension chooses for rows [n, d]."""
    origin = x.mean(0, dtype=torch.float32)
    return origin, 2.0 ** (15 - torch.frexp((x - origin).abs().max()).exponent.item())


def _pack(x: Tensor, origin: Tensor, scale: float) -> _Packed:
    exact = (x.double() - origin.double()) * scale
    rounded = exact.float().clamp(-LARGEST_HALF, LARGEST_HALF).half()
    return _Packed(exact, rounded.float(), rounded.double().norm(dim=1), (exact - rounded.double()).norm(dim=1))


def _largest_of_tile(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % TILE)).view(-1, TILE).amax(1)


def run(quick: bool, directory: Path) -> str:
    """Rows of all sizes and iterations, written as soon as they are known; the table."""
    file, done = ResultsFile("cpu-kmeans-certificate", CPU, directory), []
    for size, iterations in QUICK_RUNS if quick else RUNS:
        x, centers = CASES["k-means fit"].inputs(size, CPU)
        others = _without(x, centers)
        origin, scale = frame(x)
        centers, rows = centers.float(), prepare_rows(x[None], metric="euclidean", backend="blocked")
        for iteration in range(1, max(iterations) + 1):
            if iteration in iterations:
                counts = count(others, centers, origin, scale)
                row = CertificateRow(
                    "k-means certificate", "ours", len(others), size.d, "float16", clusters=size.clusters
                )
                row.iteration, (row.former, row.doubtful, row.rechecked) = iteration, counts
                file.add([row])
                done.append(row)
            if iteration < max(iterations):
                sums, sizes = kmeans_update(x, rows.nearest(centers[None])[0][0], len(centers))
                centers = torch.where(sizes[:, None] > 0, sums / sizes[:, None], centers.double()).float()
    return f"{table(done, TABLE)}\n\n{file.path}"


def _without(x: Tensor, centers: Tensor) -> Tensor:
    """The rows that are no centre."""
    known = {row.tobytes() for row in centers.numpy()}
    return x[torch.tensor([row.tobytes() not in known for row in x.numpy()])]


TABLE = {
    "iteration": lambda row: str(row.iteration),
    "all centres, before": lambda row: f"{row.former} ({row.former / row.n:.2%})",
    "in doubt": lambda row: f"{row.doubtful} ({row.doubtful / row.n:.2%})",
    "all centres": lambda row: f"{row.rechecked} ({row.rechecked / row.n:.3%})",
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.certificate", description=__doc__)
    parser.add_argument("--output", type=Path, default=DIRECTORY, help="folder of what is written")
    parser.add_argument("--quick", action="store_true", help="one small size")
    arguments = parser.parse_args()
    print(run(arguments.quick, arguments.output))
