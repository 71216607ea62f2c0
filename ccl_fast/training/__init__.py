"""The training loop and its parts: configuration, objectives, pseudo labels, checkpoints, launch.

Needs the packages of ``ccl-fast[train]``, but for `cached_backward`, which needs torch alone.
"""

from ccl_fast.training.gradient_cache import cached_backward

__all__ = ["cached_backward"]
