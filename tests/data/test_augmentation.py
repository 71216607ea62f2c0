# ruff: noqa: E402 (the extra must be there)
"""Random views: what a recipe does, and that torch's global generator alone decides what comes."""

import random

import numpy as np
import pytest
import torch

for extra in ("torchvision", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.data import Views
from ccl_fast.data.augmentation import _Colors
from ccl_fast.errors import ArgumentError

CASES = [(r, s) for r in ("digits", "simclr", "weak") for s in ((1, 28, 28), (3, 32, 32), (3, 24, 40), (3, 72, 80))]


def blocks(n, shape):
    """Images that are smooth but for a few edges; no two are the same."""
    coarse = torch.rand(n, shape[0], 4, 4)
    return torch.nn.functional.interpolate(coarse, shape[1:])


@pytest.mark.parametrize(("recipe", "shape"), CASES)
def test_the_same_seed_the_same_views(recipe, shape):
    images = blocks(16, shape)
    before = images.clone()
    views = Views(recipe, shape)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        random.seed(len(found))
        np.random.seed(len(found))
        states = random.getstate(), np.random.get_state()[1].tolist()
        found.append(views(images))
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    first, same, other = found
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(Views(recipe, shape)(images[:0]), images[:0])
    assert torch.equal(images, before)
    assert first.shape == images.shape
    assert first.dtype == torch.float32
    assert first.isfinite().all()


@pytest.mark.parametrize(("recipe", "shape"), CASES)
def test_torchs_defaults_do_not_matter(recipe, shape, torch_defaults):
    images = blocks(16, shape)
    torch.manual_seed(3)
    expected = Views(recipe, shape)(images)
    for dtype, device in (("float64", "cpu"), ("float32", "meta"), ("bfloat16", "meta")):
        torch.manual_seed(3)
        with torch_defaults(dtype, device):
            found = Views(recipe, shape)(images)
            assert torch.get_default_dtype() == getattr(torch, dtype)
        assert found.equal(expected) and found.dtype == torch.float32


@pytest.mark.parametrize(("recipe", "shape"), CASES)
def test_every_image_has_a_view_of_its_own(recipe, shape):
    images = blocks(1, shape).expand(40, -1, -1, -1)
    views = Views(recipe, shape)(images)
    assert len(views.unique(dim=0)) > 36  # two crops of a small image may be the same
    assert ((views - images).abs().amax((1, 2, 3)) > 0.05).float().mean() > 0.9


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 72, 80)])
def test_simclr_stays_in_the_range(shape):
    views = Views("simclr", shape)(blocks(64, shape))
    assert views.min() > -1e-4
    assert views.max() < 1 + 1e-4


def test_digits_is_noise_over_contrast_and_brightness():
    flat = torch.full((2000, 1, 28, 28), 0.4)
    views = Views("digits", (1, 28, 28))(flat)[:, :, 10:18, 10:18]  # what is moved in from outside stays outside
    strength = views.std((1, 2, 3))
    assert strength.max() < 0.2
    assert strength.max() > 0.12
    assert strength.min() < 0.01
    assert strength.mean() == pytest.approx(0.075, abs=0.01)
    level = views.mean((1, 2, 3))  # 0.4 c + b, c in [0.5, 1.5], b in [-0.2, 0.2]
    assert level.mean() == pytest.approx(0.4, abs=0.02)
    assert level.std() == pytest.approx(((0.4**2 + 0.4**2) / 12) ** 0.5, abs=0.02)
    assert level.min() > -0.1
    assert level.max() < 0.9
    # The clamp comes before the noise.
    white = Views("digits", (1, 28, 28))(torch.ones(200, 1, 28, 28))[:, :, 10:18, 10:18]
    assert white.mean((1, 2, 3)).max() < 1.1
    assert white.max() > 1.2


def test_digits_moves_turns_and_zooms():
    images = torch.zeros(3000, 1, 29, 29)
    images[:, :, 14, 7:22] = 1  # a line of 15 pixels through the middle
    views = Views("digits", (1, 29, 29))(images)
    views = torch.where(views > views.amax((2, 3), keepdim=True) / 2, 1.0, 0.0).squeeze(1)
    y, x = torch.meshgrid(torch.arange(29.0) - 14, torch.arange(29.0) - 14, indexing="ij")
    mass = views.sum((1, 2))
    cx, cy = (views * x).sum((1, 2)) / mass, (views * y).sum((1, 2)) / mass
    inside = (cx.abs() < 8) & (cy.abs() < 8)
    assert inside.float().mean() > 0.8
    assert 1 < cx[inside].std() < 3
    assert 1 < cy[inside].std() < 3
    xx = (views * (x - cx[:, None, None]) ** 2).sum((1, 2)) / mass
    xy = (views * (x - cx[:, None, None]) * (y - cy[:, None, None])).sum((1, 2)) / mass
    slope = torch.atan(xy / xx)[mass > 8].rad2deg()
    assert 5 < slope[slope.abs() < 30].std() < 16


