"""The error that every part of the command speaks of in the same way."""


class ArgumentError(ValueError):
    """A wrong argument: its name, what was expected and what came."""
