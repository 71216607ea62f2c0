"""What a harvest measures; the prediction and the import know the cases by these names."""

from typing import NamedTuple


class Problem(NamedTuple):
    """Self-contrast of n unit rows by `streaming_logsumexp`; with ids also the sum over the same id, as in "inside"."""

    n: int
    d: int
    ids: bool = False

    @property
    def name(self) -> str:
        return "self-contrast with ids" if self.ids else "self-contrast"


# In the order of their worth, as all lists here.
PROBLEMS = (
    Problem(65_536, 128),
    Problem(65_536, 768),
    Problem(8192, 128),
    Problem(65_536, 256),
    Problem(65_536, 1024),
    Problem(262_144, 128),
    Problem(65_536, 128, ids=True),
    Problem(8192, 768),
    Problem(8192, 256),
    Problem(8192, 1024),
)
LARGE = (Problem(1_048_576, 128),)
CLIP = (2 * 65_536, 768)  # rows of both towers, D: of the second call
PASSES = ("forward", "backward")
MODES = ("graph", "eager")  # a graph's replay on the device's clock; calls as a caller waits for them
PRODUCTS = "two products"
RIVAL_SIZES = ((8192, 128), (65_536, 128))
CLUSTER_RIVAL_SIZES = ((1_000_000, 128, 1000), (1_000_000, 512, 4000))

# Launches to try besides the shipped one, at N = 65,536: (block_m, block_n, block_d, num_warps, num_stages) by
# kernel and D. One that does not fit the device is a line with a note.
ROWS_OF_LAUNCHES = 65_536
CANDIDATES: dict[tuple[str, int], tuple[tuple[int, int, int, int, int], ...]] = {
    ("backward_rows", 128): (
        (128, 64, 128, 8, 3),
        (64, 64, 128, 4, 4),
        (128, 64, 128, 8, 4),
        (128, 128, 128, 8, 2),
    ),
    ("forward_triangle", 128): (
        (128, 64, 128, 8, 3),
        (128, 64, 128, 4, 4),
        (128, 128, 128, 8, 3),
        (64, 64, 128, 4, 3),
    ),
    ("backward_weights", 768): (
        (128, 64, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 256, 64, 8, 3),
        (128, 128, 128, 8, 2),
    ),
    ("backward_rows", 256): (
        (64, 64, 256, 4, 2),
        (64, 64, 256, 4, 3),
        (64, 64, 256, 8, 2),
        (128, 64, 256, 8, 2),
    ),
    ("forward_triangle", 768): (
        (128, 128, 32, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 2),
    ),
    ("forward_triangle", 256): (
        (128, 128, 64, 8, 3),
        (128, 128, 64, 4, 4),
        (128, 128, 128, 8, 2),
        (128, 64, 256, 8, 2),
    ),
}


class Clustering(NamedTuple):
    """One assignment of n rows to the nearest of k centres, and the sums by cluster."""

    n: int
    d: int
    k: int
    dtype: str = "float16"


CLUSTERINGS = (
    Clustering(1_000_000, 128, 1000),
    Clustering(1_000_000, 128, 10_000),
    Clustering(1_000_000, 512, 4000),
    Clustering(1_000_000, 2048, 10_000),
    Clustering(1_000_000, 128, 1000, "float32"),
    Clustering(1_000_000, 128, 1000, "bfloat16"),
)
ITERATIONS = 3  # of which the first and the last are timed: centres that are rows, and means


def loss_keys() -> list[dict]:
    """Of the lines of stage `losses` that a harvest must have, less those of the rivals."""
    ours = [
        {"case": p.name, "n": p.n, "d": p.d, "contender": "ours", "pass": which, "mode": mode}
        for p in PROBLEMS
        for which in PASSES
        for mode in MODES
    ]
    return ours + [{"case": PRODUCTS, "n": p.n, "d": p.d, "contender": PRODUCTS} for p in PROBLEMS if not p.ids]


def launch_keys() -> list[dict]:
    """Of the lines of stage `launches`."""
    return [
        {"kernel": kernel, "d": d, "tried": tried}
        for (kernel, d), launches in CANDIDATES.items()
        for tried in ("shipped", *map(str, launches))
    ]


def cluster_keys() -> list[dict]:
    """Of the lines of stage `kmeans`."""
    return [
        {"case": "k-means", "n": c.n, "d": c.d, "clusters": c.k, "dtype": c.dtype, "iteration": iteration}
        for c in CLUSTERINGS
        for iteration in (1, ITERATIONS)
    ]
