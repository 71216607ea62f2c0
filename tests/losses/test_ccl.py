"""CCLLoss against its definition: every form, value and gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ccl_fast import CCLLoss, InfoNCELoss, SupConLoss
from ccl_fast.losses import CCLLoss as CCLLossOfLosses
from ccl_fast.ops.logsumexp import blocked
from tests.oracles.losses import (
    assert_matches,
    batch,
    ccl,
    differentiate,
    evaluate,
    evaluate_oracle,
    infonce,
    learnable,
    supcon,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FORMS = ("joint", "split", "inside")
BACKENDS = ("reference", "blocked", "auto")
every_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def make(**options):
    return learnable(CCLLoss, **options)


def check(z, *args, backend, tolerance=1e-10, **options):
    expected = evaluate_oracle(ccl, z, *args, **options)
    assert_matches(evaluate(make(backend=backend, **options), z, *args), expected, tolerance)


# ---- the definition ----


@every_form
@pytest.mark.parametrize("views", (0, 1, 2, 3, 4))
@pytest.mark.parametrize("with_centers", (True, False))
def test_every_form_and_number_of_views(form, views, with_centers, backend):
    z, ids, centers = batch(7, views, 5, 3)
    check(z, ids, centers if with_centers else None, form=form, backend=backend)


@every_form
@pytest.mark.parametrize("center_weight", (0, 1e-3, 0.5, 1, 20))
def test_center_weight(form, center_weight, backend):
    z, ids, centers = batch(9, 0, 4, 4, seed=1)
    check(z, ids, centers, form=form, center_weight=center_weight, backend=backend)


@every_form
@pytest.mark.parametrize("instance_weight", (0.25, 0.5, 1))
@pytest.mark.parametrize("views", (2, 3))
@pytest.mark.parametrize("with_centers", (True, False))
def test_instance_weight(form, instance_weight, views, with_centers, backend):
    z, ids, centers = batch(7, views, 4, 3, seed=1)
    check(z, ids, centers if with_centers else None, form=form, instance_weight=instance_weight, backend=backend)


@every_form
def test_an_instance_weight_of_one_is_simclr(form, backend):
    z, ids, centers = batch(9, 2, 4, 3, seed=1)
    expected = evaluate(make(backend=backend), z)
    assert_matches(evaluate(make(form=form, instance_weight=1.0, backend=backend), z, ids, centers), expected)


@pytest.mark.parametrize("views", (0, 1))
def test_an_instance_weight_needs_two_views(views):
    z, ids, centers = batch(5, views, 4, 3)
    with pytest.raises(
        ValueError, match=r"^embeddings: expected shape \[n, views, d\] with two views or more.*got \[5, "
    ):
        CCLLoss(instance_weight=0.5)(z, ids, centers)


@every_form
@pytest.mark.parametrize("temperature", (0.005, 0.02, 0.07, 1.0))
def test_temperature(form, temperature, backend):
    z, ids, centers = batch(8, 2, 6, 3, seed=2)
    check(z, ids, centers, form=form, temperature=temperature, backend=backend)


@every_form
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("views", (0, 2))
def test_reduction(form, reduction, views, backend):
    z, ids, centers = batch(7, views, 5, 3, seed=3)
    check(z, ids, centers, form=form, reduction=reduction, backend=backend)


@every_form
@pytest.mark.parametrize("n, d, k", ((2, 1, 1), (3, 17, 2), (5, 3, 11), (11, 33, 1)))
def test_odd_sizes(form, n, d, k, backend):
    z, ids, centers = batch(n, 3, d, k, seed=4)
    check(z, ids, centers, form=form, backend=backend)


IDS = {
    "one cluster": [2, 2, 2, 2, 2, 2],
    "all singletons": [4, 2, 0, 5, 1, 3],
    "some unassigned": [0, -1, 0, 3, -1, 3],
    "all unassigned": [-1, -1, -1, -1, -1, -1],
    "one assigned": [-1, -1, 1, -1, -1, -1],
    "clusters without a member": [5, 5, 0, 0, 5, 0],
}


@every_form
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("views", (0, 2))
@pytest.mark.parametrize("with_centers", (True, False))
def test_kinds_of_ids(form, ids, views, with_centers, backend):
    z, _, centers = batch(6, views, 5, 6, seed=5)
    check(z, torch.tensor(ids), centers if with_centers else None, form=form, backend=backend)


@every_form
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_ids_without_centers_are_any_numbers_of_their_dtype(form, dtype, backend):
    # An unassigned sample needs an id of its own, and there is none above the largest.
    top = torch.iinfo(dtype).max
    ids = torch.tensor([top, -1, top - 1, top, -1, top - 1, 0], dtype=dtype)
    check(batch(7, 0, 5, 1)[0], ids, form=form, backend=backend)
    check(batch(7, 2, 5, 1)[0], ids, form=form, backend=backend)


@every_form
def test_int32_and_int64_ids_agree(form, backend):
    z, ids, centers = batch(9, 2, 5, 4, seed=6)
    loss_fn = make(form=form, backend=backend)
    for a, b in zip(evaluate(loss_fn, z, ids.int(), centers), evaluate(loss_fn, z, ids, centers), strict=True):
        assert torch.equal(a, b)


@every_form
@pytest.mark.parametrize("scale", (0.1, 1.0, 30.0))
def test_normalize_false_takes_vectors_as_they_come(form, scale, backend):
    z, ids, centers = batch(8, 2, 5, 3, seed=7)
    check(scale * z, ids, scale * centers, form=form, normalize=False, backend=backend)


@every_form
def test_normalize_scales_embeddings_and_centers(form, backend):
    z, ids, centers = batch(8, 2, 5, 3, seed=7)
    scale = torch.logspace(-3, 3, 8, dtype=torch.float64)[:, None, None]
    check(scale * z, ids, 1e3 * centers, form=form, backend=backend)
    loss_fn = make(form=form, backend=backend)
    assert torch.allclose(loss_fn(scale * z, ids, 1e3 * centers), loss_fn(z, ids, centers), rtol=1e-12)


@every_form
def test_hypothesis_shapes(form, backend):
    @settings(deadline=None, derandomize=True, max_examples=25, database=None)
    @given(
        n=st.integers(1, 7),
        views=st.integers(0, 4),
        d=st.integers(1, 6),
        k=st.integers(1, 4),
        block=st.sampled_from((1, 3, 8)),
        with_centers=st.booleans(),
        options=st.fixed_dictionaries(
            {
                "temperature": st.sampled_from((0.005, 0.03, 0.2, 1.0)),
                "center_weight": st.sampled_from((0, 0.3, 2)),
                "reduction": st.sampled_from(("mean", "sum", "none")),
                "normalize": st.booleans(),
            }
        ),
        seed=st.integers(0, 1000),
    )
    def matches(n, views, d, k, block, with_centers, options, seed):
        z, ids, centers = batch(n, views, d, k, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(blocked, "BLOCK", block)
            check(z, ids, centers if with_centers else None, form=form, backend=backend, **options)

    matches()


@every_form
@pytest.mark.parametrize("temperature, normalize", ((0.1, True), (0.005, True), (0.3, False)))
def test_blocked_over_several_tiles(form, temperature, normalize, monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 8)
    # 39 rows: five tiles, the last of 7; 19 centres: three tiles, the last of 3.
    z, ids, centers = batch(13, 3, 6, 19, seed=8)
    options = {"form": form, "temperature": temperature, "normalize": normalize}
    check(z, ids, centers, backend="blocked", tolerance=1e-9, **options)
    check(z, torch.randint(-1, 3, (13,)), None, backend="blocked", tolerance=1e-9, **options)


@every_form
def test_gradcheck(form, backend):
    z, ids, centers = batch(5, 2, 3, 3, seed=9)
    loss_fn = make(form=form, temperature=0.4, backend=backend)
    parameter = loss_fn.log_temperature

    def loss(z, log_temperature):
        return torch.func.functional_call(loss_fn, {"log_temperature": log_temperature}, (z, ids, centers))

    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), parameter.detach().clone().requires_grad_()))


@every_form
@pytest.mark.parametrize("ids", ([0, 1, 1, 0], [0, 1, -1, 1]))
def test_reference_has_a_second_derivative(form, ids):
    z, _, centers = batch(4, 2, 2, 2, seed=9)
    ids = torch.tensor(ids)
    loss_fn = CCLLoss(temperature=0.4, form=form, backend="reference")
    assert torch.autograd.gradgradcheck(lambda z: loss_fn(z, ids, centers), (z.requires_grad_(),))


# ---- centres and their temperature ----


@every_form
@pytest.mark.parametrize("kind", ("number", "scalar tensor", "one per cluster"))
def test_center_temperature_of_the_module_and_of_the_call(form, kind, backend):
    z, ids, centers = batch(8, 2, 5, 3, seed=10)
    per_cluster = torch.tensor([0.05, 0.4, 0.13], dtype=torch.float64)
    value = {"number": 0.3, "scalar tensor": torch.tensor(0.3).double(), "one per cluster": per_cluster}[kind]
    expected = evaluate_oracle(ccl, z, ids, centers, form=form, center_temperature=value)
    assert_matches(evaluate(make(form=form, center_temperature=value, backend=backend), z, ids, centers), expected)
    other = make(form=form, center_temperature=7.0, backend=backend)
    assert_matches(evaluate(other, z, ids, centers, value), expected)
    assert_matches(evaluate(make(form=form, backend=backend), z, ids, centers, value), expected)


@every_form
def test_center_temperature_may_be_learned(form, backend):
    z, ids, centers = batch(8, 2, 5, 3, seed=10)
    for shape in ((), (3,)):
        value = torch.full(shape, 0.2, dtype=torch.float64).requires_grad_()
        actual = differentiate(CCLLoss(form=form, backend=backend)(z, ids, centers, center_temperature=value), [value])
        expected = differentiate(ccl(z, ids, centers, form=form, center_temperature=value), [value])
        assert_matches(actual, expected)


@every_form
def test_one_center_temperature_for_all_equals_a_number(form):
    z, ids, centers = batch(8, 2, 5, 3, seed=10)
    loss_fn = CCLLoss(form=form)
    same = torch.full((3,), 0.3, dtype=torch.float64)
    assert torch.allclose(
        loss_fn(z, ids, centers, center_temperature=same), loss_fn(z, ids, centers, center_temperature=0.3), rtol=1e-12
    )


def test_center_temperature_moves_with_the_module():
    loss_fn = CCLLoss(center_temperature=torch.tensor([0.1, 0.2])).to("meta")
    assert loss_fn.center_temperature.device.type == "meta"


@every_form
def test_single_center(form, backend):
    z, _, centers = batch(5, 0, 4, 1, seed=11)
    for center_temperature in (None, 0.3, torch.tensor([0.3], dtype=torch.float64)):
        options = {"form": form, "center_temperature": center_temperature}
        check(z, torch.zeros(5, dtype=torch.int64), centers, backend=backend, **options)
        check(z, torch.tensor([0, -1, -1, 0, -1]), centers, backend=backend, **options)


@every_form
def test_centers_get_no_gradient(form, backend):
    z, ids, centers = batch(6, 2, 5, 3)
    centers.requires_grad_()
    loss_fn = CCLLoss(form=form, backend=backend)
    assert not loss_fn(z, ids, centers).requires_grad
    loss_fn(z.requires_grad_(), ids, centers).backward()
    assert centers.grad is None and z.grad is not None


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32, torch.float64))
def test_centers_of_another_dtype_are_cast(dtype, backend):
    # K-means keeps float32 centres of half-precision embeddings.
    z, ids, centers = batch(8, 2, 5, 3)
    centers = centers.half().bfloat16()  # numbers that every dtype has
    expected = evaluate_oracle(ccl, z, ids, centers)
    assert_matches(evaluate(make(backend=backend), z, ids, centers.to(dtype)), expected, 1e-10)
    loss = CCLLoss(backend=backend)(z.float(), ids, centers.to(dtype))
    assert loss.dtype == torch.float32 and math.isclose(loss, expected[0], rel_tol=1e-5)


def test_centers_without_a_member_still_repel():
    z, ids, centers = batch(6, 2, 5, 3)
    ids = ids.clamp(max=0)
    for form in FORMS:
        loss_fn = CCLLoss(form=form, reduction="sum")
        assert loss_fn(z, ids, centers) > loss_fn(z, ids, centers[:1])


# ---- rows of the table of cases ----


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("views", (1, 2, 3))
def test_without_cluster_ids_every_sample_is_its_own_cluster(form, views, backend):
    z = batch(7, views, 5, 1)[0]
    check(z, None, form=form, backend=backend)
    loss_fn = make(form=form, backend=backend)
    assert_matches(evaluate(loss_fn, z), evaluate(loss_fn, z, torch.arange(7)))


@every_form
def test_all_ids_distinct_equals_nt_xent(form, backend):
    z = batch(7, 2, 5, 1)[0]
    expected = evaluate_oracle(infonce, z)
    assert_matches(evaluate(make(form=form, backend=backend), z, torch.arange(7) * 5), expected)
    assert_matches(evaluate(make(form=form, backend=backend), z), expected)
    nt_xent = learnable(InfoNCELoss, backend=backend)
    assert_matches(evaluate(nt_xent, z), expected)


@pytest.mark.parametrize("form, supcon_form", (("joint", "outside"), ("split", "outside"), ("inside", "inside")))
@pytest.mark.parametrize("views", (0, 2))
def test_without_centers_it_is_supcon(form, supcon_form, views, backend):
    z, ids, _ = batch(9, views, 5, 3)
    actual = evaluate(make(form=form, backend=backend), z, ids)
    assert_matches(actual, evaluate_oracle(supcon, z, ids, form=supcon_form))
    module = learnable(SupConLoss, form=supcon_form, backend=backend)
    assert_matches(actual, evaluate(module, z, ids))


@every_form
def test_unassigned_sample_has_only_its_own_views_as_positives(form, backend):
    z, _, _ = batch(5, 2, 4, 1)
    loss_fn = make(form=form, reduction="none", backend=backend)
    unassigned = evaluate(loss_fn, z, torch.tensor([0, -1, 0, -1, 0]))
    assert_matches(unassigned, evaluate(loss_fn, z, torch.tensor([0, 1, 0, 2, 0])))


@every_form
def test_unassigned_row_is_a_negative_of_all_others(form, backend):
    z, ids, centers = batch(6, 0, 4, 2)
    ids[0] = -1
    loss_fn = CCLLoss(form=form, reduction="none", backend=backend)
    with_it, without_it = loss_fn(z, ids, centers)[1:], loss_fn(z[1:], ids[1:], centers)
    has_positive = (ids[1:] >= 0) & (ids[1:, None] == ids[1:]).sum(1).gt(1)
    assert has_positive.any()
    assert (with_it > without_it)[has_positive].all()


@every_form
def test_unassigned_row_without_views_counts_for_nothing(form, backend):
    z, ids, centers = batch(8, 0, 4, 3)
    ids = ids.clamp(min=0)
    ids[:3] = -1
    rows = CCLLoss(form=form, reduction="none", backend=backend)(z, ids, centers)
    assert (rows[:3] == 0).all()
    assert torch.isclose(CCLLoss(form=form, backend=backend)(z, ids, centers), rows.sum() / 5)


def zero_without_positive():
    z, ids, centers = batch(4, 2, 5, 4)
    singletons, unassigned = torch.tensor([3, 1, 0, 2]), torch.full((4,), -1)
    return {
        "singletons": (z[:, 0], singletons, None, 1.0),
        "unassigned": (z[:, 0], unassigned, None, 1.0),
        "unassigned, centres": (z[:, 0], unassigned, centers, 1.0),
        "singletons, centres without weight": (z[:, 0], singletons, centers, 0.0),
        "one row": (z[:1, 0], singletons[:1], None, 1.0),
        "one row, one view": (z[:1, :1], None, None, 1.0),
        "one view": (z[:, :1], None, None, 1.0),
        "one unassigned row, centres": (z[:1, 0], unassigned[:1], centers, 1.0),
        "empty": (z[:0, 0], ids[:0], None, 1.0),
        "empty, centres": (z[:0, 0], ids[:0], centers, 1.0),
        "empty, views": (z[:0], None, None, 1.0),
        "no views": (z[:, :0], ids, centers, 1.0),
    }


@every_form
@pytest.mark.parametrize("case", zero_without_positive())
@pytest.mark.parametrize("reduction, dtype", (("mean", torch.float64), ("none", torch.float16)))
def test_no_anchor_has_a_positive_gives_zero_loss_and_zero_gradients(form, case, reduction, dtype, backend):
    z, ids, centers, center_weight = zero_without_positive()[case]
    options = {"form": form, "reduction": reduction, "center_weight": center_weight, "backend": backend}
    loss_fn = CCLLoss(learnable_temperature=True, **options)
    z = z.to(dtype).detach().requires_grad_()
    loss = loss_fn(z, ids, centers)
    assert loss.shape == (z.shape[:-1] if reduction == "none" else ())
    assert (loss == 0).all()
    loss.sum().backward()
    assert (z.grad == 0).all() and (loss_fn.log_temperature.grad == 0).all()


@every_form
def test_anchor_without_positive_does_not_count_in_the_mean(form, backend):
    z, _, _ = batch(6, 0, 4, 1)
    ids = torch.tensor([0, 0, 1, 2, 2, 3])
    check(z, ids, form=form, backend=backend)
    rows = CCLLoss(form=form, reduction="none", backend=backend)(z, ids)
    assert (rows[[2, 5]] == 0).all() and (rows[[0, 1, 3, 4]] != 0).all()
    assert torch.isclose(CCLLoss(form=form, backend=backend)(z, ids), rows.sum() / 4)


@every_form
def test_singleton_with_a_center_counts(form, backend):
    z, _, centers = batch(4, 0, 4, 4)
    rows = CCLLoss(form=form, reduction="none", backend=backend)(z, torch.tensor([0, 1, 2, 3]), centers)
    assert (rows != 0).all()
    # "split": its local bracket has no positive and contributes nothing.
    one = CCLLoss(form=form, backend=backend)
    check(z, torch.tensor([0, 1, 2, 3]), centers, form=form, backend=backend)
    check(z[:1], torch.tensor([2]), centers, form=form, backend=backend)
    assert one(z[:1], torch.tensor([2]), centers) > 0


@every_form
def test_one_sample_of_two_views_has_nothing_to_contrast(form, backend):
    z = batch(1, 2, 5, 1)[0]
    loss, *gradients = evaluate(make(form=form, backend=backend), z)
    assert abs(loss) < 1e-12 and all(g.abs().max() < 1e-12 for g in gradients)


@pytest.mark.parametrize("views, shape", ((0, (7,)), (1, (7, 1)), (3, (7, 3))))
def test_reduction_none_has_a_loss_per_row_and_sums_to_sum(views, shape):
    z, ids, centers = batch(7, views, 5, 3)
    rows = CCLLoss(reduction="none")(z, ids, centers)
    assert rows.shape == shape
    assert torch.isclose(rows.sum(), CCLLoss(reduction="sum")(z, ids, centers), rtol=1e-12)


# ---- symmetries ----


@every_form
@pytest.mark.parametrize("views", (0, 2))
def test_permuting_samples_permutes_gradients(form, views, backend):
    z, ids, centers = batch(11, views, 5, 3)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    loss_fn = make(form=form, backend=backend)
    loss, gradient, slope = evaluate(loss_fn, z, ids, centers)
    assert_matches(evaluate(loss_fn, z[order], ids[order], centers), [loss, gradient[order], slope], 1e-13)


@every_form
def test_permuting_views_permutes_gradients(form, backend):
    z, ids, centers = batch(7, 3, 5, 3)
    loss_fn = make(form=form, backend=backend)
    loss, gradient, slope = evaluate(loss_fn, z, ids, centers)
    assert_matches(evaluate(loss_fn, z.flip(1), ids, centers), [loss, gradient.flip(1), slope], 1e-13)


@every_form
def test_renaming_clusters_changes_nothing(form, backend):
    z, ids, centers = batch(9, 2, 5, 4)
    order = torch.tensor([2, 0, 3, 1])
    renamed = torch.where(ids < 0, ids, order.argsort()[ids])
    loss_fn = make(form=form, backend=backend)
    assert_matches(evaluate(loss_fn, z, renamed, centers[order]), evaluate(loss_fn, z, ids, centers), 1e-13)


@every_form
def test_views_as_rows_of_one_cluster_equal_views(form, backend):
    z, ids, centers = batch(6, 3, 5, 3)
    ids = ids.clamp(min=0)  # the views of an unassigned sample need the 3-D form
    loss_fn = make(form=form, backend=backend)
    loss, gradient, slope = evaluate(loss_fn, z, ids, centers)
    flat = evaluate(loss_fn, z.flatten(0, 1), ids.repeat_interleave(3), centers)
    assert_matches(flat, [loss, gradient.flatten(0, 1), slope], 1e-13)


@every_form
def test_rotating_everything_rotates_gradients(form, backend):
    z, ids, centers = batch(7, 2, 5, 3)
    rotation = torch.linalg.qr(batch(5, 0, 5, 1)[0])[0]
    loss_fn = make(form=form, backend=backend)
    loss, gradient, slope = evaluate(loss_fn, z, ids, centers)
    assert_matches(evaluate(loss_fn, z @ rotation, ids, centers @ rotation), [loss, gradient @ rotation, slope])


# ---- hard inputs ----


@every_form
def test_noncontiguous_inputs(form, backend):
    z, ids, centers = batch(7, 2, 5, 3)
    strided = torch.stack([z, -z], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    doubled_ids = torch.stack([ids, ids + 9], 1)[:, 0]
    columns = centers.T.contiguous().T
    assert not (strided.is_contiguous() or doubled_ids.is_contiguous() or columns.is_contiguous())
    loss_fn = make(form=form, backend=backend)
    assert_matches(evaluate(loss_fn, strided, doubled_ids, columns), evaluate(loss_fn, z, ids, centers), 1e-13)


@every_form
def test_expanded_inputs(form, backend):
    z, _, centers = batch(1, 0, 5, 3)
    check(z.expand(6, 5), torch.tensor(1).expand(6), centers[:1].expand(3, 5), form=form, backend=backend)


@every_form
def test_zero_rows_and_negative_zero(form, backend):
    z, ids, centers = batch(7, 0, 5, 3)
    ids = torch.tensor([0, 0, 1, 1, 2, 2, -1])
    z[1], z[4], z[0, 2] = 0.0, -0.0, -0.0
    loss, gradient, slope = evaluate_oracle(ccl, z, ids, centers, form=form)
    actual = evaluate(make(form=form, backend=backend), z, ids, centers)
    assert actual[1].isfinite().all()
    # A zero row has no direction: its own gradient is any finite number.
    kept = [0, 2, 3, 5, 6]
    assert_matches([actual[0], actual[1][kept], actual[2]], [loss, gradient[kept], slope])


@every_form
def test_zero_center(form, backend):
    z, ids, centers = batch(7, 2, 5, 3)
    centers[1] = 0
    check(z, ids, centers, form=form, backend=backend)


@every_form
@pytest.mark.parametrize("temperature", (0.005, 1.0))
def test_identical_rows_and_opposite_rows(form, temperature, backend):
    z, _, centers = batch(6, 0, 5, 2)
    z[1], z[2], z[3], centers[0] = z[0], -z[0], z[0], z[0]
    ids = torch.tensor([0, 0, 0, 1, 1, -1])
    check(z, ids, centers, form=form, temperature=temperature, backend=backend)


@every_form
@pytest.mark.parametrize("scale", (3e1, 1e4))
def test_huge_unnormalised_logits_float64(form, scale, backend):
    z, ids, centers = batch(8, 2, 5, 3, seed=12)
    options = {"form": form, "normalize": False, "temperature": 0.05}
    check(scale * z, ids, scale * centers, backend=backend, tolerance=1e-6, **options)


@every_form
@pytest.mark.parametrize("scale", (1e1, 1e2, 1e3, 1e4))
def test_huge_unnormalised_logits_float32_do_not_inflate_gradients(form, scale, backend):
    # A weight exp(s - LSE) is at most 1, however coarsely float32 rounds s and LSE.
    z, ids, centers = batch(9, 2, 16, 3, seed=12, dtype=torch.float32)
    z, centers = scale * z, scale * centers
    options = {"form": form, "normalize": False}
    expected = evaluate_oracle(ccl, z, ids, centers, **options)
    loss_fn = CCLLoss(learnable_temperature=True, backend=backend, **options)
    loss, *gradients = evaluate(loss_fn, z, ids, centers)
    assert math.isclose(loss, expected[0], rel_tol=1e-5)
    for actual, exact in zip(gradients, expected[1:], strict=True):
        assert actual.isfinite().all() and actual.norm() <= 2 * exact.norm()


def test_public_name():
    assert CCLLoss is CCLLossOfLosses
