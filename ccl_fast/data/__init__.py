"""Images to train on, to test on and to tell apart, from wherever they come; and their random views."""

from ccl_fast.errors import packages_of_training

with packages_of_training():
    from ccl_fast.data.augmentation import Views
    from ccl_fast.data.folder import load_files, load_folder
    from ccl_fast.data.images import Images
    from ccl_fast.data.ood import canonical, load_ood
    from ccl_fast.data.split import Split, load_split
    from ccl_fast.data.synthetic import synthetic_names

__all__ = [
    "Images",
    "Split",
    "Views",
    "canonical",
    "load_files",
    "load_folder",
    "load_ood",
    "load_split",
    "synthetic_names",
]
