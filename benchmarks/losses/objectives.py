"""The family of objectives: time and peak memory of a forward and backward against the dense form of each.

The dense form is the module itself with `backend="reference"`, or where it has no backend what is written in
`tests/oracles/matrices.py`: the whole matrix of similarities, in eager mode.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.budget import Run
from benchmarks.harness.contender import Contender, Size
from benchmarks.harness.measure import compare_with_ours, failure_noted, record
from benchmarks.harness.memory import forget_peak, peak_on_cpu, peak_on_gpu, status
from benchmarks.harness.results import ResultsFile, Row, table
from benchmarks.harness.timing import Clock, Step, host_clock, interleave
from benchmarks.losses.correctness import TOLERANCE
from ccl_fast import losses
from tests.oracles import lists, pixels, sorting, terms
from tests.oracles import matrices as dense

CPU = torch.device("cpu")
SECONDS, QUICK_SECONDS = 4.0, 0.5
ADMISSION = Size(96, 16, clusters=24)
K = 1000
# N x K scores of this one would take 24 GiB.
MAX_PROTOTYPES = Size(65_536, 128, clusters=100_000)


@dataclass
class ObjectiveRow(Row):
    objective: str = ""  # the name in ccl_fast.losses


class Inputs(NamedTuple):
    embeddings: Tensor  # [n / 2, 2, d]: two views; a leaf that requires a gradient
    cluster_ids: Tensor  # [n / 2]
    centers: Tensor  # [clusters, d]: centres, prototypes or a queue
    more: tuple  # what else the objective is given

    @property
    def leaves(self) -> list[Tensor]:
        return [x for x in (self.embeddings, self.centers, *self.more) if _requires_grad(x)]


def _requires_grad(x) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


Loss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class Objective:
    """`contenders` map names to what makes the loss: "ours", "dense" and those of other packages."""

    name: str  # in ccl_fast.losses
    contenders: dict[str, Contender]
    learns_centers: bool = False
    more: Callable[[Inputs], tuple] = lambda x: ()
    clusters: int = K
    largest: int = 65_536  # number of rows; one that costs more than N^2 D is not measured at the larger ones

    def inputs(self, size: Size, device: torch.device, seed: int = 0) -> Inputs:
        random = torch.Generator(device).manual_seed(seed)
        n = size.n // 2
        x = Inputs(
            torch.randn(n, 2, size.d, generator=random, device=device).to(size.dtype).requires_grad_(),
            torch.randint(size.clusters, (n,), generator=random, device=device),
            torch.randn(size.clusters, size.d, generator=random, device=device).to(size.dtype),
            (),
        )
        x.centers.requires_grad_(self.learns_centers)
        return x._replace(more=self.more(x))

    def step(self, loss: Loss, inputs: Inputs) -> Step:
        def step() -> None:
            torch.autograd.grad(loss(inputs), inputs.leaves)

        return step

    def error(self, contender: Contender, size: Size, device: torch.device) -> float:
        """The largest relative error of value and gradients (in the 2-norm) against the dense form in float64."""
        size = replace(ADMISSION, dtype=size.dtype)
        inputs = self.inputs(size, device, seed=1)
        wide = Inputs(*(_wide(x) for x in inputs[:3]), tuple(_wide(x) for x in inputs.more))
        truth = _evaluate(self.contenders["dense"].build(self), wide)
        found = _evaluate(contender.build(self), inputs)
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]
        return max(errors, key=lambda e: float("inf") if e != e else e)


def _wide(x):
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.layout != torch.strided:
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def _evaluate(loss: Loss, inputs: Inputs) -> list[Tensor]:
    value = loss(inputs)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, inputs.leaves))]


def _module(name: str, call: Callable[[Callable, Inputs], Tensor], **options) -> dict[str, Contender]:
    """Ours, and the same with the dense backend."""

    def build(backend: str) -> Callable[[Objective], Loss]:
        def make(_: Objective) -> Loss:
            module = getattr(losses, name)(backend=backend, **options)
            return lambda x: call(module, x)

        return make

    return {
        "ours": Contender("ours", build("auto"), "as a user calls it"),
        "dense": Contender("dense", build("reference"), "our own dense reference in eager mode", arrays=_matrices),
    }


def _matrices(size: Size) -> int:
    """Bytes of a handful of N x N or N x K arrays."""
    return 24 * size.n * max(size.n, size.clusters)


def _lightly_swav(_: Objective) -> Loss:
    from lightly.loss import SwaVLoss

    loss = SwaVLoss(sinkhorn_gather_distributed=False)

    def swav(x: Inputs) -> Tensor:
        unit = torch.nn.functional.normalize
        scores = [unit(view, dim=1) @ unit(x.centers, dim=1).T for view in x.embeddings.unbind(1)]
        return loss(scores, [])

    return swav


LIGHTLY_SWAV = Contender(
    "lightly",
    _lightly_swav,
    "its SwaVLoss of two high-resolution views; unit vectors and scores inside the timed region",
    package="lightly",
    arrays=_matrices,
)


def _written(name: str, call: Callable, dense: Callable, arrays=None, **options) -> dict[str, Contender]:
    """Ours, and its dense form in `tests/oracles/matrices.py`: both of a module and inputs."""

    def build(function: Callable) -> Callable[[Objective], Loss]:
        def make(_: Objective) -> Loss:
            module = getattr(losses, name)(**options)
            return lambda x: function(module, x)

        return make

    return {
        "ours": Contender("ours", build(call), "as a user calls it"),
        "dense": Contender("dense", build(dense), "the whole matrix, in eager mode", arrays=arrays or _matrices),
    }


def _generator(x: Inputs) -> torch.Generator:
    """The same draws for all contenders."""
    return torch.Generator(x.embeddings.device).manual_seed(0)


def _neighbors(x: Inputs) -> tuple[Tensor]:
    """A graph of eight edges a node, among which there are those to itself."""
    n = len(x.embeddings)
    to = torch.randint(n, (n, 8), generator=_generator(x), device=x.embeddings.device).sort(1).values
    starts = torch.arange(n + 1, device=to.device) * 8
    weights = torch.ones(n * 8, device=to.device)
    return (torch.sparse_csr_tensor(starts, to.flatten(), weights, (n, n), check_invariants=False),)


def _strength(x: Inputs) -> tuple[Tensor]:
    return (torch.rand(len(x.embeddings), generator=_generator(x), device=x.embeddings.device),)


def _targets(x: Inputs) -> tuple[Tensor, Tensor]:
    random, device = _generator(x), x.embeddings.device
    targets = 100 * torch.rand(len(x.embeddings), generator=random, device=device)
    return targets, targets + 5 * torch.randn(len(targets), generator=random, device=device)


def _gates(x: Inputs) -> tuple[Tensor, Tensor]:
    random, shape = _generator(x), x.embeddings[:, 0].shape
    partners = torch.randint(10, shape[:1], generator=random, device=x.embeddings.device)
    gates = torch.rand(shape, generator=random, device=x.embeddings.device).to(x.embeddings.dtype)
    return partners, gates.requires_grad_()


def _lists(x: Inputs) -> tuple[Tensor, Tensor]:
    """Of sentences in topics of eight."""
    n, device = len(x.embeddings), x.embeddings.device
    return losses.segment_neighbors(torch.arange(n, device=device) // 8, 1, 3)


def _maps(x: Inputs) -> Tensor:
    """Samples as pixels, 4 x 4 of each image, of both views."""
    rows = x.embeddings[: len(x.embeddings) // 16 * 16]
    return rows.transpose(0, 1).unflatten(1, (-1, 4, 4))


def _boxes(x: Inputs) -> Tensor:
    corners = torch.rand(2, len(x.embeddings) // 16, 2, generator=_generator(x), device=x.embeddings.device)
    return torch.cat((corners / 2, corners / 2 + 0.5), 2)


def _nearest_labels(x: Inputs) -> tuple[Tensor]:
    return (losses.nearest_centers(x.embeddings[:, 0].detach(), x.centers.detach()),)


def _salient(x: Inputs) -> tuple[Tensor, Tensor]:
    random = _generator(x)
    salient = torch.randn(*x.embeddings.shape[:2], 16, generator=random, device=x.embeddings.device)
    is_target = torch.rand(len(salient), generator=random, device=salient.device) < 0.5
    return salient.to(x.embeddings.dtype).requires_grad_(), is_target


def _pair_weights(x: Inputs) -> tuple[Tensor]:
    weights = torch.rand(len(x.centers), len(x.centers), generator=_generator(x), device=x.centers.device)
    return (weights.requires_grad_(),)


def _bank(x: Inputs) -> tuple[Tensor, Tensor]:
    device, size = x.embeddings.device, len(x.centers)
    labels = torch.randint(max(size // 100, 2), (size,), generator=_generator(x), device=device)
    return labels, torch.arange(len(x.embeddings), device=device) % size


def _pixels(x: Inputs) -> tuple[Tensor, Tensor]:
    """Both views, 16 pixels of each image."""
    return tuple(view.unflatten(0, (-1, 16)) for view in x.embeddings.unbind(1))


def _sets(x: Inputs) -> tuple[Tensor, int]:
    """Rows of queries and documents of 32 each."""
    n = len(x.embeddings)
    return torch.arange(n, device=x.embeddings.device) // 32, -(-n // 32)


def _shuffles(x: Inputs) -> tuple[Tensor]:
    d = x.embeddings.shape[2]
    return (torch.stack([torch.randperm(d, generator=_generator(x), device=x.embeddings.device) for _ in range(2)]),)


def _dense_mochi(loss: losses.MoCHiLoss, x: Inputs) -> Tensor:
    like = torch.zeros((), device=x.embeddings.device)  # the same draws for every dtype
    mixing = loss.draw(len(x.embeddings), min(loss.num_hardest, len(x.centers)), like, _generator(x))
    of = {name: getattr(loss, name) for name in ("num_hardest", "temperature")}
    return dense.mochi(*x.embeddings.unbind(1), x.centers, mixing, **of)


def _dense_interclr(loss: losses.InterCLRLoss, x: Inputs) -> Tensor:
    """With the bank as the queue too."""
    drawn = loss.draw(len(x.embeddings), len(x.centers), x.embeddings, _generator(x))
    of = {name: getattr(loss, name) for name in ("temperature", "inter_weight", "pool", "margin")}
    return dense.interclr(*x.embeddings.unbind(1), x.centers, x.centers, *x.more, *drawn, **of)


def _gated_keys(size: Size) -> int:
    """Bytes of some arrays n x n x d."""
    return 4 * (size.n // 2) ** 2 * size.d * 4


def _mixtures(size: Size) -> int:
    """Bytes of some arrays n x s x d."""
    return 6 * (size.n // 2) * 1024 * size.d * 4


def _heads(x: Inputs) -> tuple[Tensor]:
    """A cluster head's, of 16 numbers."""
    heads = torch.randn(*x.embeddings.shape[:2], 16, generator=_generator(x), device=x.embeddings.device)
    return (heads.to(x.embeddings.dtype).requires_grad_(),)


