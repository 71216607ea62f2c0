"""A folder of ImageNet's classes that are none of CIFAR-10's: an OOD set of natural images.

    python recipes/imagenet_without_cifar.py data/imagenet1000/32 data/imagenet-other

The first folder has an image of each of the 1,000 classes, whose names sort as ImageNet's do (n01440764_tench.png,
...); the second gets links to those that show no airplane, automobile, bird, cat, deer, dog, frog, horse, ship or
truck, and nothing that could be taken for one (wolves, foxes, big cats, antelopes, zebras, buses, tanks, canoes, ...).
"""

import sys
from pathlib import Path

LEFT_OUT = {
    "birds": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "dogs, wolves, foxes, hyenas, cats, big cats": tuple(range(151, 294)),
    "frogs": (30, 31, 32),
    "horses, zebras, and what could be taken for deer": (339, 340, *range(345, 356)),
    "planes": (404, 405, 417, 744, 812, 895, 908),
    "ships and boats": (403, 472, 484, 510, 554, 576, 625, 628, 694, 724, 780, 814, 833, 871, 913, 914),
    "cars, vans and trucks": (
        *(407, 408, 436, 450, 468, 475, 479, 511, 555, 561, 569, 573, 575, 581, 586, 595, 603, 609, 621, 627, 654, 656),
        *(661, 665, 671, 675, 705, 717, 734, 751, 757, 779, 802, 803, 817, 829, 847, 856, 864, 865, 866, 867, 874, 880),
    ),
}


def main(source: Path, target: Path) -> None:
    images = sorted(source.iterdir())
    if len(images) != 1000:
        raise SystemExit(f"{source}: expected an image of each of ImageNet's 1,000 classes, got {len(images)} files")
    left_out = {number for numbers in LEFT_OUT.values() for number in numbers}
    target.mkdir(parents=True)
    for number, image in enumerate(images):
        if number not in left_out:
            (target / image.name).symlink_to(image.resolve())
    print(f"{1000 - len(left_out)} images in {target}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
