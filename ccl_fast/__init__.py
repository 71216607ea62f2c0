"""Cluster-aware contrastive learning: exact losses, linear memory, any batch size."""

from ccl_fast.losses import CCLLoss, InfoNCELoss, NTXentLoss, SupConLoss
from ccl_fast.ops import streaming_logsumexp
from ccl_fast.version import __version__

# The commands of ``ccl-fast``: imported when they are used, as they need the packages of ``ccl-fast[train]``.
_COMMANDS = ("train", "compare", "evaluate", "score")

__all__ = ["CCLLoss", "InfoNCELoss", "NTXentLoss", "SupConLoss", "__version__", "streaming_logsumexp"]


def __getattr__(name: str):
    if name in _COMMANDS:
        from ccl_fast import commands

        return getattr(commands, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *_COMMANDS]
