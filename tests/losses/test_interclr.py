"""InterCLRLoss against its definition; what it draws."""

import math

import pytest
import torch

from ccl_fast.losses import InterCLRLoss, MoCHiLoss
from tests.oracles.losses import assert_matches, batch, call, differentiate, largest, learnable
from tests.oracles.matrices import interclr

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = {"num_negatives": 4, "pool": 0.25}


def tensors(n=9, m=7, size=41, dtype=torch.float64, seed=0):
    views, _, queue = batch(n, 2, 6, m, seed, dtype)
    bank, labels, _ = batch(size, 0, 6, 5, seed + 1, dtype)
    indices = torch.randint(size, (n,), generator=torch.Generator().manual_seed(seed))
    return [*views.unbind(1), queue, bank, labels, indices]


def check(arguments, *, temperature=0.1, tolerance=1e-10, backend="auto", **options):
    options = SIZES | options
    module = learnable(InterCLRLoss, temperature, backend=backend, **options)
    leaves, rest = [x.clone().requires_grad_() for x in arguments[:2]], arguments[2:]
    value = call(module, *leaves, *rest, torch.Generator().manual_seed(3))
    assert value.dtype == torch.promote_types(leaves[0].dtype, torch.float32)
    draw = module.draw(len(leaves[0]), len(arguments[3]), value, torch.Generator().manual_seed(3))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    del options["num_negatives"]  # as many as have been drawn
    expected = interclr(*exact, *rest, *draw, temperature=log_temperature.exp(), **options)
    actual = differentiate(value, [*leaves, *module.parameters()])
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@pytest.mark.parametrize("options", (
    {}, {"pool": 1}, {"pool": 0.1, "num_negatives": 1000}, {"num_negatives": 1, "pool": 0.5}, {"inter_weight": 0.0},
    {"inter_weight": 1}, {"margin": 0.3}, {"margin": 0}, {"pool": 0.001, "num_negatives": 1},
))  # fmt: skip
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(options, reduction, backend):
    check(tensors(), reduction=reduction, backend=backend, **options)


@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (1.0, True), (0.5, False)))
@pytest.mark.parametrize("n, size", ((9, 41), (1, 1), (2, 5), (30, 7)))
def test_options(temperature, normalize, n, size):
    check(tensors(n, size=size), temperature=temperature, normalize=normalize)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(tensors(dtype=dtype), tolerance=tolerance)


def test_integers_of_32_bits():
    arguments = tensors()
    check([*arguments[:4], arguments[4].int(), arguments[5].int()])


def test_weight_zero_is_infonce_against_the_queue():
    arguments = tensors()
    infonce = call(MoCHiLoss(num_synthetic=0, num_with_query=0), *arguments[:3])
    torch.testing.assert_close(call(InterCLRLoss(inter_weight=0), *arguments), infonce)


def test_a_negative_margin_lowers_the_loss():
    arguments = tensors()

    def values(margin):
        return call(
            InterCLRLoss(inter_weight=1, margin=margin, reduction="none"), *arguments, torch.Generator().manual_seed(0)
        )

    assert (values(-0.5) < values(0)).all() and (values(0) < values(0.5)).all()


def test_the_positive_is_any_of_the_cluster():
    # Each row of the bank is a direction of its own: the query's gradient tells which was drawn.
    size, labels = 8, torch.tensor([0, 3, 0, 1, 0, -1, 3, -1])
    bank, generator = torch.eye(size, dtype=torch.float64), torch.Generator().manual_seed(0)
    q = torch.ones(size, size, dtype=torch.float64, requires_grad=True)
    counts = torch.zeros(size, size)
    for _ in range(600):
        loss = call(
            InterCLRLoss(inter_weight=1, reduction="sum"),
            q,
            q.detach(),
            bank,
            bank,
            labels,
            torch.arange(size),
            generator,
        )
        (gradient,) = torch.autograd.grad(loss, q)
        counts += torch.nn.functional.one_hot(gradient.argmin(1), size)
    same = (labels[:, None] == labels) & (labels >= 0) | torch.eye(size, dtype=torch.bool)
    assert (counts[~same] == 0).all()
    expected = 600 / same.sum(1, keepdim=True).expand_as(counts)
    assert (counts - expected)[same].abs().max() < 5 * 600**0.5 / 2


