"""ProtoNCELoss and DeepClusterV2Loss against their definitions and torch's cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from ccl_fast import InfoNCELoss
from ccl_fast.clustering import concentration
from ccl_fast.losses import DeepClusterV2Loss, ProtoNCELoss
from tests.oracles.losses import (
    assert_matches,
    batch,
    call,
    evaluate,
    evaluate_oracle,
    infonce,
    learnable,
    reduced,
    unit,
)

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = (3, 1, 13)  # centres of each clustering: more than rows, too


def clusterings(n=9, d=6, sizes=SIZES, dtype=torch.float64):
    """Ids (-1 among them), centres and concentrations of several clusterings."""
    of_each = [batch(n, 0, d, k, seed=10 + k, dtype=dtype)[1:] for k in sizes]
    generator = torch.Generator().manual_seed(1)
    phi = [0.05 + 0.3 * torch.rand(k, generator=generator, dtype=torch.float64) for k in sizes]
    return [ids for ids, _ in of_each], [centers for _, centers in of_each], phi


def terms(z, ids, centers, phi, normalize=True):
    """-log softmax of each row at its centre, 0 if unassigned, in float64: z [n, d] or [n, views, d]."""
    z, centers = z.double(), centers.double()
    if normalize:
        z, centers = unit(z), unit(centers)
    log_p = (z @ centers.T / phi).log_softmax(-1)
    if z.ndim == 3:
        ids = ids[:, None].expand(z.shape[:2])
    own = log_p.gather(-1, ids.clamp(min=0)[..., None])[..., 0]
    return -torch.where(ids >= 0, own, 0.0)


def protonce(
    queries, ids, centers, phi=None, keys=None, negatives=None, *, temperature=0.1, normalize=True, reduction="mean"
):
    options = {"temperature": temperature, "normalize": normalize}
    losses = infonce(queries, keys, negatives, symmetric=False, reduction="none", **options)
    phi = [temperature] * len(ids) if phi is None else phi
    of_each = [terms(queries, *m, normalize) for m in zip(ids, centers, phi, strict=True)]
    losses = (losses + sum(of_each) / len(of_each)).flatten()
    return reduced(list(losses), [True] * len(losses), queries.shape[:-1], reduction, queries)


def deepcluster(z, ids, centers, *, temperature=0.1, normalize=True, reduction="mean"):
    total = 0.0
    for own, c in zip(ids, centers, strict=True):
        losses = terms(z, own, c, temperature, normalize)
        counted = (own >= 0) if z.ndim == 2 else (own >= 0)[:, None].expand(losses.shape)
        total = total + reduced(list(losses.flatten()), counted.flatten().tolist(), losses.shape, reduction, z)
    return total / len(ids)


@pytest.mark.parametrize("views", (True, False))
@pytest.mark.parametrize("concentrations", (True, False))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_protonce(views, concentrations, reduction, backend):
    z, keys, negatives = batch(9, 2, 6, 1)[0], batch(9, 0, 6, 1, seed=2)[0], batch(5, 0, 6, 1, seed=3)[0]
    ids, centers, phi = clusterings()
    arguments = [ids, centers, phi if concentrations else None]
    if not views:
        z, arguments = z[:, 0], [*arguments, keys, negatives]
    actual = evaluate(learnable(ProtoNCELoss, reduction=reduction, backend=backend), z, *arguments)
    assert_matches(actual, evaluate_oracle(protonce, z, *arguments, reduction=reduction))


@pytest.mark.parametrize("views", (0, 1, 3))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_deepcluster(views, reduction, backend):
    z, (ids, centers, _) = batch(9, views, 6, 1)[0], clusterings()
    actual = evaluate(learnable(DeepClusterV2Loss, reduction=reduction, backend=backend), z, ids, centers)
    assert_matches(actual, evaluate_oracle(deepcluster, z, ids, centers, reduction=reduction))


@pytest.mark.parametrize("loss, oracle", ((ProtoNCELoss, protonce), (DeepClusterV2Loss, deepcluster)))
@pytest.mark.parametrize("temperature, normalize", ((0.005, True), (1.0, True), (0.5, False)))
def test_options(loss, oracle, temperature, normalize, backend):
    z, (ids, centers, _) = batch(9, 2, 6, 1)[0], clusterings()
    options = {"temperature": temperature, "normalize": normalize}
    actual = evaluate(learnable(loss, backend=backend, **options), z, ids, centers)
    assert_matches(actual, evaluate_oracle(oracle, z, ids, centers, **options))


@pytest.mark.parametrize("loss, oracle", ((ProtoNCELoss, protonce), (DeepClusterV2Loss, deepcluster)))
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(loss, oracle, dtype, tolerance):
    z, (ids, centers, _) = batch(33, 2, 6, 1, dtype=dtype)[0], clusterings(33, dtype=dtype)
    actual = evaluate(learnable(loss), z, ids, centers)
    assert actual[0].dtype == torch.float32 and actual[1].dtype == dtype
    assert_matches(actual, evaluate_oracle(oracle, z, ids, centers), tolerance)


def test_deepcluster_is_torchs_cross_entropy():
    # As in the authors' code: the heads' mean cross-entropies, with an index to ignore.
    z, (ids, centers, _) = batch(9, 0, 6, 1)[0], clusterings()
    heads = [
        F.cross_entropy(unit(z) @ unit(c).T / 0.1, own, ignore_index=-1) for own, c in zip(ids, centers, strict=True)
    ]
    torch.testing.assert_close(DeepClusterV2Loss()(z, ids, centers), sum(heads) / 3)


def test_one_cluster_adds_nothing_to_infonce():
    z, (ids, centers, _) = batch(9, 2, 6, 1)[0], clusterings(sizes=(1,))
    torch.testing.assert_close(call(ProtoNCELoss(), z, ids, centers), call(InfoNCELoss(), z))


def test_clusterings_as_one_tensor_and_int32():
    z, (ids, centers, _) = batch(9, 2, 6, 1)[0], clusterings(sizes=(4, 4))
    for loss in (ProtoNCELoss(), DeepClusterV2Loss()):
        expected = loss(z, ids, centers)
        torch.testing.assert_close(loss(z, torch.stack(ids).int(), torch.stack(centers)), expected)


def test_with_the_librarys_concentration():
    z, _, centers = batch(40, 2, 6, 3)
    ids = (unit(z[:, 0]) @ unit(centers).T).argmax(1)
    phi = concentration(unit(z[:, 0]), ids, unit(centers), mean=0.1)
    actual = evaluate(learnable(ProtoNCELoss), z, [ids], [centers], [phi])
    assert_matches(actual, evaluate_oracle(protonce, z, [ids], [centers], [phi]))


@pytest.mark.parametrize("loss", (ProtoNCELoss, DeepClusterV2Loss))
def test_centers_get_no_gradient_and_unassigned_rows_no_term(loss):
    z, (ids, centers, _) = batch(9, 2, 6, 1)[0], clusterings()
    leaves = [c.clone().requires_grad_() for c in centers]
    z.requires_grad_()
    loss()(z, ids, leaves).backward()
    assert all(c.grad is None for c in leaves)
    none = [torch.full_like(own, -1) for own in ids]
    only_instances = call(InfoNCELoss(), z).item() if loss is ProtoNCELoss else 0.0
    assert loss()(z, none, centers).item() == pytest.approx(only_instances)


@pytest.mark.parametrize("loss", (ProtoNCELoss, DeepClusterV2Loss))
def test_empty_batch_is_zero_with_a_graph(loss):
    z = torch.zeros(0, 2, 6, requires_grad=True)
    value = loss()(z, [torch.zeros(0, dtype=torch.int64)], [torch.ones(3, 6)])
    value.backward()
    assert value == 0 and z.grad is not None


@pytest.mark.parametrize("loss", (ProtoNCELoss, DeepClusterV2Loss))
def test_errors(loss):
    z, (ids, centers, _) = batch(9, 2, 6, 1)[0], clusterings()
    for arguments, error, message in (
        (([], []), ValueError, "cluster_ids: expected a sequence .* got none"),
        ((ids, centers[:2]), ValueError, "centers: expected 3 tensors, as of cluster_ids, got 2"),
        (([ids[0], ids[1][:4], ids[2]], centers), ValueError, r"cluster_ids\[1\]: expected shape \[9\], got \[4\]"),
        ((ids, centers[::-1]), IndexError, r"cluster_ids\[2\]: expected ids from -1 to 2"),
        ((ids, [c[:, :2] for c in centers]), ValueError, r"centers\[0\]: expected shape \[rows, 6\]"),
    ):
        with pytest.raises(error, match=message):
            loss()(z, *arguments)
    with pytest.raises(ValueError, match="center_temperature: expected 3 tensors"):
        call(ProtoNCELoss(), z, ids, centers, [torch.ones(3)])
    with pytest.raises(ValueError, match=r"center_temperature\[1\]: expected shape \[1\], got \[3\]"):
        call(ProtoNCELoss(), z, ids, centers, [torch.ones(3)] * 3)
    with pytest.raises(ValueError, match=r"center_temperature\[0\]: expected positive"):
        call(ProtoNCELoss(), z, ids, centers, [torch.zeros(k) for k in SIZES])
