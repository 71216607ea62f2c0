"""The plan on paper for many GPUs: what a step of the loss costs each process, in arithmetic, bytes and memory.

For N rows of D numbers on P processes, n = N / P each, forward and backward. A row is D numbers of two bytes and an id
of eight; its log-sum-exp, sum and number of its positives, and their gradients are four bytes each.

- Arithmetic: N x N x D products, shared by all processes: one forward (the Triton kernels go over a pair of blocks once
  in each direction; within a process, and on a CPU, it is half of that), two backward.
- all-gather: rows and ids of the others once; three numbers of each row of theirs backward, and as many of half of them
  return to their owners forward.
- ring: rows and ids make P / 2 hops forward, and P - 1 backward, then with their three numbers.
- Memory above the embeddings: the gathered rows (ring: two blocks of n besides the own, one at hand and one arriving),
  and what every process keeps of its own rows: the gradient and two sums by id in float32, and a few numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of an H200: half of the 989 TFLOP/s that its data sheet names for bfloat16 without sparsity, and of what NVLink
# (450 GB/s in one direction) and a network of 400 Gbit/s for each GPU carry at best, four fifths. None is measured.
ASSUMED = {
    "tflops": (495.0, "sustained TFLOP/s of one GPU"),
    "node_gbytes": (360.0, "GB/s that a GPU receives within its node"),
    "network_gbytes": (40.0, "GB/s that a GPU receives between nodes"),
    "width": (128.0, "D"),
}
GPUS_OF_A_NODE = 8
PROCESSES = (8, 64, 256, 1024)
ROWS = tuple(1 << power for power in (16, 18, 20, 22, 24))
OF_A_WAY = ("memory", "waits")
HEADS = ("N", "n", "TFLOP", "compute", "all-gather: bytes", *OF_A_WAY, "ring: bytes", *OF_A_WAY, "plain: bytes")
ID_BYTES, NUMBER_BYTES, ELEMENT_BYTES = 8, 4, 2
FORWARD_UNITS, BACKWARD_UNITS = 1.0, 2.0
# Numbers of a row that travel: its log-sum-exp, and sum and number of its positives; their gradients and the first.
NUMBERS = 3


@dataclass(frozen=True)
class Step:
    """Of one process; seconds are those of the arithmetic and of the bytes, each alone."""

    rows: int
    processes: int
    width: int
    tflops: float
    gbytes: float

    @property
    def own(self) -> float:
        return self.rows / self.processes

    @property
    def row_bytes(self) -> int:
        return self.width * ELEMENT_BYTES + ID_BYTES

    def unit_seconds(self, units: float) -> float:
        return units * 2 * self.rows**2 * self.width / self.processes / (self.tflops * 1e12)

    @property
    def seconds(self) -> float:
        return self.unit_seconds(FORWARD_UNITS + BACKWARD_UNITS)

    @property
    def gather_bytes(self) -> float:
        others = self.rows - self.own
        return others * (self.row_bytes + 1.5 * NUMBERS * NUMBER_BYTES)

    @property
    def ring_bytes(self) -> float:
        hops = self.processes // 2 + self.processes - 1
        return self.own * (hops * self.row_bytes + 1.5 * (self.processes - 1) * NUMBERS * NUMBER_BYTES)

    @property
    def plain_bytes(self) -> float:
        """Of an all-gather that autograd goes through: the gradients of all rows are summed over all processes."""
        return 3 * (self.rows - self.own) * self.width * ELEMENT_BYTES

    @property
    def kept_bytes(self) -> float:
        """Of the own rows: the gradient and two sums by id in float32, the numbers, their gradients."""
        return self.own * (3 * 4 * self.width + 4 * NUMBERS * NUMBER_BYTES)

    @property
    def gather_memory(self) -> float:
        return self.rows * (self.row_bytes + NUMBERS * NUMBER_BYTES) + self.kept_bytes

    @property
    def ring_memory(self) -> float:
        return 2 * self.own * (self.row_bytes + NUMBERS * NUMBER_BYTES) + self.kept_bytes

    def seconds_of(self, sent: float) -> float:
        return sent / (self.gbytes * 1e9)

    @property
    def gather_share(self) -> float:
        """Of the step that waits, if nothing but the own block hides the all-gather."""
        own_block = self.unit_seconds(FORWARD_UNITS) / self.processes
        waits = max(0.0, self.seconds_of(self.gather_bytes) - own_block)
        return waits / (waits + self.seconds)

    @property
    def ring_share(self) -> float:
        """Of the step that waits, each hop being hidden by the block before it."""
        waits = max(0.0, self.seconds_of(self.ring_bytes) - self.seconds)
        return waits / (waits + self.seconds)


def break_even_rows(width: int, tflops: float, gbytes: float) -> float:
    """Own rows n from which the forward work on a block, n x n x D, takes as long as the next block's arrival."""
    row_seconds = (width * ELEMENT_BYTES + ID_BYTES) / (gbytes * 1e9)
    return row_seconds / (2 * 2 * FORWARD_UNITS * width / (tflops * 1e12))


def plan(tflops: float, node_gbytes: float, network_gbytes: float, width: float) -> str:
    """The tables of docs/scaling.md."""
    width, blocks = int(width), []
    for processes in PROCESSES:
        gbytes = node_gbytes if processes <= GPUS_OF_A_NODE else network_gbytes
        lines = [
            f"**{processes:,} GPUs**, {gbytes:g} GB/s each:",
            "",
            f"| {' | '.join(HEADS)} |",
            "|---" * len(HEADS) + "|",
        ]
        for rows in ROWS:
            step = Step(rows, processes, width, tflops, gbytes)
            cells = [
                _count(rows),
                f"{step.own:,.0f}",
                f"{step.seconds * tflops:,.3g}",
                _seconds(step.seconds),
                _bytes(step.gather_bytes),
                _bytes(step.gather_memory),
                f"{step.gather_share:.0%}",
                _bytes(step.ring_bytes),
                _bytes(step.ring_memory),
                f"{step.ring_share:.0%}",
                _bytes(step.plain_bytes),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        blocks.append("\n".join(lines))
    hidden = ", ".join(
        f"{break_even_rows(width, tflops, gbytes):,.0f} rows at {gbytes:g} GB/s"
        for gbytes in (node_gbytes, network_gbytes)
    )
    blocks.append(f"A hop of the ring is hidden by the work on a block from n = {hidden} on (D = {width}).")
    return "\n\n".join(blocks)


def _count(rows: int) -> str:
    return f"{rows >> 20}M" if rows >= 1 << 20 else f"{rows >> 10}k"


def _bytes(x: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if x < 1024:
            return f"{x:.3g} {unit}"
        x /= 1024
    return f"{x:.3g} GiB"


def _seconds(x: float) -> str:
    return f"{x:.3g} s" if x >= 1 else f"{x * 1e3:.3g} ms" if x >= 1e-3 else f"{x * 1e6:.3g} µs"
