"""Train on a data set and judge the features by OOD detection. Needs the packages of ``ccl-fast[train]``.

Names are imported when they are used: ``cached_backward`` needs torch alone.
"""

import importlib

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
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as missing:
        if missing.name.startswith("ccl_fast"):
            raise
        raise ModuleNotFoundError(f"{missing}; try: pip install 'ccl-fast[train]'", name=missing.name) from missing
