"""The parts of a training step on small natural images: two views of every image, the network, the loss.

Views as the library makes them and as a chain of kornia's transforms does, which the library had before; the narrow
ResNet of the recipe for two cores, forward, backward and the optimiser's step; CCL's loss, forward and backward. N is
the number of images of a step.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.harness.contender import Size
from benchmarks.harness.measure import compare_with_ours, record
from benchmarks.harness.results import DIRECTORY, ResultsFile, Row, table
from benchmarks.harness.timing import Clock, DeviceClock, Step, host_clock, interleave
from benchmarks.losses.cases import CASES
from benchmarks.losses.contenders import CONTENDERS
from ccl_fast.data import Views
from ccl_fast.models import Model

SHAPE, WIDTH, CLUSTERS = (3, 32, 32), 128, 300
N, GPU_N, QUICK_N = 256, 1024, 16
SECONDS, QUICK_SECONDS = 30.0, 0.5
NETWORKS = {"cpu": "resnet8", "cuda": "resnet18"}


def kornia_views() -> nn.Module:
    from kornia import augmentation as K  # not everywhere

    return nn.Sequential(
        K.RandomResizedCrop(SHAPE[1:], scale=(0.2, 1), cropping_mode="resample"),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        K.RandomGrayscale(p=0.2),
    )


def steps(n: int, device: torch.device) -> dict[tuple[str, str], Step]:
    """(part, contender) -> what is timed."""
    images = torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0)).to(device)
    backbone = NETWORKS[device.type]
    model = Model(backbone, SHAPE, WIDTH).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    views = images.repeat(2, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    case = CASES["ccl"]
    loss = case.step(CONTENDERS["ours"].build(case), case.inputs(Size(2 * n, WIDTH, clusters=CLUSTERS), device))

    def network() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = model(views)
        embeddings.float().square().mean().backward()
        optimizer.step()

    def twice(transform: nn.Module) -> Step:
        def step() -> Tensor:
            return torch.stack([transform(images), transform(images)], dim=1)

        return step

    return {
        ("views", "ours"): twice(Views("simclr", SHAPE)),
        ("views", "kornia"): twice(kornia_views()),
        (f"{backbone}, bfloat16", "ours"): network,
        ("ccl", "ours"): loss,
    }


def measure(n: int, device: torch.device, clock: Clock, seconds: float) -> list[Row]:
    timed = steps(n, device)
    for step in timed.values():
        clock(step)
    times = interleave(timed, clock, seconds)
    rows = {key: Row(part, name, n, WIDTH, "float32") for key in times for part, name in [key]}
    for key, row in rows.items():
        record(row, times[key])
    views = {name: times["views", name] for name in ("ours", "kornia")}
    compare_with_ours({name: rows["views", name] for name in views}, views)
    return list(rows.values())


def _run(n: int, device: torch.device, clock: Clock, seconds: float, file: ResultsFile | None) -> str:
    rows = measure(n, device, clock, seconds)
    if file:
        file.add(rows)
    ours = {row.case: row.p50 for row in rows if row.contender == "ours"}
    share = (ours["views"] + ours["ccl"]) / sum(ours.values())
    return table(rows) + f"\nviews and loss: {share:.1%} of a step"


def run_cpu(quick: bool = False, directory: Path = DIRECTORY) -> str:
    cpu = torch.device("cpu")
    if quick:
        return _run(QUICK_N, cpu, host_clock, QUICK_SECONDS, None)
    return _run(N, cpu, host_clock, SECONDS, ResultsFile("step", cpu, directory))


def run_gpu(dry_run: bool = False, directory: Path = DIRECTORY) -> str:
    if dry_run:
        return run_cpu(quick=True)
    cuda = torch.device("cuda")
    return _run(GPU_N, cuda, DeviceClock(cuda), SECONDS, ResultsFile("step", cuda, directory))