def _weighted_rows(size: Size) -> int:
    """Bytes of two arrays n x n x d."""
    return 8 * size.n**2 * size.d


def _outer_products(size: Size) -> int:
    """Bytes of two arrays n x d x d."""
    return 8 * size.n * size.d**2


SWAV = _module("SwAVLoss", lambda loss, x: loss(x.embeddings, x.centers)) | {"lightly": LIGHTLY_SWAV}
OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("SwAVLoss", SWAV, learns_centers=True, clusters=3000),  # as many as its authors have
        Objective(
            "ProtoGCDLoss",
            _written(
                "ProtoGCDLoss",
                lambda loss, x: loss(x.embeddings, x.centers, labels=x.cluster_ids),
                lambda loss, x: dense.protogcd(x.embeddings, x.centers, x.cluster_ids, hard_share=loss.hard_share),
                hard_share=0.5,
            ),
            learns_centers=True,
        ),
        Objective(
            "ProtoNCELoss", _module("ProtoNCELoss", lambda loss, x: loss(x.embeddings, [x.cluster_ids], [x.centers]))
        ),
        Objective(
            "DeepClusterV2Loss",
            _module("DeepClusterV2Loss", lambda loss, x: loss(x.embeddings, [x.cluster_ids], [x.centers])),
        ),
        Objective(
            "PamCLoss",
            _module("PamCLoss", lambda loss, x: loss(*x.embeddings.unbind(1), x.cluster_ids), form="node"),
        ),
        Objective("MCLLoss", _module("MCLLoss", lambda loss, x: loss(x.embeddings, [x.cluster_ids])), clusters=32),
        Objective("MEOWLoss", _module("MEOWLoss", lambda loss, x: loss(x.embeddings, x.cluster_ids))),
        Objective(
            "CenterNegativesLoss",
            _module("CenterNegativesLoss", lambda loss, x: loss(x.embeddings, x.cluster_ids, x.centers)),
        ),
        Objective(
            "AdaMEOWLoss",
            _module("AdaMEOWLoss", lambda loss, x: loss(x.embeddings, x.cluster_ids, weights=x.more[0])),
            more=_pair_weights,
            clusters=32,
        ),
        Objective(
            "SBCLLoss", _module("SBCLLoss", lambda loss, x: loss(x.embeddings, x.cluster_ids % 10, x.cluster_ids))
        ),
        Objective(
            "MLCDLoss",
            _written(
                "MLCDLoss",
                lambda loss, x: loss(x.embeddings[:, 0], x.more[0], x.centers),
                lambda loss, x: dense.mlcd(
                    x.embeddings[:, 0], x.more[0], x.centers, temperature=loss.temperature
                ),
                sample=1,
            ),
            learns_centers=True,
            more=_nearest_labels,
            clusters=10_000,
        ),
        Objective(
            "HardContrastiveLoss",
            _written(
                "HardContrastiveLoss",
                lambda loss, x: loss(x.embeddings),
                lambda loss, x: dense.hard_contrastive(
                    x.embeddings, alpha=loss.alpha, temperature=loss.temperature
                ),
            ),
        ),
        Objective("BECLRLoss", _module("BECLRLoss", lambda loss, x: loss(x.embeddings))),
        Objective(
            "CACRLoss",
            _written(
                "CACRLoss",
                lambda loss, x: loss(x.embeddings),
                lambda loss, x: dense.cacr_of_two_views(x.embeddings, loss.t_negative),
            ),
        ),
        Objective(
            "GroCoLoss",
            _written("GroCoLoss", lambda loss, x: loss(x.embeddings), lambda loss, x: sorting.groco(x.embeddings)),
        ),
        Objective(
            "CodingRateLoss",
            _written(
                "CodingRateLoss",
                lambda loss, x: loss(x.embeddings, x.cluster_ids),
                lambda loss, x: dense.coding_rate(x.embeddings, x.cluster_ids, eps=loss.eps),
                arrays=_outer_products,
            ),
            clusters=32,
        ),
        Objective(
            "MLCLoss",
            _written(
                "MLCLoss",
                lambda loss, x: loss(x.embeddings, heads=x.more[0]),
                lambda loss, x: dense.mlc(x.embeddings, x.more[0], temperature=loss.temperature, eps=loss.eps),
                arrays=_weighted_rows,
            ),
            more=_heads,
            largest=2048,
        ),
        Objective(
            "MaxSimLoss",
            _written(
                "MaxSimLoss",
                lambda loss, x: loss(
                    *x.embeddings.unbind(1), query_ids=x.more[0], key_ids=x.more[0], num_ids=x.more[1]
                ),
                lambda loss, x: dense.maxsim(*x.embeddings.unbind(1), x.more[0], x.more[0], x.more[1]),
            ),
            more=_sets,
        ),
        Objective(
            "ConRLoss",
            _written(
                "ConRLoss",
                lambda loss, x: loss(x.embeddings[:, 0], targets=x.more[0], predictions=x.more[1]),
                lambda loss, x: terms.conr(x.embeddings[:, 0], *x.more),
            ),
            more=_targets,
        ),
        Objective(
            "GatedPairLoss",
            _written(
                "GatedPairLoss",
                lambda loss, x: loss(x.embeddings[:, 0], x.cluster_ids % 10, partner_labels=x.more[0], gates=x.more[1]),
                lambda loss, x: terms.gated_pairs(x.embeddings[:, 0], x.cluster_ids % 10, *x.more),
                arrays=_gated_keys,
            ),
            more=_gates,
        ),
        Objective(
            "ListContrastLoss",
            _written(
                "ListContrastLoss",
                lambda loss, x: loss(x.embeddings[:, 0], positives=x.more[0], negatives=x.more[1]),
                lambda loss, x: lists.list_contrast(x.embeddings[:, 0], *x.more),
            ),
            more=_lists,
        ),
        Objective(
            "SubspaceMarginLoss",
            _written(
                "SubspaceMarginLoss",
                lambda loss, x: loss(x.embeddings[:, 0], x.cluster_ids),
                lambda loss, x: lists.subspace_margin(x.embeddings[:, 0], x.cluster_ids),
            ),
            clusters=8,
        ),
        Objective(
            "PixProLoss",
            _written(
                "PixProLoss",
                lambda loss, x: loss(*_maps(x), boxes=x.more[0], key_boxes=x.more[1]),
                lambda loss, x: pixels.pixpro(*_maps(x), *x.more),
            ),
            more=_boxes,
        ),
        Objective(
            "MoCHiLoss",
            _written(
                "MoCHiLoss",
                lambda loss, x: loss(*x.embeddings.unbind(1), negatives=x.centers, generator=_generator(x)),
                _dense_mochi,
                arrays=_mixtures,
            ),
            clusters=16_384,
        ),
        Objective(
            "FeatureTransformationLoss",
            _module(
                "FeatureTransformationLoss",
                lambda loss, x: loss(*x.embeddings.unbind(1), negatives=x.centers, generator=_generator(x)),
            ),
            clusters=16_384,
        ),
        Objective(
            "InterCLRLoss",
            _written(
                "InterCLRLoss",
                lambda loss, x: loss(
                    *x.embeddings.unbind(1),
                    negatives=x.centers,
                    bank=x.centers,
                    bank_cluster_ids=x.more[0],
                    indices=x.more[1],
                    generator=_generator(x),
                ),
                _dense_interclr,
            ),
            more=_bank,
            clusters=16_384,
        ),
        Objective(
            "SCGCLoss",
            _module("SCGCLoss", lambda loss, x: loss(x.embeddings[:, 0], influence=x.more[0])),
            more=_neighbors,
        ),
        Objective("CMIMLoss", _module("CMIMLoss", lambda loss, x: loss(x.embeddings.flatten(0, 1)))),
        Objective(
            "CSGCLLoss",
            _module("CSGCLLoss", lambda loss, x: loss(*x.embeddings.unbind(1), strength=x.more[0])),
            more=_strength,
        ),
        Objective(
            "SlotConLoss",
            _written(
                "SlotConLoss",
                lambda loss, x: loss(*_pixels(x), x.centers),
                lambda loss, x: dense.slotcon(*_pixels(x), x.centers),
            ),
            learns_centers=True,
            clusters=256,
        ),
        Objective("LightGCLLoss", _module("LightGCLLoss", lambda loss, x: loss(*x.embeddings.unbind(1)))),
        Objective(
            "SepCLRLoss",
            _module("SepCLRLoss", lambda loss, x: loss(x.embeddings, salient=x.more[0], is_target=x.more[1])),
            more=_salient,
        ),
        Objective(
            "WhitenedCSELoss",
            _module("WhitenedCSELoss", lambda loss, x: loss(x.embeddings, shuffles=x.more[0]), groups=8),
            more=_shuffles,
        ),
    )
}  # fmt: skip


