"""Images to train on, to test on and to tell apart, from wherever they come; and their random views."""

from typing import TYPE_CHECKING

from ccl_fast.errors import packages_of_training
from ccl_fast.later import imported_later

if TYPE_CHECKING:
    from ccl_fast.data.augmentation import Views
    from ccl_fast.data.folder import load_files, load_folder
    from ccl_fast.data.images import Images
    from ccl_fast.data.mosaics import Mosaics, mosaic
    from ccl_fast.data.ood import canonical, load_ood, located
    from ccl_fast.data.split import Split, load_split
    from ccl_fast.data.synthetic import synthetic_names

# Imported when they are used: torchvision takes longer than torch, and the help of a command needs none of it.
_LATER = {
    "Images": "images",
    "Mosaics": "mosaics",
    "Split": "split",
    "Views": "augmentation",
    "canonical": "ood",
    "load_files": "folder",
    "load_folder": "folder",
    "load_ood": "ood",
    "load_split": "split",
    "located": "ood",
    "mosaic": "mosaics",
    "synthetic_names": "synthetic",
}

__all__ = [
    "Images",
    "Mosaics",
    "Split",
    "Views",
    "canonical",
    "load_files",
    "load_folder",
    "load_ood",
    "load_split",
    "located",
    "mosaic",
    "synthetic_names",
]


def __getattr__(name: str):
    with packages_of_training():
        return imported_later(__name__, _LATER, name)


def __dir__() -> list[str]:
    return sorted(__all__)
