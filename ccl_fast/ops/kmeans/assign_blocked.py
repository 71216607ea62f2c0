"""Nearest centres in plain torch: blocks of a matrix product, and float64 where its rounding could matter.

The score ``|c|^2 / 2 - <x, c>`` orders the centres of a row as ``|x - c|^2`` does. Rows and centres are first moved to
the mean of the rows, where the score does not cancel, and scaled so that no square overflows. A sum of d products with
unit roundoff u is off by at most ``gamma |x| |c|``, ``gamma = d u`` and a little for what surrounds it; so a label is
certain if the second best score is higher than the best by twice that. The other rows are decided among the centres
that come into question, in float64.
"""

import torch
from torch import Tensor

from ccl_fast.ops.kmeans.assign_reference import exact_scores
from ccl_fast.ops.matmul import factor_rounding, matmul_nt
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.threads import for_each_block

# Rows of one block and entries of its scores: on a CPU they should stay in the cache, but a block of few clusters be
# worth its calls; elsewhere it should fill the device.
CPU_ROWS, MAX_CPU_ROWS, CPU_ENTRIES, MAX_CPU_ENTRIES = 512, 4096, 1 << 19, 1 << 22
DEVICE_ENTRIES = 1 << 27
# Entries of a block whose norms are taken, on a CPU.
NORM_ENTRIES = 1 << 18
# Largest number of entries of what is decided in float64 at once.
EXACT_ENTRIES = 1 << 23
# Roundings of the score besides those of its sum, in units of roundoff.
OTHER_ROUNDINGS = 8


class Rows:
    """Rows [problems, rows, d] with what can be computed before the centres are known."""

    def __init__(self, x: Tensor, metric: str):
        self.x, self.metric = x, metric
        self.dtype = accumulation_dtype(x)
        entries = x.flatten(1)
        if metric == "euclidean":
            # The mean of huge values overflows; any origin is right.
            origin = x.mean(1, dtype=self.dtype)
            self.origin = torch.where(origin.isfinite(), origin, 0.0)
        else:
            self.origin = torch.zeros_like(x[:, 0], dtype=self.dtype)
        largest = torch.maximum(entries.amax(1), -entries.amin(1)).to(self.dtype) + self.origin.abs().amax(1)
        exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 128).clamp(-126, 126)
        self.scale = torch.exp2(-exponent.to(self.dtype))  # of every problem, a power of two
        rows = max(1, (NORM_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES) // x.shape[2])
        self.norm = torch.stack(
            [
                torch.cat([self._moved(problem, block).norm(dim=1) for block in x[problem].split(rows)])
                for problem in range(len(x))
            ]
        )

    def nearest(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 [problems, rows], and how many rows were in doubt and re-checked, int64 [2]: the same ones."""
        labels = torch.empty(self.x.shape[:2], dtype=torch.int64, device=centers.device)
        with without_autocast(centers.device):  # the products are float32's
            unsure = sum(self._nearest(i, c, labels[i]) for i, c in enumerate(centers))
        return labels, torch.tensor([unsure] * 2, device=centers.device)

    def _moved(self, problem: int, rows: Tensor) -> Tensor:
        return (rows.to(self.dtype) - self.origin[problem]).mul_(self.scale[problem])

    def _nearest(self, problem: int, centers: Tensor, labels: Tensor) -> int:
        """Write the labels, and return how many rows were in doubt."""
        x, norm = self.x[problem], self.norm[problem]
        if self.metric == "cosine":
            moved = normalize_rows(centers.double()).to(self.dtype)
            half_square = torch.zeros_like(moved[:, 0])
        else:
            moved = (centers - self.origin[problem]) * self.scale[problem]
            # Rounded once, for gamma is spent on the product.
            half_square = (moved.double().square().sum(1) / 2).to(self.dtype)
        towards = -moved

        def scores_of(rows: Tensor) -> Tensor:
            return matmul_nt(rows, towards, half_square)

        best, second = torch.empty_like(norm), torch.empty_like(norm)
        size = _block_rows(len(centers), x.device)

        def work(part: slice) -> None:
            _two_lowest(scores_of(self._moved(problem, x[part])), labels[part], best[part], second[part])

        for_each_block(len(x), size, work, x.device)

        info = torch.finfo(self.dtype)
        gamma = (x.shape[1] + OTHER_ROUNDINGS) * info.eps / 2 + 2 * factor_rounding(x.device, self.dtype)
        # The largest |c| has |c|^2 / 2 in its score too.
        length = moved.norm(dim=1).max()
        threshold = best + 2 * gamma * length * (norm + length / 2)
        # Float64 distances are rounded too, and what they call equal goes to the lowest index; then, for underflow.
        threshold += 2 * (x.shape[1] + OTHER_ROUNDINGS) * 2.0**-53 * (norm + length).square() + x.shape[1] * info.tiny
        unsure = (~(second > threshold)).nonzero()[:, 0]  # also where something is not a number
        for rows in unsure.split(size) if len(unsure) else ():
            scores = scores_of(self._moved(problem, x[rows]))
            candidates = ~(scores > threshold[rows, None])
            candidates.scatter_(1, labels[rows, None], True)
            labels[rows] = _decide(x[rows], centers, candidates, self.metric)
        return len(unsure)


def _block_rows(clusters: int, device: torch.device) -> int:
    if device.type == "cpu":
        rows = max(CPU_ROWS, min(MAX_CPU_ROWS, CPU_ENTRIES // clusters))
        return max(16, min(rows, MAX_CPU_ENTRIES // clusters))
    return max(256, DEVICE_ENTRIES // clusters)


def _two_lowest(scores: Tensor, label: Tensor, best: Tensor, second: Tensor) -> None:
    """Writes the index of each row's lowest score, that score, and the lowest of the others. Overwrites scores."""
    if scores.device.type == "cpu":
        label.copy_(torch.from_numpy(scores.numpy().argmin(1)))  # several times as fast as torch's on one thread
    else:
        torch.argmin(scores, 1, out=label)
    torch.gather(scores, 1, label[:, None], out=best[:, None])
    scores.scatter_(1, label[:, None], torch.inf)
    torch.amin(scores, 1, out=second)


def _decide(x: Tensor, centers: Tensor, candidates: Tensor, metric: str) -> Tensor:
    """The best candidate of each row in float64, the lowest of several; candidates bool [rows, k], one at least."""
    row, center = candidates.nonzero(as_tuple=True)
    size = max(1, EXACT_ENTRIES // max(1, x.shape[1]))
    scores = torch.cat(
        [
            exact_scores(x[r].double(), centers[c].double(), metric)
            for r, c in zip(row.split(size), center.split(size), strict=True)
        ]
    )
    lowest = scores.new_full((len(x),), torch.inf).scatter_reduce_(0, row, scores, "amin")
    center = center.masked_fill(scores != lowest[row], len(centers))
    best = center.new_full((len(x),), len(centers)).scatter_reduce_(0, row, center, "amin")
    return best.clamp_(max=len(centers) - 1)  # where a centre is not finite, no score equals the lowest