def find(case: str, contender: str) -> tuple[Objective, Contender]:
    """For the process that measures memory."""
    return OBJECTIVES[case], OBJECTIVES[case].contenders[contender]


def run_cpu(quick: bool, directory: Path, names: Collection[str] = ()) -> str:
    """Measure these, or all."""
    file, all_rows = ResultsFile("cpu-objectives", CPU, directory), []
    for objective in (OBJECTIVES[name] for name in names or OBJECTIVES):
        for n in (512,) if quick else (2048, 8192):
            if n > objective.largest:
                continue
            size = Size(n, 128, clusters=objective.clusters)
            rows, steps = _measure(objective, size, CPU, host_clock, QUICK_SECONDS if quick else SECONDS)
            for name in steps if not quick else ():
                rows[name].peak_bytes = peak_on_cpu(find, objective.name, name, size)
            file.add(list(rows.values()))
            all_rows += rows.values()
    if not quick and not names:
        row = _most_prototypes()
        file.add([row])
        all_rows.append(row)
    return f"{table(all_rows)}\n\n{file.path}"


def _most_prototypes() -> ObjectiveRow:
    """SwAV alone, one step: minutes, in memory that does not grow with the matrix of scores."""
    objective, size = OBJECTIVES["SwAVLoss"], MAX_PROTOTYPES
    row, loss = _row(objective, "ours", size), objective.contenders["ours"].build(objective)
    objective.step(loss, objective.inputs(ADMISSION, CPU))()  # libraries load, threads start
    step = objective.step(loss, objective.inputs(size, CPU))
    before = forget_peak()
    row.p20 = row.p50 = row.p80 = host_clock(step)
    row.repetitions, row.peak_bytes = 1, status("VmHWM") - before
    return row


