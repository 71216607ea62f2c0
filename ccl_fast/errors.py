"""The errors that every part speaks of in the same way."""

from __future__ import annotations


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


def first_sentence(error: Exception) -> str:
    """Gloo adds advice."""
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
