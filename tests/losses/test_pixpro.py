"""PixProLoss and propagate_pixels against their dense forms, and the authors' figure."""

import pytest
import torch

from ccl_fast.losses import PixProLoss, pixpro, propagate_pixels
from tests.oracles import pixels
from tests.oracles.losses import assert_matches, batch, differentiate
from tests.oracles.waves import other_waves, waves

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.usefixtures("few_images")]
BOXES = torch.tensor([[0, 0, 0.6, 0.6], [0.1, 0.2, 0.9, 0.7], [0.8, 0.1, 0.3, 0.9]], dtype=torch.float64)
OTHERS = torch.tensor([[0.2, 0.1, 0.8, 0.7], [0, 0.3, 0.5, 1], [0.2, 0.3, 1, 0.8]], dtype=torch.float64)


@pytest.fixture
def few_images(monkeypatch):
    """At a time."""
    monkeypatch.setattr(pixpro, "PAIRS", 1)


def maps(n, h, w, d=4, dtype=torch.float64, seed=0):
    return batch(n * h * w, 0, d, 1, seed, dtype)[0].view(n, h, w, d)


def check(y, x, *, tolerance=1e-10, **options):
    n = len(y)
    leaves = [maps.clone().requires_grad_() for maps in (y, x)]
    value = PixProLoss(**options)(*leaves, boxes=BOXES[:n], key_boxes=OTHERS[:n])
    assert value.dtype == torch.promote_types(y.dtype, torch.float32)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = pixels.pixpro(*exact, BOXES[:n], OTHERS[:n], **options)
    assert_matches(differentiate(value, leaves), differentiate(expected, exact), tolerance)


@pytest.mark.parametrize(
    "n, size, other", ((3, (3, 3), (3, 3)), (2, (2, 5), (4, 3)), (1, (1, 1), (7, 2)), (0, (2, 2), (2, 2)))
)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_the_definition(n, size, other, reduction):
    check(maps(n, *size), maps(n, *other, seed=1), reduction=reduction)


@pytest.mark.parametrize("ratio, normalize", ((0.3, True), (2.0, True), (0.7, False)))
def test_options(ratio, normalize):
    check(maps(3, 4, 4), maps(3, 3, 5, seed=1), ratio=ratio, normalize=normalize)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)))
def test_dtypes(dtype, tolerance):
    check(maps(3, 4, 4, dtype=dtype), maps(3, 4, 4, dtype=dtype, seed=1), tolerance=tolerance)


def test_it_is_the_authors():
    y, x = waves(18, 4).view(2, 3, 3, 4), other_waves(18, 4).view(2, 3, 3, 4)
    loss = PixProLoss()(y, x, boxes=BOXES[:2], key_boxes=OTHERS[:2])
    torch.testing.assert_close(loss.item(), 0.130249, rtol=0, atol=5e-7)
    torch.testing.assert_close(PixProLoss()(x, y, boxes=OTHERS[:2], key_boxes=BOXES[:2]), loss)


def test_equal_views_agree_and_those_of_other_places_are_not_compared():
    y, box = maps(2, 4, 4), torch.tensor([[0.0, 0, 0.5, 0.5]]).expand(2, 4)
    torch.testing.assert_close(PixProLoss()(y, y, boxes=box, key_boxes=box).item(), -2.0)
    assert PixProLoss()(y, y, boxes=box, key_boxes=box + 0.6) == 0


def test_a_flipped_view_has_its_sides_changed():
    y, x = maps(3, 4, 4), maps(3, 4, 4, seed=1)
    flipped = OTHERS[:, [2, 1, 0, 3]]
    actual = PixProLoss()(y, x.flip(2), boxes=BOXES, key_boxes=flipped)
    torch.testing.assert_close(actual, PixProLoss()(y, x, boxes=BOXES, key_boxes=OTHERS))


@pytest.mark.parametrize("power", (2.0, 1.0, 0.5))
@pytest.mark.parametrize("with_values", (False, True))
def test_propagation(power, with_values):
    leaves = [maps(3, 2, 4).requires_grad_(), *([maps(3, 2, 4, 5, seed=1).requires_grad_()] if with_values else [])]
    actual = propagate_pixels(*leaves, power=power)
    expected = pixels.propagated(*leaves, power=power)
    if power >= 1:
        assert_matches(differentiate(actual, leaves), differentiate(expected, leaves), 1e-10)
    else:  # whose derivative is not finite at 0
        torch.testing.assert_close(actual, expected)


def test_propagation_of_one_pixel_is_its_direction():
    x = maps(3, 1, 1)
    torch.testing.assert_close(propagate_pixels(x), torch.nn.functional.normalize(x, dim=3))


@pytest.mark.parametrize("shape", ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 3, 0)))
def test_maps_without_pixels_stay_so(shape):
    x = torch.zeros(shape)
    assert propagate_pixels(x).shape == shape
    assert propagate_pixels(x, torch.zeros(*shape[:3], 5)).shape == (*shape[:3], 5)


def test_errors():
    y, boxes = torch.ones(2, 3, 3, 4), torch.ones(2, 4)
    good = {"queries": y, "keys": y, "boxes": boxes, "key_boxes": boxes}
    for change, message in (
        ({"queries": y[0]}, r"queries: expected shape \[n, h, w, d\], got \[3, 3, 4\]"),
        ({"keys": y[:1]}, r"keys: expected shape \[2, 3, 3, 4\], got \[1, 3, 3, 4\]"),
        ({"boxes": boxes[:, :2]}, r"boxes: expected shape \[2, 4\], got \[2, 2\]"),
        ({"key_boxes": boxes.long()}, r"key_boxes: expected float64.*int64"),
    ):
        with pytest.raises(ValueError, match=message):
            PixProLoss()(**good | change)
    with pytest.raises(ValueError, match=r"ratio: expected a positive number, got 0"):
        PixProLoss(ratio=0)
    with pytest.raises(ValueError, match=r"values: expected shape \[2, 3, 3, e\], got \[2, 3, 2, 4\]"):
        propagate_pixels(y, y[:, :, :2])
    with pytest.raises(ValueError, match=r"power: expected a number >= 0, got -1"):
        propagate_pixels(y, power=-1)
