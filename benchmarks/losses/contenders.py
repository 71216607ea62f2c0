"""Who competes, each in its fair configuration: a function from the inputs to the loss.

All of them normalise inside the timed region, and all are held to the value and the gradient of the same float64
loss (`correctness`) before they are timed.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.harness.contender import Contender
from benchmarks.losses.cases import CASES, TEMPERATURE, Case, Inputs

Loss = Callable[[Inputs], Tensor]


def _ccl(backend: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        loss = case.loss(backend)
        return lambda x: loss(x.embeddings, x.cluster_ids, x.centers)

    return build


def _plain(case: Case) -> Loss:
    return lambda x: case.plain(x.embeddings, x.cluster_ids, x.centers)


def _compiled(case: Case) -> Loss:
    torch.compiler.reset()  # or the limit of recompilations would silently return it to eager mode
    loss = torch.compile(case.plain, dynamic=False)
    return lambda x: loss(x.embeddings, x.cluster_ids, x.centers)


def _metric_learning(name: str) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        from pytorch_metric_learning import losses

        loss = getattr(losses, name)(temperature=TEMPERATURE)

        def on_rows(x: Inputs) -> Tensor:
            rows, ids = x.embeddings, x.cluster_ids
            if ids is None:
                ids = torch.arange(rows.shape[0], device=rows.device).repeat_interleave(rows.shape[1])
            return loss(rows.flatten(0, -2), ids)

        return on_rows

    return build


def _lightly(case: Case) -> Loss:
    from lightly.loss import NTXentLoss

    loss = NTXentLoss(TEMPERATURE)
    return lambda x: loss(*x.embeddings.unbind(1))


def _linear_cross_entropy(case: Case) -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()

    def clip(x: Inputs) -> Tensor:
        first, second = (normalize(tower, dim=1) for tower in x.embeddings.unbind(1))
        own = torch.arange(first.shape[0], device=first.device)
        losses = [
            torch.nn.functional.linear_cross_entropy(q / TEMPERATURE, k, own, options=options)
            for q, k in ((first, second), (second, first))
        ]
        return (losses[0] + losses[1]) / 2

    return clip


def _inf_cl_towers(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    def clip(x: Inputs) -> Tensor:
        towers = (normalize(tower.float(), dim=1).to(tower.dtype).float() for tower in x.embeddings.unbind(1))
        first, second = (tower.contiguous() for tower in towers)
        head = next(h for h in (256, 128, 64, 32, 16) if first.shape[1] % h == 0)
        directions = [
            cal_flash_loss(q, k, scale=1 / TEMPERATURE, head_dim=head).mean()
            for q, k in ((first, second), (second, first))
        ]
        return (directions[0] + directions[1]) / 2

    return clip


def _inf_cl(case: Case) -> Loss:
    from inf_cl import cal_flash_loss

    def nt_xent(x: Inputs) -> Tensor:
        rows = x.embeddings.flatten(0, 1)
        # Rounded to the input's dtype as by all; its products of bfloat16 numbers are then exact in TF32.
        z = normalize(rows.float(), dim=1).to(rows.dtype).float()
        partner = torch.arange(z.shape[0], device=z.device) ^ 1
        head = next(h for h in (256, 128, 64, 32, 16) if z.shape[1] % h == 0)
        with_own = cal_flash_loss(z, z, labels=partner, scale=1 / TEMPERATURE, head_dim=head)
        # Its sum counts the anchor itself, NT-Xent does not: O(n d) work takes that term out again.
        own = (torch.linalg.vecdot(z, z) - torch.linalg.vecdot(z, z[partner])) / TEMPERATURE - with_own
        return (with_own + torch.log1p(-own.exp())).mean()

    return nt_xent


def _memeff(case: Case) -> Loss:
    from memeff import MemoryEfficientQwen3Loss

    # margin 2 switches its false-negative mask off.
    loss = MemoryEfficientQwen3Loss(TEMPERATURE, margin=2.0, use_qq_negatives=True, stable=False)

    def nt_xent(x: Inputs) -> Tensor:
        first, second = x.embeddings.unbind(1)
        return (loss(first, second) + loss(second, first)) / 2

    return nt_xent


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("ours", _ccl("auto"), "as a user calls it; the backend is the one for the device"),
        Contender(
            "dense",
            _plain,
            "the plain formula in eager mode: what a user writes (tests/oracles/plain.py)",
            arrays=lambda size: 24 * size.n**2,
        ),
        Contender(
            "dense compiled",
            _compiled,
            "the same under torch.compile for this very shape; compilation is outside the timed region",
            arrays=lambda size: 8 * size.n**2,
        ),
        Contender(
            "metric-learning SupCon",
            _metric_learning("SupConLoss"),
            "the package's dense path; on sample ids it equals NT-Xent. It has no centres: in CCL it does less",
            package="pytorch_metric_learning",
            ignores_centers=True,
            arrays=lambda size: 48 * size.n**2,
        ),
        Contender(
            "metric-learning NTXent",
            _metric_learning("NTXentLoss"),
            "the package's loss of that name; it compares every positive pair with every negative pair",
            package="pytorch_metric_learning",
            arrays=lambda size: 18 * size.n**3,
        ),
        Contender(
            "lightly",
            _lightly,
            "its NTXentLoss of two views, without memory bank",
            package="lightly",
            arrays=lambda size: 24 * size.n**2,
        ),
        Contender(
            "torch linear_cross_entropy",
            _linear_cross_entropy,
            "torch's own chunked form, default options, a call for each direction with the other tower as weight",
            attribute="LinearCrossEntropyOptions",
        ),
        Contender(
            "inf-cl towers",
            _inf_cl_towers,
            "one call for each direction, the largest head dimension that divides d; float32 with TF32 products",
            package="inf_cl",
            cuda_only=True,
        ),
        Contender(
            "inf-cl",
            _inf_cl,
            "all rows against all rows in one call, the largest head dimension that divides d; "
            "it computes in float32 with TF32 products whatever the input",
            package="inf_cl",
            cuda_only=True,
        ),
        Contender(
            "memeff",
            _memeff,
            "its loss with query-query negatives, once from each view; bfloat16 products; stable=False, "
            "as the default rescales the gradient",
            package="memeff",
            cuda_only=True,
        ),
    )
}


def find(case: str, contender: str) -> tuple[Case, Contender]:
    """For the process that measures memory."""
    return CASES[case], CONTENDERS[contender]
