"""Nearest centres in plain torch: blocks of a matrix product, and float64 where its rounding could matter.

The score ``|c|^2 / 2 - <x, c>`` orders the centres of a row as ``|x - c|^2`` does. Rows and centres are first moved to
the mean of the rows, where the score does not cancel, and scaled so that no square overflows. Then rows get a column
of ones and centres one of ``|c|^2 / 2``, so that the scores are one product of matrices. Such a sum with unit roundoff
u is off by at most ``gamma |x| |c|``, ``gamma = d u`` and a little for what surrounds it; so only a centre whose score
is at most the lowest and twice that can be the nearest. Most rows have one such candidate, which is their label. The
candidates of the others are compared in float64.

A block of scores has a column for every row: what is to be found for each row is then done for many rows by one
instruction, as entries that lie beside each other are of different rows.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ccl_fast.ops.kmeans.assign_reference import exact_scores
from ccl_fast.ops.kmeans.update_blocked import KEPT_ENTRIES
from ccl_fast.ops.matmul import factor_rounding, matmul_nt
from ccl_fast.ops.normalize import normalize_rows
from ccl_fast.ops.precision import accumulation_dtype, without_autocast
from ccl_fast.ops.threads import for_each_block

# Rows of one block and entries of its scores: on a CPU they should stay in the cache, but a block of few clusters be
# worth its calls; elsewhere it should fill the device.
CPU_ROWS, MAX_CPU_ROWS, CPU_ENTRIES, MAX_CPU_ENTRIES = 512, 2048, 1 << 20, 1 << 22
DEVICE_ENTRIES = 1 << 27
# Entries of a block whose norms are taken, or of what is decided in float64 at once, on a CPU.
NORM_ENTRIES = 1 << 18
# And of the latter elsewhere.
EXACT_ENTRIES = 1 << 23
# Roundings of the score besides those of its sum, in units of roundoff.
OTHER_ROUNDINGS = 8
# The index of a centre is found by a product, in digits of this base, which no setting of its precision rounds.
BASE = 256


class Rows:
    """Rows [problems, rows, d] with what can be computed before the centres are known."""

    def __init__(self, x: Tensor, metric: str):
        self.x, self.metric = x, metric
        self.dtype = accumulation_dtype(x)
        d, info = x.shape[2], torch.finfo(self.dtype)
        if metric == "euclidean":
            # The mean of huge values overflows; any origin is right.
            self.origin = x.mean(1, dtype=self.dtype).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        else:
            self.origin = torch.zeros_like(x[:, 0], dtype=self.dtype)
        entries = x.flatten(1)
        exponent = torch.frexp(torch.maximum(entries.amax(1), -entries.amin(1)).to(self.dtype)).exponent
        # Of every problem, a power of two; moved rows are at most twice as large.
        self.scale = torch.exp2(-1 - exponent.clamp_(-126, 125).to(self.dtype))
        # Float64 distances are rounded too, and what they call equal goes to the lowest index.
        self.distance_rounding = 2 * (d + OTHER_ROUNDINGS) * 2.0**-53
        self.rounding = (d + OTHER_ROUNDINGS) * info.eps / 2 + 2 * factor_rounding(x.device, self.dtype)
        self._prepare()

    def _prepare(self) -> None:
        """Compute what else rows have for many assignments."""
        d, info = self.x.shape[2], torch.finfo(self.dtype)
        self.kept: Tensor | None = None
        norm = self._lengths()
        self.twice_norm = 2 * norm
        self.own_margin = norm.square_().mul_(self.distance_rounding).add_(d * info.tiny)  # the latter for underflow
        self._towards: Towards | None = None  # of the last shape of centres

    def _lengths(self) -> Tensor:
        """Return the lengths of the rows as the product takes them, [problems, rows], and keep few rows like that."""
        x, d = self.x, self.x.shape[2]
        norm = torch.empty(x.shape[:2], dtype=self.dtype, device=x.device)
        if x.numel() <= KEPT_ENTRIES:
            self.kept = self._move(x, self.origin[:, None], self.scale[:, None, None])
            return torch.linalg.vector_norm(self.kept[..., :-1], dim=2, out=norm)
        size = max(1, (NORM_ENTRIES if x.device.type == "cpu" else DEVICE_ENTRIES) // d)
        for problem in range(x.shape[0]):
            for start in range(0, x.shape[1], size):
                part = slice(start, start + size)
                torch.linalg.vector_norm(self._moved(problem, part)[:, :-1], dim=1, out=norm[problem, part])
        return norm

    def nearest(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        """Labels int64 [problems, rows], and how many rows were in doubt and re-checked, int64 [2]: the same ones.

        Of a single problem there may be several sets of centres: [sets, k, d] -> [sets, rows].
        """
        centers = centers.contiguous()
        labels = torch.empty(centers.shape[0], self.x.shape[1], dtype=torch.int64, device=centers.device)
        sets, unsure = centers.shape[0] // self.x.shape[0], 0
        with without_autocast(centers.device):  # the products are float32's
            for problem in range(self.x.shape[0]):
                own = slice(problem * sets, (problem + 1) * sets)
                unsure += self._nearest(problem, centers[own], labels[own])
        return labels, torch.full((2,), unsure, device=centers.device)

    def _move(self, rows: Tensor, origin: Tensor, scale: Tensor) -> Tensor:
        """Return rows [..., d] as the product takes them: [..., d + 1]."""
        moved = torch.empty(*rows.shape[:-1], rows.shape[-1] + 1, dtype=self.dtype, device=rows.device)
        torch.sub(rows, origin, out=moved[..., :-1]).mul_(scale)
        moved[..., -1] = 0.0 if self.metric == "cosine" else 0.5
        return moved

    def _moved(self, problem: int, part: slice) -> Tensor:
        if self.kept is not None:
            return self.kept[problem, part]
        return self._move(self.x[problem, part], self.origin[problem], self.scale[problem])

    def _nearest(self, problem: int, centers: Tensor, labels: Tensor) -> int:
        """Write the labels [sets, rows] by centres [sets, k, d], and return how many rows were in doubt."""
        if self._towards is None or self._towards.shape != centers.shape:
            self._towards = Towards(centers.shape, self.dtype, centers.device)
        towards = self._towards
        length = self._aim(problem, centers, towards)
        # 2 gamma |c| (|x| + |c| / 2) for the largest |c|, as |c|^2 / 2 is in its score too, gamma being `rounding`;
        # and, for the distances, epsilon (|x| + |c|)^2.
        per_length = length * (self.rounding + self.distance_rounding)
        margin = torch.addcmul(self.own_margin[problem], self.twice_norm[problem] + length, per_length)
        doubts = []

        def work(part: slice) -> None:
            doubts.append(self._label(problem, part, centers, towards, margin[:, part], labels[:, part]))

        rows = self._block_rows(centers.shape[0] * centers.shape[1])
        for_each_block(labels.shape[1], rows, work, labels.device)
        return sum(doubts)

    def _block_rows(self, clusters: int) -> int:
        return _block_rows(clusters, self.x.device)

    def _label(
        self,
        problem: int,
        part: slice,
        centers: Tensor,
        towards: Towards,
        margin: Tensor,
        labels: Tensor,
    ) -> int:
        """Write the labels of these rows [sets, rows], whose margins these are; return how many were in doubt."""
        scores = matmul_nt(towards.matrix, self._moved(problem, part)).view(*centers.shape[:2], -1)
        candidates = scores.le_(scores.amin(1, keepdim=True).add_(margin[:, None]))  # 1, or 0, as for NaN
        found = torch.bmm(towards.digits, candidates)
        count = found[:, 0]
        labels.copy_(found[:, 1])
        for place in range(2, found.shape[1]):
            labels.add_(found[:, place].long(), alpha=BASE ** (place - 1))
        if count.equal(towards.one.expand_as(count)):
            return 0
        return self._decide(self.x[problem, part], centers, candidates, count, labels)

    def _aim(self, problem: int, centers: Tensor, towards: Towards) -> Tensor:
        """Write minus the centres as the product takes them, and return the largest length of each set, [sets, 1]."""
        if self.metric == "cosine":
            towards.minus.copy_(normalize_rows(centers.double())).neg_()
        else:
            torch.sub(self.origin[problem], centers, out=towards.minus).mul_(self.scale[problem])
        length = torch.linalg.vector_norm(towards.minus, dim=2, dtype=torch.float64)
        # Rounded once, for gamma is spent on the product.
        torch.square(length, out=towards.square)
        return length.amax(1, keepdim=True).to(self.dtype)

    def _decide(self, x: Tensor, centers: Tensor, candidates: Tensor, count: Tensor, labels: Tensor) -> int:
        """Write the labels of the rows with several candidates, or no number for one; return how many they are."""
        which, rows = (count != 1).nonzero(as_tuple=True)
        possible = candidates[which, :, rows] + (count[which, rows] == 0)[:, None]
        labels[which, rows] = _best(x[rows], centers, which, possible, self.metric)
        return len(rows)


class Towards:
    """Where the centres of one shape [sets, k, d] are written for a product, and what else their assignments share."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, device: torch.device):
        sets, k, d = self.shape = shape
        whole = torch.empty(sets, k, d + 1, dtype=dtype, device=device)
        self.matrix, self.minus, self.square = whole.view(sets * k, d + 1), whole[..., :-1], whole[..., -1]

    @cached_property
    def digits(self) -> Tensor:
        """Ones, and the digits of every index, the lowest first: what the product with candidates sums for each row."""
        sets, k, _ = self.shape
        device, dtype = self.matrix.device, self.matrix.dtype
        powers = BASE ** torch.arange(_places(k), device=device)
        digits = torch.arange(k, device=device) // powers[:, None] % BASE
        return torch.cat([torch.ones_like(digits[:1]), digits]).to(dtype).expand(sets, -1, -1)

    @cached_property
    def one(self) -> Tensor:
        return self.digits[0, 0, 0]


