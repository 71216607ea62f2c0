"""PamCLoss against its definition, and against the full sums that it stands for."""

import pytest
import torch

from ccl_fast.losses import PamCLoss
from tests.oracles.losses import assert_matches, batch, differentiate, infonce, learnable, reduced, unit

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")
FORMS = ("node", "cluster")
every_form = pytest.mark.parametrize("form", FORMS)
IDS = torch.tensor([7, 0, -1, 7, 3, 0, 7, -1, 3])  # sizes 3, 2, 2 and two of their own


def pairs(n=9, d=6, dtype=torch.float64):
    return batch(n, 2, d, 1, dtype=dtype)[0].unbind(1)


def pamc(queries, keys, ids, *, temperature=0.1, form="node", normalize=True, reduction="mean"):
    q, k = (unit(x.double()) if normalize else x.double() for x in (queries, keys))
    own = [("own", i) if c < 0 else c for i, c in enumerate(ids.tolist())]
    members = [[i for i, c in enumerate(own) if c == cluster] for cluster in dict.fromkeys(own)]
    q_means, k_means = (torch.stack([x[rows].mean(0) for rows in members]) for x in (q, k))
    size = [len(rows) for rows in members]
    losses = []
    for i in range(len(q)):
        if form == "node":
            total = sum(n * (q[i] @ c / temperature).exp() for n, c in zip(size, k_means, strict=True))
        else:
            total = sum(
                size[a] * size[b] * (q_means[a] @ k_means[b] / temperature).exp()
                for a in range(len(size))
                for b in range(len(size))
                if a != b
            )
        losses.append(total.log() - q[i] @ k[i] / temperature)
    return reduced(losses, [True] * len(losses), (len(losses),), reduction, queries)


def check(q, k, ids, *, backend="auto", temperature=0.1, tolerance=1e-10, **options):
    module, leaves = learnable(PamCLoss, temperature, backend=backend, **options), [q.clone(), k.clone()]
    leaves = [x.detach().requires_grad_() for x in leaves]
    actual = differentiate(module(*leaves, ids), [*leaves, *module.parameters()])
    exact = [x.detach().double().requires_grad_() for x in leaves]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = pamc(*exact, ids, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact, log_temperature]), tolerance)


@every_form
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(form, reduction, backend):
    check(*pairs(), IDS, form=form, reduction=reduction, backend=backend)


@every_form
@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (1.0, True), (0.5, False)))
def test_options(form, temperature, normalize, backend):
    check(*pairs(), IDS, form=form, temperature=temperature, normalize=normalize, backend=backend)


@every_form
@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(form, dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    check(*pairs(33, dtype=dtype), torch.randint(0, 5, (33,), generator=generator), form=form, tolerance=tolerance)


@pytest.mark.parametrize("ids", (torch.arange(9), torch.full((9,), -1)))
def test_singletons_are_the_full_sum(ids, backend):
    q, k = pairs()
    torch.testing.assert_close(PamCLoss(backend=backend)(q, k, ids), infonce(q, k, symmetric=False))
    scores = unit(q) @ unit(k).T / 0.1
    between = scores.masked_fill(torch.eye(9, dtype=torch.bool), -torch.inf).flatten().logsumexp(0)
    actual = PamCLoss(form="cluster", backend=backend)(q, k, ids)
    torch.testing.assert_close(actual, between - scores.diagonal().mean())


def test_equal_members_are_the_full_sum():
    q, k = pairs()
    rows = IDS.masked_fill(IDS < 0, 1)  # each member of a cluster is a copy of one row
    q, k = q[rows], k[rows]
    torch.testing.assert_close(PamCLoss()(q, k, rows), infonce(q, k, symmetric=False))


def test_never_above_the_full_sum():
    q, k = pairs(40)
    ids = torch.arange(40) % 7
    for temperature in (0.05, 0.5, 5.0):
        proxy = PamCLoss(temperature=temperature, reduction="none")(q, k, ids)
        full = infonce(q, k, temperature=temperature, symmetric=False, reduction="none")
        assert (proxy <= full + 1e-12).all()


@every_form
def test_one_cluster(form):
    q, k = (x.clone().requires_grad_() for x in pairs())
    loss = PamCLoss(form=form)(q, k, torch.zeros(9, dtype=torch.int64))
    loss.backward()
    assert q.grad.isfinite().all() and k.grad.isfinite().all()
    if form == "cluster":  # nothing to contrast with
        assert loss == 0 and (q.grad == 0).all() and (k.grad == 0).all()


@every_form
def test_empty_batch_is_zero_with_a_graph(form):
    q, k = (torch.zeros(0, 6, requires_grad=True) for _ in range(2))
    loss = PamCLoss(form=form)(q, k, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss == 0 and q.grad is not None and k.grad is not None


def test_errors():
    q, k = pairs()
    with pytest.raises(ValueError, match="form: expected one of 'node', 'cluster', got 'edge'"):
        PamCLoss(form="edge")
    for arguments, message in (
        ((q, None, IDS), "keys: expected a torch.Tensor, got NoneType"),
        ((q, k[:4], IDS), r"keys: expected shape \[9, 6\]"),
        ((q, k, IDS[:4]), r"cluster_ids: expected shape \[9\], got \[4\]"),
        ((q, k, IDS.double()), "cluster_ids: expected integers, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            PamCLoss()(*arguments)
