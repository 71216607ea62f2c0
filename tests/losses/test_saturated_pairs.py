"""Losses whose positives outweigh all else: close views, cold temperatures.

Exact is what float64 makes of log(1 + the rest over the positive)."""

import pytest
import torch

from ccl_fast.losses import (
    CCLLoss,
    CenterNegativesLoss,
    DeepClusterV2Loss,
    FeatureTransformationLoss,
    HardContrastiveLoss,
    InfoNCELoss,
    InterCLRLoss,
    LightGCLLoss,
    MoCHiLoss,
    ProtoNCELoss,
    SBCLLoss,
    SupConLoss,
    WhitenedCSELoss,
)
from tests.processes import run
from tests.tolerance import FLOOR

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:(divide by zero|overflow|invalid value) encountered:RuntimeWarning"),
]


def near_views(n, spread=0.05, apart=1.0, d=32, seed=0):
    """Two views [n, 2, d] that differ by about `spread` of their length. Every second sample is about `apart` from the
    one before it, so that no loss is as good as 0."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(n, d, generator=generator, dtype=torch.float64)
    samples[1::2] = samples[0::2] + apart * torch.randn(n // 2, d, generator=generator, dtype=torch.float64)
    views = samples[:, None] + spread * torch.randn(n, 2, d, generator=generator, dtype=torch.float64)
    return views / views.norm(dim=-1, keepdim=True)


def rows_of(case, x):
    """(anchors, keys, mask of candidates, mask of positives) of the use: [n, 2, d] -> similarities of unit rows."""
    z, n = torch.nn.functional.normalize(x, dim=-1), len(x)
    q, k = z[:, 0], z[:, 1]
    one = torch.eye(n, dtype=torch.bool)
    if case == "one tower":
        return q @ k.T, torch.ones_like(one), one
    if case == "two towers":
        s = q @ k.T
        return torch.cat((s, s.T)), torch.ones(2 * n, n, dtype=torch.bool), torch.cat((one, one))
    rows = z.transpose(0, 1).flatten(0, 1)
    itself = torch.eye(2 * n, dtype=torch.bool)
    return rows @ rows.T, ~itself, one.repeat(2, 2) & ~itself


def exact(case, x, temperature):
    s, candidates, positive = rows_of(case, x)
    s = s / temperature
    rest = s.masked_fill(~candidates | positive, -torch.inf).logsumexp(1)
    return torch.log1p((rest - s[positive]).exp())


def plain(case, x, temperature):
    """A careful dense loss."""
    s, candidates, positive = rows_of(case, x)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) / temperature
    return -s.masked_fill(~candidates, -torch.inf).log_softmax(1)[positive]


def ours(case, x, temperature, backend):
    options = {"reduction": "none", "backend": backend}
    if case == "nt-xent":
        return InfoNCELoss(temperature, **options)(x).T.flatten()
    if case == "two towers":
        return InfoNCELoss(temperature, **options)(x[:, 0], x[:, 1]).T.flatten()
    if case == "one tower":
        return InfoNCELoss(temperature, symmetric=False, **options)(x[:, 0], x[:, 1])
    if case == "supcon":
        return SupConLoss(temperature, **options)(x, torch.arange(len(x))).T.flatten()
    if case == "supcon inside":
        return SupConLoss(temperature, form="inside", **options)(x, torch.arange(len(x))).T.flatten()
    assert case == "ccl"
    return CCLLoss(temperature, **options)(x).T.flatten()


CASES = ("nt-xent", "two towers", "one tower", "supcon", "supcon inside", "ccl")
BACKENDS = (
    ("reference", torch.float32),
    ("blocked", torch.float32),
    ("blocked", torch.bfloat16),
    ("blocked", torch.float16),
    ("auto", torch.float32),
    ("auto", torch.bfloat16),
    ("triton", torch.float32),
    ("triton", torch.float16),
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("n", (6, 70))
@pytest.mark.parametrize("temperature", (0.01, 0.02, 0.05))
@pytest.mark.parametrize("backend, dtype", BACKENDS)
def test_loss_and_gradient(case, n, temperature, backend, dtype):
    if backend == "triton":
        pytest.importorskip("triton")
    x = near_views(n).to(dtype)

    def run(loss, x):
        x = x.clone().requires_grad_()
        losses = loss(x)
        (grad,) = torch.autograd.grad(losses.mean(), x)
        return losses.detach().double(), grad.double()

    value, gradient = run(lambda x: exact(case, x, temperature), x.double())
    assert 0 < value.mean() < 0.2  # saturated, and not 0
    actual = run(lambda x: ours(case, x, temperature, backend), x)
    expected = run(lambda x: plain(case, x, temperature), x)
    assert (actual[0] >= 0).all()
    for a, p, e in zip(actual, expected, (value, gradient), strict=True):
        assert (a - e).norm() <= 2 * (p - e).norm() + FLOOR[dtype] * e.norm()


def test_the_plain_loss_is_worse():
    """What the tests above allow is not what is reached: the float32 error is that of the products alone."""
    x = near_views(70, apart=30.0, d=128)
    found = {}
    for name, loss in (
        ("exact", lambda x: exact("nt-xent", x, 0.05)),
        ("plain", lambda x: plain("nt-xent", x.float(), 0.05)),
        ("ours", lambda x: ours("nt-xent", x.float(), 0.05, "blocked")),
    ):
        leaf = x.clone().requires_grad_()
        found[name] = torch.autograd.grad(loss(leaf).mean(), leaf)[0]
    error = {name: float((found[name] - found["exact"]).norm() / found["exact"].norm()) for name in ("plain", "ours")}
    assert error["ours"] < 1e-5 < error["plain"], error


def test_learned_temperature():
    x = near_views(30)
    found = []
    for dtype in (torch.float32, torch.float64):
        loss_fn = InfoNCELoss(0.02, learnable_temperature=True).to(dtype)
        loss_fn(x[:, 0].to(dtype), x[:, 1].to(dtype)).backward()
        found.append(loss_fn.log_temperature.grad.double())
    torch.testing.assert_close(*found, rtol=1e-4, atol=0)


# ---- every loss of a single positive ----


def _queue(x):
    return torch.nn.functional.normalize(x.detach().flatten(0, 1) + 0.3 * torch.ones_like(x.flatten(0, 1)), dim=1)


def _clusters(n, k=3):
    return torch.arange(n) % k


FAMILY = {
    "InfoNCE, a queue": lambda x, o: InfoNCELoss(0.02, **o)(x, negatives=_queue(x)),
    "MoCo": lambda x, o: InfoNCELoss(0.02, symmetric=False, in_batch_negatives=False, **o)(
        x[:, 0], x[:, 1], negatives=_queue(x)
    ),
    "CCL split": lambda x, o: CCLLoss(0.02, form="split", **o)(x, torch.arange(len(x)), x[:, 0].detach()),
    "CCL joint, centres alone": lambda x, o: CCLLoss(0.02, **o)(x[:, 0], torch.arange(len(x)), x[:, 1].detach()),
    "CCL joint, unassigned": lambda x, o: CCLLoss(0.02, **o)(
        x, torch.full((len(x),), -1), torch.eye(x.shape[2], dtype=x.dtype)
    ),
    "CCL joint, weight 0": lambda x, o: CCLLoss(0.02, center_weight=0.0, **o)(
        x, torch.arange(len(x)), -x[:, 0].detach()
    ),
    "CCL inside": lambda x, o: CCLLoss(0.02, form="inside", **o)(x, torch.arange(len(x)), x[:, 0].detach()),
    "CCL with an instance weight": lambda x, o: CCLLoss(0.02, instance_weight=0.5, **o)(x),
    "CCL inside with an instance weight": lambda x, o: CCLLoss(0.02, form="inside", instance_weight=0.5, **o)(x),
    "centres as negatives": lambda x, o: CenterNegativesLoss(0.02, **o)(
        x, _clusters(len(x)), torch.eye(x.shape[2], dtype=x.dtype)[:3]
    ),
    "ProtoNCE": lambda x, o: ProtoNCELoss(0.02, **o)(x, [torch.arange(len(x))], [x[:, 0].detach()]),
    "DeepCluster-v2": lambda x, o: DeepClusterV2Loss(0.02, **o)(x[:, 0], [torch.arange(len(x))], [x[:, 1].detach()]),
    "hard": lambda x, o: HardContrastiveLoss(0.02, alpha=0.3, **o)(x),
    "MoCHi": lambda x, o: MoCHiLoss(0.02, num_hardest=4, num_synthetic=0, num_with_query=0, **o)(
        x[:, 0], x[:, 1], negatives=_queue(x)
    ),
    "feature transformation": lambda x, o: FeatureTransformationLoss(
        0.02, positive_alpha=None, negative_alpha=None, **o
    )(x[:, 0], x[:, 1], negatives=_queue(x)),
    "InterCLR": lambda x, o: InterCLRLoss(0.02, inter_weight=0.0, **o)(
        x[:, 0], x[:, 1], negatives=_queue(x), bank=x[:, 0].detach(), bank_cluster_ids=_clusters(len(x)),
        indices=torch.arange(len(x)),
    ),
    "LightGCL": lambda x, o: LightGCLLoss(0.02, positive_limit=None, **o)(
        x[:, 0], x[:, 1], nodes=torch.tensor([0, 3, 3])
    ),
    "SBCL": lambda x, o: SBCLLoss(0.02, class_weight=0.0, **o)(x, _clusters(len(x)), torch.arange(len(x))),
    "WhitenedCSE": lambda x, o: WhitenedCSELoss(0.02, groups=8, **o)(
        x, shuffles=torch.arange(x.shape[2]).expand(2, -1).contiguous()
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILY)
def test_the_family(name):
    """float32 is float64 but for rounding, where the float32 difference of log-sum-exp and logit was not."""
    x = near_views(40)
    value, gradient = [], []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        losses = FAMILY[name](leaf, {"reduction": "none"} if name != "DeepCluster-v2" else {})
        assert (losses >= 0).all()
        value.append(losses.detach().double())
        gradient.append(torch.autograd.grad(losses.mean(), leaf)[0].double())
    torch.testing.assert_close(*value, rtol=1e-3, atol=1e-12)
    assert (gradient[0] - gradient[1]).norm() <= 1e-3 * gradient[1].norm()


# ---- several positives, nearly equal ----


def near_equal(n=90, classes=30, views=4, d=32):
    """Views [n, views, d] of samples that are all but equal within their class, ids, and the classes' centres."""
    centers = torch.nn.functional.normalize(torch.randn(classes, d, dtype=torch.float64), dim=1)
    ids = torch.arange(n) % classes
    x = centers[ids][:, None] + 0.003 * torch.randn(n, views, d, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1), ids, centers