def test_simclr_of_one_colour_changes_its_colour_but_not_that_it_is_one():
    color = torch.tensor([0.5, 0.4, 0.3])
    flat = color[:, None, None].expand(2000, 3, 32, 32)
    views = Views("simclr", (3, 32, 32))(flat)
    assert (views.std((2, 3)) < 1e-3).all()
    found = views[:, :, 0, 0]
    kept = (found - color).abs().amax(1) < 1e-3
    assert 0.12 < kept.float().mean() < 0.2  # neither jittered nor grey: 0.2 * 0.8
    grey = (found.amax(1) - found.amin(1)) < 1e-3
    assert 0.16 < grey.float().mean() < 0.24
    # Luma and chroma (the I and Q of television) are scaled and turned apart from each other.
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
    luma, *chroma = (yiq @ found[~kept & ~grey].T).double()
    luma_before, *chroma_before = (yiq @ color).double()
    angle = (torch.atan2(*chroma[::-1]) - torch.atan2(*chroma_before[::-1])).rad2deg()
    assert 17 < angle.std() < 24  # uniform over a tenth of the circle to each side: 72 / 12 ** 0.5
    assert angle.abs().max() < 36.1
    brightness = luma / luma_before  # contrast is about the mean, and one colour is its own mean
    assert 0.599 < brightness.min() < 0.65
    assert 1.35 < brightness.max() < 1.401
    size = torch.hypot(*chroma) / torch.hypot(*chroma_before) / brightness  # contrast times saturation
    assert 0.35 < size.min() < 0.5
    assert 1.6 < size.max() < 1.97


def test_contrast_is_about_the_mean_luma():
    image = torch.tensor([0.4, 0.6]).repeat_interleave(16).expand(500, 3, 32, 32)
    torch.manual_seed(0)
    found = _Colors(strength=0.4, hue=0.1, jitter=1.0, grey=0.0)(image)
    low, high = found[:, 0, 0, 0], found[:, 0, 0, -1]
    brightness, contrast = (low + high) / 1.0, (high - low) / 0.2
    assert brightness.min() > 0.59
    assert brightness.max() < 1.41
    ratio = contrast / brightness
    assert ratio.min() > 0.59
    assert ratio.max() < 1.41
    assert abs(torch.corrcoef(torch.stack([ratio, brightness]))[0, 1]) < 0.15


def test_simclr_crops_and_flips_but_leaves_grey_values_alone():
    ramp = torch.linspace(0, 1, 28).expand(1000, 1, 28, 28)
    views = Views("simclr", (1, 28, 28))(ramp)
    rising = views[:, 0, 14, -1] > views[:, 0, 14, 0]
    assert 0.42 < rising.float().mean() < 0.58
    width = (views[:, 0, 14, -1] - views[:, 0, 14, 0]).abs()
    assert 0.35 < width.min() < 0.45  # the narrowest crop: (0.2 * 3 / 4) ** 0.5 = 0.39
    assert width.max() > 0.95
    assert views.min() >= -1e-5
    assert (views[:, 0, 0] - views[:, 0, -1]).abs().max() < 1e-4  # rows are alike


def test_only_large_images_are_blurred():
    def steepest(size):
        edge = (torch.arange(size) % 8 < 4).float().expand(100, 1, size, size)
        views = Views("simclr", (1, size, size))(edge)
        return (views[..., 1:] - views[..., :-1]).abs().amax((1, 2, 3))

    assert (steepest(64) > 0.35).all()  # a crop is enlarged up to 1 / 0.39 times
    assert (steepest(96) < 0.35).float().mean() > 0.15


def test_auto_and_none():
    assert Views("auto", (1, 28, 28)).recipe == "digits"
    assert Views("auto", (3, 32, 32)).recipe == "simclr"
    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(Views("none", (3, 8, 8))(images), images)


@pytest.mark.parametrize("recipe", ["simsiam", "", None, 3])
def test_another_recipe_is_named(recipe):
    known = '"auto", "digits", "simclr", "weak", "none"'
    with pytest.raises(ArgumentError, match=f"^augmentation: expected one of {known}, got "):
        Views(recipe, (1, 28, 28))
