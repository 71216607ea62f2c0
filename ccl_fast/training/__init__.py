"""Train on a data set and judge the features by OOD detection. Needs the packages of ``ccl-fast[train]``.

Names are imported when they are used: ``cached_backward`` needs torch alone.
"""

import importlib

from ccl_fast.errors import packages_of_training

_MODULES = {
    "cached_backward": "gradient_cache",
    "compare": "comparison",
    "evaluate": "evaluate_run",
    "score": "score_images",
    "train": "experiment",
}

__all__ = ["cached_backward", "compare", "evaluate", "score", "train"]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with packages_of_training():
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