def _places(k: int) -> int:
    """Return how many digits the indices below k have."""
    places = 1
    while BASE**places < k:
        places += 1
    return places


def _block_rows(clusters: int, device: torch.device) -> int:
    if device.type == "cpu":
        rows = max(CPU_ROWS, min(MAX_CPU_ROWS, CPU_ENTRIES // clusters))
        return max(16, min(rows, MAX_CPU_ENTRIES // clusters))
    return max(256, DEVICE_ENTRIES // clusters)


def _best(x: Tensor, centers: Tensor, which: Tensor, possible: Tensor, metric: str) -> Tensor:
    """The best centre of each row in float64, the lowest of several, where possible [rows, k] is not 0.

    x [rows, d], centers [sets, k, d], which [rows]: of these sets.
    """
    scores = torch.full(possible.shape, torch.inf, dtype=torch.float64, device=x.device)
    row, center = possible.nonzero(as_tuple=True)
    size = max(1, (NORM_ENTRIES if x.device.type == "cpu" else EXACT_ENTRIES) // x.shape[1])
    for start in range(0, len(row), size):
        r, c = row[start : start + size], center[start : start + size]
        scores[r, c] = exact_scores(x[r].double(), centers[which[r], c].double(), metric)
    return scores.argmin(1)  # the first of several
