"""BECLRLoss against its definition, and the authors' figure."""

import pytest
import torch

from ccl_fast.losses import BECLRLoss
from tests.oracles.losses import assert_matches, batch, differentiate, learnable, unit
from tests.oracles.matrices import beclr
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread", "several_tiles")


def check(n=7, given=3, dtype=torch.float64, tolerance=1e-10, backend="auto", temperature=0.5, **options):
    views = [batch(n, 2, 6, 0, seed=seed, dtype=dtype)[0] for seed in range(given)]
    module = learnable(BECLRLoss, temperature, backend=backend, **options)
    leaves = [x.clone().requires_grad_() for x in views]
    value = module(leaves[0], **dict(zip(("predictions", "targets"), leaves[1:], strict=False)))
    actual = differentiate(value, [*leaves[:2], *module.parameters()])
    exact = [x.double().requires_grad_() for x in views]
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = beclr(*exact, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [*exact[:2], log_temperature], unused=True), tolerance)


@pytest.mark.parametrize("n", (2, 7, 12))
@pytest.mark.parametrize("given", (1, 2, 3), ids="{} of three".format)
def test_the_definition(n, given, backend):
    check(n, given, backend=backend)


@pytest.mark.parametrize("options", ({"normalize": False}, {"negative_weight": 3.0}, {"temperature": 0.05}))
def test_options(options):
    check(**options)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(dtype=dtype, tolerance=tolerance)


def test_the_figure_of_the_authors_code():
    first, second = waves(5, 4), waves(5, 4, 1.1, 0.4)
    views = torch.stack((first, second), dim=1)
    loss, without = (BECLRLoss(negative_weight=weight)(views).item() for weight in (1.0, 0.0))
    assert loss - without == pytest.approx(-0.0449559, abs=1e-7)
    assert without == pytest.approx(-(unit(first) * unit(second)).sum(1).mean().item())
    assert BECLRLoss()(views).item() == pytest.approx(-0.3414169, abs=1e-7)


def test_targets_get_no_gradient():
    views = [batch(7, 2, 6, 0, seed=seed)[0].requires_grad_() for seed in range(3)]
    BECLRLoss()(views[0], predictions=views[1], targets=views[2]).backward()
    assert views[2].grad is None and all(x.grad.norm() > 0 for x in views[:2])


@pytest.mark.parametrize("n", (0, 1))
def test_without_negatives_there_is_the_first_term(n):
    z = batch(n, 2, 6, 0)[0].requires_grad_()
    loss = BECLRLoss(learnable_temperature=True)(z)
    loss.backward()
    torch.testing.assert_close(loss.detach(), beclr(z.detach()))
    assert z.grad.isfinite().all()


def test_errors():
    z = torch.ones(4, 2, 3)
    for arguments, message in (
        ({"embeddings": z[:, 0]}, r"embeddings: expected shape \[n, 2, d\]"),
        ({"embeddings": z, "predictions": z[1:]}, r"predictions: expected shape \[4, 2, 3\] .*, got \[3, 2, 3\]"),
        ({"embeddings": z, "predictions": [1]}, r"predictions: expected a torch.Tensor, got list"),
        ({"embeddings": z, "targets": z.double()}, r"targets: expected dtype torch.float32 .*got torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            BECLRLoss()(**arguments)
    with pytest.raises(ValueError, match=r"negative_weight: expected a number >= 0, got -1"):
        BECLRLoss(negative_weight=-1)
