"""Train on a data set and judge the features by OOD detection. Needs the packages of ``ccl-fast[train]``."""

try:
    from ccl_fast.training.comparison import compare
    from ccl_fast.training.evaluate import evaluate
    from ccl_fast.training.experiment import train
    from ccl_fast.training.gradient_cache import cached_backward
    from ccl_fast.training.score import score
except ModuleNotFoundError as missing:
    if missing.name.startswith("ccl_fast"):
        raise
    raise ModuleNotFoundError(f"{missing}; try: pip install 'ccl-fast[train]'", name=missing.name) from missing

__all__ = ["cached_backward", "compare", "evaluate", "score", "train"]
