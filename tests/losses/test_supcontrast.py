"""SupConLoss by a mask and with one view as anchors, against SupContrast's loss."""

import pytest
import torch

from ccl_fast import SupConLoss
from ccl_fast.losses.mask import masked_similarity
from ccl_fast.ops.logsumexp import blocked
from tests.oracles import supcontrast
from tests.oracles.losses import batch, supcon, unit

pytestmark = pytest.mark.usefixtures("one_thread")
every_mode = pytest.mark.parametrize("mode", ("all", "one"))


def features(n=9, views=2, d=5, seed=0):
    return batch(n, views, d, 3, seed)[0]


def masks(n=9, seed=1):
    """Without an empty row: the authors count those in the mean."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    asymmetric = torch.rand(n, n, generator=generator) < 0.3
    weights = torch.rand(n, n, generator=generator, dtype=torch.float64) * asymmetric
    return {
        "classes": labels[:, None] == labels,
        "without own views": ~torch.eye(n, dtype=torch.bool)
        & (asymmetric | asymmetric.T | (labels[:, None] == labels)),
        "asymmetric": asymmetric | torch.eye(n).roll(1, 0).bool(),
        "weights": weights + torch.eye(n, dtype=torch.float64).roll(1, 0),
        "integers": (asymmetric | torch.eye(n).roll(1, 0).bool()).int() * 3,
        "own views": torch.eye(n),
    }


def gradients(loss, *leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_same(actual, expected, **tolerance):
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, **tolerance)


def check(z, mask, mode, *, temperature=0.1, **options):
    z = z.detach().requires_grad_()
    theirs = supcontrast.SupConLoss(temperature, mode, base_temperature=temperature)
    ours = SupConLoss(temperature, contrast_mode=mode, **options)
    assert_same(gradients(ours(z, mask=mask), z), gradients(theirs(unit(z.flatten(2)), mask=mask), z))


@every_mode
@pytest.mark.parametrize("layout", ("dense", "CSR"))
@pytest.mark.parametrize("views", (1, 2, 3))
@pytest.mark.parametrize("name", masks())
def test_masks(name, views, layout, mode, backend):
    mask = masks()[name]
    if name == "own views" and views == 1:
        return  # no row has a positive: see below
    z = features(views=views)
    expected = mask
    if layout == "CSR":
        z.requires_grad_()
        theirs = supcontrast.SupConLoss(0.1, mode, base_temperature=0.1)(unit(z), mask=expected)
        ours = SupConLoss(contrast_mode=mode, backend=backend)(z, mask=mask.to_sparse_csr())
        assert_same(gradients(ours, z), gradients(theirs, z))
    else:
        check(z, mask, mode, backend=backend)


@every_mode
@pytest.mark.parametrize("temperature", (0.02, 0.5))
def test_over_several_tiles(mode, temperature, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)
    check(features(31, 2, 7), masks(31)["asymmetric"], mode, temperature=temperature, backend="blocked")


@every_mode
def test_further_dimensions_are_flattened(mode):
    z = features(7, 2, 12).view(7, 2, 3, 2, 2)
    check(z, masks(7)["asymmetric"], mode)
    labels = torch.arange(7) % 3
    ours = SupConLoss(0.1, contrast_mode=mode)
    torch.testing.assert_close(ours(z, labels), ours(z.flatten(2), labels))


@every_mode
@pytest.mark.parametrize("views", (2, 3))
@pytest.mark.parametrize("labels", (None, [0, 1, 2, -1, 0, 1, -7, -1, 0]), ids=("samples", "classes"))
def test_labels(labels, views, mode, backend):
    z = features(views=views).requires_grad_()
    labels = None if labels is None else torch.tensor(labels)
    theirs = supcontrast.SupConLoss(0.1, mode, base_temperature=0.1)(unit(z), labels)
    ours = SupConLoss(0.1, contrast_mode=mode, unassigned=None, backend=backend)(z, labels)
    assert_same(gradients(ours, z), gradients(theirs, z))


@pytest.mark.parametrize("form", ("outside", "inside"))
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
def test_first_views_of_the_definition(form, reduction, backend):
    """Also with rows without a label, and a class of a single sample."""
    z, labels = features(8, 3), torch.tensor([0, -1, 0, 2, -1, 1, 1, 1])
    of_all = supcon(z, labels, form=form, reduction="none")[:, 0]
    expected = {"none": of_all, "sum": of_all.sum(), "mean": of_all.mean()}[reduction]
    actual = SupConLoss(form=form, contrast_mode="one", reduction=reduction, backend=backend)(z, labels)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("form", ("outside", "inside"))
def test_of_single_views_all_are_first(form, backend):
    for z in (features(views=0), features(views=1)):
        labels = torch.tensor([0, 0, 1, 1, 2, -1, 0, 1, -1])
        both = [SupConLoss(form=form, contrast_mode=mode, backend=backend)(z, labels) for mode in ("one", "all")]
        torch.testing.assert_close(*both)


def test_one_positive_that_outweighs_all_else():
    """In float32 the difference of two log-sum-exps would be 0 or noise."""
    z = features(6, 1).repeat(1, 2, 1)
    exact = SupConLoss(0.01, contrast_mode="one")(z)
    torch.testing.assert_close(SupConLoss(0.01, contrast_mode="one")(z.float()), exact.float(), rtol=1e-3, atol=0)
    assert 0 < exact < 1e-6


@every_mode
def test_rows_without_a_positive_do_not_count(mode):
    z, mask = features(views=2).requires_grad_(), masks()["asymmetric"]
    mask[3] = False
    with_row = SupConLoss(contrast_mode=mode, reduction="none")(z, mask=mask)
    assert with_row.shape == ((9,) if mode == "one" else (9, 2)) and (with_row[3] == 0).all()
    torch.testing.assert_close(SupConLoss(contrast_mode=mode)(z, mask=mask), with_row.sum() / (with_row != 0).sum())
    loss = SupConLoss(contrast_mode=mode)(z, mask=torch.zeros(9, 9))
    assert loss == 0 and (torch.autograd.grad(loss, z)[0] == 0).all()
    alone = features(views=1).requires_grad_()
    loss = SupConLoss(contrast_mode=mode)(alone, mask=torch.eye(9))
    assert loss == 0 and (torch.autograd.grad(loss, alone)[0] == 0).all()


@every_mode
def test_rows_without_views_and_none_at_all(mode):
    mask = masks()["asymmetric"]
    rows = features(views=1)
    expected = SupConLoss(contrast_mode=mode, reduction="none")(rows, mask=mask)
    actual = SupConLoss(contrast_mode=mode, reduction="none")(rows[:, 0], mask=mask)
    torch.testing.assert_close(actual, expected.flatten())
    for shape in ((0, 5), (0, 2, 5)):
        empty = torch.zeros(shape, requires_grad=True)
        for nothing in (torch.zeros(0, 0), torch.zeros(0, 0).to_sparse_csr()):
            loss = SupConLoss(contrast_mode=mode)(empty, mask=nothing)
            loss.backward()
            assert loss == 0
        SupConLoss(contrast_mode=mode)(empty, torch.zeros(0).long()).backward()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@every_mode
def test_dtypes(dtype, mode):
    z, mask = features(40, 2, 8).to(dtype), masks(40)["weights"]
    expected = SupConLoss(contrast_mode=mode)(z.double(), mask=mask)
    actual = SupConLoss(contrast_mode=mode)(z, mask=mask.to_sparse_csr())
    assert actual.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(
            SupConLoss(contrast_mode=mode)(z, mask=mask).double(), expected, rtol=2e-2, atol=2e-2
        )


def test_a_learnable_temperature():
    z, mask = features(), masks()["weights"]
    for mode in ("all", "one"):
        loss_fn = SupConLoss(0.2, learnable_temperature=True, contrast_mode=mode).double()
        torch.nn.init.constant_(loss_fn.log_temperature, torch.tensor(0.2, dtype=torch.float64).log())
        temperature = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
        theirs = supcontrast.SupConLoss(temperature, mode, base_temperature=temperature)(unit(z), mask=mask)
        (expected,) = torch.autograd.grad(theirs, temperature)
        (actual,) = torch.autograd.grad(loss_fn(z, mask=mask), loss_fn.log_temperature)
        torch.testing.assert_close(actual, expected.reshape(1) * 0.2)


def test_memory_of_a_csr_mask_is_linear():
    """Nothing of [n, n] is made for 3 entries in each row: which would be 100 times as much."""
    n = 500
    rows, shift = torch.arange(n), torch.tensor([0, 1, 5])
    columns = ((rows[:, None] + shift) % n).sort(1).values.flatten()
    mask = torch.sparse_csr_tensor(torch.arange(n + 1) * 3, columns, torch.ones(3 * n), (n, n), check_invariants=True)
    z = torch.randn(n, 1, 2).requires_grad_()
    largest = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(result):
                if isinstance(x, torch.Tensor) and x.layout == torch.strided:
                    largest[0] = max(largest[0], x.numel())
            return result

    with Watch():
        positives, _ = masked_similarity(z, z, mask)
        positives.sum().backward()
    assert 0 < largest[0] <= 6 * n


ERRORS = {
    "labels too": (lambda z, m: SupConLoss()(z, torch.arange(9), mask=m), "mask: expected None with labels, got both"),
    "a tuple too": (
        lambda z, m: SupConLoss()(z, indices_tuple=(torch.arange(2),) * 4, mask=m),
        "mask: expected None with indices_tuple, got both",
    ),
    "references too": (lambda z, m: SupConLoss()(z, ref_emb=z, mask=m), "mask: expected None with ref_emb, got both"),
    "form": (lambda z, m: SupConLoss(form="inside")(z, mask=m), "mask: expected None with form='inside'"),
    "shape": (lambda z, m: SupConLoss()(z, mask=m[:8]), r"mask: expected shape \[9, 9\], got \[8, 9\]"),
    "type": (lambda z, m: SupConLoss()(z, mask=m.numpy()), "mask: expected a torch.Tensor, got ndarray"),
    "layout": (lambda z, m: SupConLoss()(z, mask=m.to_sparse()), "mask: expected a dense tensor or CSR"),
    "dtype": (lambda z, m: SupConLoss()(z, mask=m.cfloat()), "mask: expected bool, integers or floating point"),
    "device": (lambda z, m: SupConLoss()(z, mask=m.to("meta")), "mask: expected device cpu"),
    "below 0": (lambda z, m: SupConLoss()(z, mask=m - 0.5), "mask: expected finite weights >= 0, got -0.5"),
    "NaN": (lambda z, m: SupConLoss()(z, mask=(m / 0).to_sparse_csr()), "mask: expected finite weights >= 0"),
    "by place": (lambda z, m: SupConLoss()(z, None, m), "indices_tuple: expected a tuple .* got Tensor"),
    "embeddings": (lambda z, m: SupConLoss()(z.tolist(), mask=m), "embeddings: expected a torch.Tensor, got list"),
    "contrast_mode": (lambda z, m: SupConLoss(contrast_mode="two"), "contrast_mode: expected one of 'all', 'one'"),
}


@pytest.mark.parametrize("use, message", ERRORS.values(), ids=ERRORS)
def test_errors(use, message):
    with pytest.raises(ValueError, match=message):
        use(features(), masks()["weights"].float())


def test_labels_may_be_a_column():
    labels = torch.arange(9) % 3
    for options in ({}, {"form": "inside"}, {"contrast_mode": "one"}, {"unassigned": None}):
        loss = SupConLoss(0.07, **options)
        assert loss(features(), labels[:, None]).equal(loss(features(), labels))
    with pytest.raises(ValueError, match=r"labels: expected shape \[9\], got \[9, 2\]"):
        SupConLoss()(features(), labels[:, None].expand(-1, 2))