def test_negatives_are_drawn_evenly_from_the_most_similar_share():
    size, generator = 2000, torch.Generator().manual_seed(0)
    angle = torch.linspace(0, math.pi, size, dtype=torch.float64)  # from the query
    query = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    loss = InterCLRLoss(inter_weight=1, num_negatives=40, pool=0.1)
    among = torch.cat([loss.draw(1, size, query, generator)[1] for _ in range(200)])
    assert among.shape == (200 * 400,)
    nearest = torch.cat([rows.sort().values[:40] for rows in among.split(400)])  # of angles, as of numbers
    assert ((nearest < 200).double().mean() > 0.9) and (nearest < 320).all()
    share = nearest[nearest < 160].bincount(minlength=160).double()
    assert abs(share.mean() - 200 * 0.2) < 1 and (share - 40).abs().max() < 6 * 40**0.5
    bank = torch.stack((angle.cos(), angle.sin()), dim=1)
    value = call(
        loss, query, query, query, bank, torch.arange(size), torch.tensor([0]), torch.Generator().manual_seed(1)
    )
    rows = loss.draw(1, size, query, torch.Generator().manual_seed(1))[1].sort().values
    kept = bank[rows[rows > 0][:40], 0]
    torch.testing.assert_close(value, (torch.cat((torch.tensor([1.5]).double(), kept)) / 0.2).logsumexp(0) - 7.5)


def test_one_cluster_has_no_negatives():
    arguments = tensors()
    arguments[4] = torch.zeros_like(arguments[4])
    leaves = [x.requires_grad_() for x in arguments[:2]]
    loss = call(InterCLRLoss(inter_weight=1), *arguments)
    assert all(largest(x) == 0 for x in differentiate(loss, leaves, unused=True))


def test_the_generator_decides():
    arguments, loss, state = tensors(), InterCLRLoss(**SIZES), torch.random.get_rng_state()

    def value(seed):
        return call(loss, *arguments, torch.Generator().manual_seed(seed))

    assert torch.equal(value(1), value(1)) and value(1) != value(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    call(loss, *arguments)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_queue_and_bank_get_no_gradient():
    arguments = tensors()
    for x in arguments[:4]:
        x.requires_grad_()
    call(InterCLRLoss(**SIZES), *arguments).backward()
    assert [x.grad is None for x in arguments[:4]] == [False, False, True, True]


def test_empty_batch_is_zero_with_a_graph():
    arguments = [x[:0] if i in (0, 1, 5) else x for i, x in enumerate(tensors())]
    leaves = [x.requires_grad_() for x in arguments[:2]]
    assert all(largest(x) == 0 for x in differentiate(call(InterCLRLoss(**SIZES), *arguments), leaves))


def test_errors():
    for options, message in (
        ({"inter_weight": 1.1}, "inter_weight: expected a number from 0 to 1, got 1.1"),
        ({"num_negatives": 0}, "num_negatives: expected a positive integer, got 0"),
        ({"num_negatives": 1.5}, "num_negatives: expected a positive integer, got 1.5"),
        ({"pool": 0.0}, "pool: expected a number above 0 and at most 1, got 0.0"),
        ({"margin": math.nan}, "margin: expected a finite number, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            InterCLRLoss(**options)
    good = tensors()
    for place, wrong, message in (
        (1, None, "keys: expected a torch.Tensor, got NoneType"),
        (2, good[2][:0], "negatives: expected at least one row, got none"),
        (3, good[3][:, :2], r"bank: expected shape \[rows, 6\], got \[41, 2\]"),
        (3, good[3][:0], "bank: expected at least one row, got none"),
        (4, good[4][:4], r"bank_cluster_ids: expected shape \[41\], got \[4\]"),
        (5, good[5][:4], r"indices: expected shape \[9\], got \[4\]"),
        (5, good[5].double(), "indices: expected integers, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            call(InterCLRLoss(), *good[:place], wrong, *good[place + 1 :])
    for wrong in (41, -1):
        with pytest.raises(IndexError, match="expected rows 0 to"):
            call(InterCLRLoss(), *good[:5], torch.full((9,), wrong))
