"""ListContrastLoss against its dense form; CSSL's matrix form by the authors' figure; the lists of segments."""

import pytest
import torch

from ccl_fast import CCLLoss
from ccl_fast.losses import ListContrastLoss, SupConLoss, segment_neighbors
from tests.oracles.lists import list_contrast
from tests.oracles.losses import assert_matches, batch, differentiate, learnable
from tests.oracles.waves import waves

pytestmark = pytest.mark.usefixtures("one_thread")
TOPICS = torch.tensor([0, 0, 0, 1, 1, 4, 0, 0, 2])
POSITIVES, NEGATIVES = segment_neighbors(TOPICS, 2, 3)


def rows(n=9, dtype=torch.float64):
    return batch(n, 0, 6, 1, dtype=dtype)[0]


def check(z, positives=POSITIVES, negatives=NEGATIVES, *, temperature=0.1, tolerance=1e-10, **options):
    leaf, exact = z.clone().requires_grad_(), z.double().clone().requires_grad_()
    module = learnable(ListContrastLoss, temperature, **options)
    actual = differentiate(module(leaf, positives=positives, negatives=negatives), [leaf, *module.parameters()])
    log_temperature = torch.tensor(temperature, dtype=torch.float64).log().requires_grad_()
    expected = list_contrast(exact, positives, negatives, temperature=log_temperature.exp(), **options)
    assert_matches(actual, differentiate(expected, [exact, log_temperature], unused=True), tolerance)


@pytest.mark.parametrize("k, m", ((1, 3), (2, 1), (3, 0), (0, 2)))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(k, m, reduction):
    generator = torch.Generator().manual_seed(k)
    lists = [torch.randint(-1, 9, (9, size), generator=generator) for size in (k, m)]
    check(rows(), *lists, reduction=reduction)


@pytest.mark.parametrize("temperature, normalize", ((0.01, True), (1.0, True), (0.5, False)))
def test_options(temperature, normalize):
    check(rows(), temperature=temperature, normalize=normalize)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(rows(dtype=dtype), tolerance=tolerance)


def test_cssls_matrix_form_is_supcon_inside_of_topics():
    topics = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    figure = CCLLoss(0.1, form="inside")(waves(7, 4), topics)
    torch.testing.assert_close(figure.item(), 6.389309, rtol=0, atol=5e-7)
    torch.testing.assert_close(SupConLoss(0.1, form="inside")(waves(7, 4), topics), figure)
    # As lists of all other rows.
    other = ~torch.eye(7, dtype=torch.bool)
    same = topics[:, None] == topics
    numbers = torch.arange(7).expand(7, 7)
    positives, negatives = (numbers.where(chosen, -1) for chosen in (same & other, ~same))
    torch.testing.assert_close(ListContrastLoss(0.1)(waves(7, 4), positives=positives, negatives=negatives), figure)


def test_rows_without_a_positive_do_not_count():
    losses = ListContrastLoss(reduction="none")(rows(), positives=POSITIVES, negatives=NEGATIVES)
    counted = (POSITIVES >= 0).any(1)
    assert (losses[~counted] == 0).all() and not counted.all()
    loss = ListContrastLoss()(rows(), positives=POSITIVES, negatives=NEGATIVES)
    torch.testing.assert_close(loss, losses[counted].mean())


def test_no_lists_at_all_are_zero_with_a_graph():
    for n in (0, 4):
        z = torch.zeros(n, 6, requires_grad=True)
        nothing = torch.full((n, 2), -1)
        loss = ListContrastLoss()(z, positives=nothing, negatives=nothing)
        loss.backward()
        assert loss == 0 and (z.grad == 0).all()


def test_errors():
    z = torch.ones(9, 6)
    for change, error, message in (
        ({"positives": POSITIVES[:3]}, ValueError, r"positives: expected 9 rows, got 3"),
        ({"negatives": NEGATIVES.double()}, ValueError, r"negatives: expected integers, got torch.float64"),
        ({"negatives": NEGATIVES[0]}, ValueError, r"negatives: expected shape \[rows, d\], got \[3\]"),
        (
            {"positives": POSITIVES + 5},
            IndexError,
            r"positives: expected ids from -1 to 8 \(there are 9 rows\), got 4 to 11",
        ),
    ):
        with pytest.raises(error, match=message):
            ListContrastLoss()(z, **{"positives": POSITIVES, "negatives": NEGATIVES} | change)


# ---- segment_neighbors ----


@pytest.mark.parametrize("preceding, following", ((1, 3), (2, 1), (5, 12)))
def test_neighbors_by_loops(preceding, following):
    before, after = segment_neighbors(TOPICS, preceding, following)
    topics, n = TOPICS.tolist(), len(TOPICS)
    for i in range(n):
        own = [i - 1 - k for k in range(preceding)]
        expected = [j if j >= 0 and len(set(topics[j : i + 1])) == 1 else -1 for j in own]
        assert before[i].tolist() == expected
        end = next((j for j in range(i, n) if topics[j] != topics[i]), n)
        assert after[i].tolist() == [end + k if end + k < n else -1 for k in range(following)]


def test_names_of_segments_make_no_difference():
    renamed = torch.tensor([5, 5, 5, -3, -3, 0, 7, 7, 5])
    for a, b in zip(segment_neighbors(TOPICS, 1, 3), segment_neighbors(renamed.int(), 1, 3), strict=True):
        assert torch.equal(a, b)


def test_no_rows():
    before, after = segment_neighbors(torch.zeros(0).long(), 1, 3)
    assert before.shape == (0, 1) and after.shape == (0, 3)


def test_errors_of_segments():
    for arguments, message in (
        ((TOPICS.double(), 1, 3), r"ids: expected integers, got torch.float64"),
        ((TOPICS[None], 1, 3), r"ids: expected shape \[9\], got \[1, 9\]"),
        (([0, 1], 1, 3), r"ids: expected a torch.Tensor, got list"),
        ((TOPICS, 0, 3), r"preceding: expected a positive integer, got 0"),
        ((TOPICS, 1, -1), r"following: expected a positive integer, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            segment_neighbors(*arguments)
