# ruff: noqa: E402 (the extra must be there)
"""Mosaics against their definition, and their boxes as torchvision takes them."""

import pytest
import torch

for extra in ("torchvision", "kornia"):
    pytest.importorskip(extra)  # the extra "train"

from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import resize

from ccl_fast import InfoNCELoss
from ccl_fast.data import mosaic
from ccl_fast.errors import ArgumentError


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float64])
@pytest.mark.parametrize("side, shape", [(1, (3, 5, 7)), (2, (3, 32, 32)), (3, (1, 16, 19)), (4, (3, 9, 31))])
def test_every_cell_is_its_image_made_small(side, shape, dtype):
    random = torch.Generator().manual_seed(side)
    images = torch.randint(256, (2 * side**2, *shape), generator=random, dtype=torch.uint8)
    images = images if dtype == torch.uint8 else images.to(dtype) / 255
    mosaics, boxes = mosaic(images, side)
    assert mosaics.shape == (2, *shape) and mosaics.dtype == dtype
    assert boxes.shape == (2, side**2, 4) and boxes[0].equal(boxes[1])
    covered = torch.zeros(shape[1:])
    for m in range(2):
        for cell, box in enumerate(boxes[m].long().tolist()):
            left, top, right, bottom = box
            expected = resize(images[m * side**2 + cell], [bottom - top, right - left], antialias=True)
            torch.testing.assert_close(mosaics[m, :, top:bottom, left:right], expected)
            covered[top:bottom, left:right] += 1
    assert (covered == 2).all()
    if side == 1:
        assert mosaics.equal(images)


def test_regions_and_their_images_are_pairs_of_positives():
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mosaics, boxes = mosaic(images, 2)
    regions = roi_align(mosaics, list(boxes), (4, 4), aligned=True).flatten(1)
    singles = resize(images, [4, 4], antialias=True).flatten(1)
    center = singles.mean(0)
    cosines = torch.nn.functional.cosine_similarity((regions - center)[:, None], (singles - center)[None], dim=2)
    assert cosines.argmax(1).tolist() == list(range(8))
    right, wrong = (InfoNCELoss(0.1)(regions - center, s - center) for s in (singles, singles.flip(0)))
    assert right < wrong


def test_wrong_arguments():
    for images, said in (
        (torch.rand(6, 3, 8, 8), r"^images: expected shape \[n, c, h, w\] with n a multiple of 4, got \[6"),
        (torch.rand(0, 3, 8, 8), r"^images: expected shape"),
        (torch.rand(4, 8, 8), r"^images: expected shape"),
        (torch.rand(4, 3, 1, 8), r"^images: expected at least 2 x 2 pixels, got 1 x 8"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.int64), r"^images: expected uint8 or floating point"),
        ([1], r"^images: expected a torch.Tensor"),
    ):
        with pytest.raises(ArgumentError, match=said):
            mosaic(images, 2)
    with pytest.raises(ArgumentError, match=r"^side: expected a positive integer"):
        mosaic(torch.rand(4, 3, 8, 8), 0)
