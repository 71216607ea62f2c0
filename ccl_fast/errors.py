"""The errors that every part speaks of in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager


class ArgumentError(ValueError):
    """A wrong argument: its name, what was expected and what came."""


class PeerError(RuntimeError):
    """Another process of the group has ended, failed, or did not answer within the group's timeout."""

    @classmethod
    def of(cls, error: Exception, rank: int, size: int) -> PeerError:
        """What process ``rank`` says of an error of torch.distributed's."""
        return cls(
            f"process {rank} of {size} has lost another one, which has ended, failed, or not answered in time "
            f"({first_sentence(error)})"
        )


class ReaderError(RuntimeError):
    """A process that reads images has ended, or has not answered in time."""


class RecomputationError(RuntimeError):
    """A model gave other embeddings when it was run a second time, so that its gradients are wrong."""

    @classmethod
    def of(cls, difference: float) -> RecomputationError:
        """What is said of a row that differs by that much of its length."""
        return cls(
            f"the model gave other embeddings for the same inputs the second time (a row differs by {difference:.1%} "
            "of its length), so the gradients that were added are wrong. It draws from a generator of its own, or "
            "keeps state outside of its buffers. Draw from the global generators of torch, NumPy or Python, keep "
            "state in buffers, or embed all inputs at once (micro_batch >= n)"
        )


def first_line(error: Exception) -> str:
    """Return what went wrong in one line."""
    return (str(error) or type(error).__name__).splitlines()[0]


def first_sentence(error: Exception) -> str:
    """Return what went wrong without the advice that Gloo adds."""
    return first_line(error).split(". ")[0]


class NotFittedError(RuntimeError):
    """A detector is asked for scores before it has been fitted."""


class MissingPackages(ModuleNotFoundError):
    """A package that only some of the library needs is not installed; says what to install."""


@contextmanager
def packages_of(extra: str, instead: str = "") -> Iterator[None]:
    """Around imports that need the packages of ``ccl-fast[<extra>]``: where one is missing, says so in a line.

    Args:
        extra: its name.
        instead: what does without.
    """
    try:
        yield
    except ModuleNotFoundError as missing:
        if isinstance(missing, MissingPackages) or (missing.name or "").startswith("ccl_fast"):
            raise
        hint = f'try: pip install "ccl-fast[{extra}]"' + f", or {instead}" * bool(instead)
        raise MissingPackages(f"{missing}; {hint}", name=missing.name) from missing


def packages_of_training() -> AbstractContextManager[None]:
    """Around imports that need the packages of the training command."""
    return packages_of("train")