SEVERAL = {
    "SupCon": lambda x, ids, c, o: SupConLoss(0.05, **o)(x, ids),
    "SupCon, first views": lambda x, ids, c, o: SupConLoss(0.05, contrast_mode="one", **o)(x, ids),
    "SupCon, references": lambda x, ids, c, o: SupConLoss(0.05, **o)(x[:, 0], ids, None, x[:, 1].detach(), ids),
    "CCL joint": lambda x, ids, c, o: CCLLoss(0.05, **o)(x, ids, c.to(x.dtype)),
    "CCL split": lambda x, ids, c, o: CCLLoss(0.05, form="split", **o)(x, ids, c.to(x.dtype)),
    "CCL inside": lambda x, ids, c, o: CCLLoss(0.05, form="inside", **o)(x, ids, c.to(x.dtype)),
    "SBCL": lambda x, ids, c, o: SBCLLoss(0.05, class_weight=0.0, **o)(x, ids % 10, ids),
}


def as_good_as_dense(name, backends, own=slice(None), size=1):
    """The error against float64 of the float32 gradient, by that of the dense definition; of a process's own rows."""
    x, ids, centers = near_equal()
    found = []
    for dtype, backend, more in ((torch.float64, "reference", {}), (torch.float32, "reference", {}), *backends):
        leaf = x.to(dtype).requires_grad_()
        part = own if more else slice(None)
        loss = SEVERAL[name](leaf[part], ids[part], centers, {"backend": backend} | more)
        found.append(torch.autograd.grad(loss, leaf)[0][own].double())
    exact, plain, *actual = found
    return [float((a / size - exact).norm() / (plain - exact).norm().clamp(min=1e-7 * exact.norm())) for a in actual]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_nearly_equal_positives(name):
    ratios = as_good_as_dense(name, [(torch.float32, "blocked", {}), (torch.float32, "auto", {})])
    assert max(ratios) < 2, ratios


def of_a_process(name, exchange):
    first, second = slice(0, 40), slice(40, None)
    more = {"process_group": "world", "exchange": exchange}
    own = (first, second)[torch.distributed.get_rank()]
    return as_good_as_dense(name, [(torch.float32, "blocked", more)], own, size=2)


@pytest.mark.xdist_group("test_saturated_pairs")
@pytest.mark.parametrize("exchange", ["all-gather", "ring"])
@pytest.mark.parametrize("name", ["SupCon", "CCL joint", "SBCL"])
def test_several_nearly_equal_positives_on_two_processes(name, exchange):
    for ratios in run(of_a_process, 2, name, exchange):
        assert max(ratios) < 2, ratios
