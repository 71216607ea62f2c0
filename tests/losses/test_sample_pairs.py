"""sample_pairs: how often what is drawn."""

import pytest
import torch

from ccl_fast.losses import sample_pairs

pytestmark = pytest.mark.usefixtures("one_thread")


def frequencies(semantic, surface, draws=20_000):
    drawn = sample_pairs(semantic.expand(draws, -1), surface.expand(draws, -1), 1, generator=generator())
    return drawn.flatten().bincount(minlength=semantic.shape[-1]).double() / draws


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_constant_propensity_is_uniform_sampling():
    semantic = torch.tensor([0.1, 0.9, 0.4, 0.2])
    torch.testing.assert_close(
        frequencies(semantic, 3 * semantic), torch.full((4,), 0.25, dtype=torch.float64), atol=0.01, rtol=0
    )


def test_probabilities_are_inverse_propensities():
    semantic, surface = torch.tensor([0.5, 0.5, 0.1, 0.0]), torch.tensor([1.0, 0.25, 0.1, 0.3])
    expected = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64) / 3.5
    torch.testing.assert_close(frequencies(semantic, surface), expected, atol=0.012, rtol=0)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16))
def test_candidates_are_different_and_drawn_again_by_the_same_generator(dtype):
    semantic = torch.rand(50, 7, generator=generator()).clamp(min=0.1).to(dtype)
    drawn = sample_pairs(semantic, torch.ones_like(semantic), 5, generator=generator(1))
    assert drawn.shape == (50, 5) and all(len(set(row)) == 5 for row in drawn.tolist())
    assert torch.equal(sample_pairs(semantic, torch.ones_like(semantic), 5, generator=generator(1)), drawn)


def test_similarities_whose_quotient_no_number_holds():
    semantic, surface = (torch.tensor([x], dtype=torch.float64) for x in ([1e300, 1.0, 1e300], [1e-300, 1.0, 1e-300]))
    drawn = sample_pairs(semantic, surface, 2, generator=generator())
    assert sorted(drawn.flatten().tolist()) == [0, 2]


def test_no_rows():
    assert sample_pairs(torch.zeros(0, 4), torch.zeros(0, 4), 2).shape == (0, 2)


def test_errors():
    x = torch.tensor([[0.5, 0.0, 1.0]])
    for arguments, message in (
        ((x, x[:, :2], 1), r"surface: expected shape \[1, 3\], got \[1, 2\]"),
        ((x - 1, x + 1, 1), r"semantic: expected numbers >= 0, got a smallest of -1"),
        ((x, x, 1), r"surface: expected numbers > 0, got a smallest of 0"),
        ((x, x + 1, 3), r"k: expected at most 2, the candidates of a row, got 3"),
        ((x, x + 1, 0), r"k: expected a positive integer, got 0"),
        ((x * torch.nan, x + 1, 1), r"semantic: expected finite values"),
        ((x, x + torch.inf, 1), r"surface: expected finite values"),
        ((x.long(), x + 1, 1), r"semantic: expected float64.*int64"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_pairs(*arguments)
