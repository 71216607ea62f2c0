"""MoCHiLoss against its definition, with every mixture built; InfoNCE; what is drawn."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ccl_fast.losses import MoCHiLoss
from tests.oracles.losses import assert_matches, batch, call, differentiate, infonce, largest, learnable
from tests.oracles.matrices import mochi

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
SIZES = {"num_hardest": 4, "num_synthetic": 6, "num_with_query": 5}


def tensors(n=9, m=14, dtype=torch.float64, seed=0):
    views, _, queue = batch(n, 2, 6, m, seed, dtype)
    return *views.unbind(1), queue


def check(queries, keys, queue, *, temperature=0.1, tolerance=1e-10, backend="auto", **options):
    options = SIZES | options
    module, leaves = learnable(MoCHiLoss, temperature, backend=backend, **options), [queries.clone(), keys.clone()]
    leaves = [x.detach().requires_grad_() for x in leaves]
    value = call(module, *leaves, queue, torch.Generator().manual_seed(3))
    like = value.new_empty(0)
    assert value.dtype == torch.promote_types(queries.dtype, torch.float32)
    mixing = module.draw(len(queries), min(module.num_hardest, len(queue)), like, torch.Generator().manual_seed(3))
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    del options["num_synthetic"], options["num_with_query"]  # as many as have been drawn
    expected = mochi(*exact, queue, mixing, temperature=log_temperature.exp(), **options)
    actual = differentiate(value, [*leaves, *module.parameters()])
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@pytest.mark.parametrize("sizes", (
    {}, {"num_synthetic": 0}, {"num_with_query": 0}, {"num_hardest": 1}, {"num_hardest": 100},
    {"num_synthetic": 40, "num_with_query": 40},
))  # fmt: skip
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(sizes, reduction, backend):
    check(*tensors(), reduction=reduction, backend=backend, **sizes)


@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (1.0, True), (0.5, False)))
@pytest.mark.parametrize("n, m", ((9, 14), (1, 1), (3, 200)))
def test_options(temperature, normalize, n, m):
    check(*tensors(n, m), temperature=temperature, normalize=normalize)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(*tensors(dtype=dtype), tolerance=tolerance)


def test_without_mixtures_it_is_infonce_against_the_queue(backend):
    q, k, queue = tensors()
    loss = call(
        MoCHiLoss(num_synthetic=0, num_with_query=0, temperature=0.1, reduction="none", backend=backend), q, k, queue
    )
    one_by_one = [infonce(q[i : i + 1], k[i : i + 1], queue, symmetric=False) for i in range(9)]
    torch.testing.assert_close(loss, torch.stack(one_by_one))


def test_mixtures_of_one_negative_are_copies_of_it():
    q, k, _ = tensors(n=5)
    queue = torch.full((3, 6), 0.3, dtype=torch.float64)
    loss = call(MoCHiLoss(num_hardest=2, num_synthetic=4, num_with_query=0, temperature=0.1), q, k, queue)
    torch.testing.assert_close(
        loss, call(MoCHiLoss(num_synthetic=0, num_with_query=0, temperature=0.1), q, k, queue[[0] * 7])
    )


def test_mixing_with_the_query_is_harder_than_the_negative():
    # Nearer to the anchor than the row that it is mixed with: at a low temperature the largest of all.
    q, k, queue = tensors()
    plain = MoCHiLoss(num_hardest=1, num_synthetic=0, num_with_query=0, temperature=0.01, reduction="none")
    mixed = MoCHiLoss(num_hardest=1, num_synthetic=0, num_with_query=3, temperature=0.01, reduction="none")
    assert (call(mixed, q, k, queue, torch.Generator().manual_seed(0)) > call(plain, q, k, queue) + 1).any()


def test_what_is_drawn():
    sizes = {"num_hardest": 5, "num_synthetic": 3000, "num_with_query": 2000}
    first, second, alpha, other, beta = MoCHiLoss(**sizes).draw(2, 5, torch.empty(0), torch.Generator().manual_seed(0))
    for places, size in ((first, 3000), (second, 3000), (other, 2000)):
        assert places.shape == (2, size)
        assert (places.flatten().long().bincount(minlength=5) * 5 / (2 * size) - 1).abs().max() < 0.1
    assert alpha.min() >= 0 and 0.99 < alpha.max() < 1 and abs(alpha.mean() - 0.5) < 0.02
    assert beta.min() >= 0 and 0.49 < beta.max() < 0.5 and abs(beta.mean() - 0.25) < 0.01
    assert abs((first == second).double().mean() - 0.2) < 0.03


def test_the_generator_decides():
    arguments, loss, state = tensors(), MoCHiLoss(**SIZES), torch.random.get_rng_state()

    def value(seed):
        return call(loss, *arguments, torch.Generator().manual_seed(seed))

    assert torch.equal(value(1), value(1)) and value(1) != value(2)
    assert torch.equal(torch.random.get_rng_state(), state)
    call(loss, *arguments)
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_the_queue_gets_no_gradient():
    q, k, queue = (x.requires_grad_() for x in tensors())
    call(MoCHiLoss(**SIZES), q, k, queue).backward()
    assert queue.grad is None and (q.grad != 0).any() and (k.grad != 0).any()


def test_no_mixture_is_built():
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
            return result

    views, _, queue = batch(20, 2, 64, 50)
    q, k = (x.clone().requires_grad_() for x in views.unbind(1))
    with Largest() as seen:
        call(MoCHiLoss(num_hardest=10, num_synthetic=30, num_with_query=30), q, k, queue).backward()
    assert 20 * 30 <= seen.numbers <= 50 * 64  # of the queue; mixtures would take 20 * 30 * 64


def test_opposite_negatives_and_zero_rows_stay_finite():
    q, k, queue = tensors(n=3, m=4)
    queue[1], queue[2] = -queue[0], 0.0
    q[0] = 0.0
    leaves = [q.requires_grad_(), k.requires_grad_()]
    module = MoCHiLoss(num_synthetic=50, num_with_query=50)
    module.draw = lambda *arguments: MoCHiLoss.draw(module, *arguments)._replace(
        alpha=torch.full((3, 50), 0.5).double()
    )
    assert all(x.isfinite().all() for x in differentiate(call(module, *leaves, queue), leaves))


def test_empty_batch_is_zero_with_a_graph():
    q, k = (torch.zeros(0, 6, requires_grad=True) for _ in range(2))
    loss = call(MoCHiLoss(), q, k, torch.ones(3, 6))
    assert all(largest(x) == 0 for x in differentiate(loss, [q, k]))


def test_errors():
    for options, message in (
        ({"num_hardest": 0}, "num_hardest: expected a positive integer, got 0"),
        ({"num_synthetic": -1}, "num_synthetic: expected an integer >= 0, got -1"),
        ({"num_with_query": 1.5}, "num_with_query: expected an integer >= 0, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            MoCHiLoss(**options)
    q, k, queue = tensors()
    for arguments, message in (
        ((q, None, queue), "keys: expected a torch.Tensor, got NoneType"),
        ((q, k[:4], queue), r"keys: expected shape \[9, 6\]"),
        ((q, k, queue[:, :2]), r"negatives: expected shape \[rows, 6\], got \[14, 2\]"),
        ((q, k, queue.float()), "negatives: expected dtype torch.float64"),
        ((q, k, queue[:0]), "negatives: expected at least one row, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            call(MoCHiLoss(), *arguments)