def run_gpu(dry_run: bool, directory: Path) -> str:
    return _ObjectivesRun("gpu-objectives", torch.device("cpu" if dry_run else "cuda"), directory).table()


class _ObjectivesRun(Run):
    def table(self) -> str:
        for objective in OBJECTIVES.values():
            for n in (8192, 65_536) if self.on_gpu else (64,):
                if n > objective.largest:
                    continue
                size = Size(n, 128 if self.on_gpu else 16, clusters=objective.clusters if self.on_gpu else 8)
                work = size.n * max(size.n, size.clusters) * size.d
                keys = {name: (objective.name, name) for name in objective.contenders}
                rows, steps = _measure(
                    objective, size, self.device, self.clock, 0.5 if self.on_gpu else 0.0, self.skip(keys, 6 * work)
                )
                for name, step in steps.items():
                    self.pace[keys[name]] = rows[name].p50 / work
                    if self.on_gpu:
                        rows[name].peak_bytes = peak_on_gpu(step)
                self.add(list(rows.values()))
        return f"{table(self.rows)}\n\n{self.file.path}"


def _row(objective: Objective, contender: str, size: Size) -> ObjectiveRow:
    dtype = str(size.dtype).removeprefix("torch.")
    return ObjectiveRow(
        objective.name, contender, size.n, size.d, dtype, clusters=size.clusters, objective=objective.name
    )


def _measure(
    objective: Objective,
    size: Size,
    device: torch.device,
    clock: Clock,
    seconds: float,
    skip: dict[str, str] | None = None,
) -> tuple[dict[str, ObjectiveRow], dict[str, Step]]:
    """A row for every contender, and the steps of those that were timed."""
    inputs = objective.inputs(size, device)
    rows, steps = {}, {}
    for name, contender in objective.contenders.items():
        row = rows[name] = _row(objective, name, size)
        row.note = (skip or {}).get(name) or contender.obstacle(size, device) or ""
        if row.note:
            continue
        with failure_noted(row):
            row.error = objective.error(contender, size, device)
            if not row.error <= TOLERANCE[size.dtype]:
                row.note = f"wrong: relative error {row.error:.1e} against float64"
                continue
            step = objective.step(contender.build(objective), inputs)
            clock(step)
            steps[name] = step
    times = interleave(steps, clock, seconds)
    for name, t in times.items():
        record(rows[name], t)
    compare_with_ours(rows, times)
    return rows, steps
