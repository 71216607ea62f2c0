"""Standard output and error whose readers may go away: a line that nobody can read must not cost hours of training."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

from ccl_fast.errors import first_line


class _Lasting:
    """A stream that goes on, into nothing, once it cannot be written to: a closed pipe, a full disk.

    Characters that it cannot encode are written as escapes.

    Args:
        stream: None: its caller has closed it.
        until: what closes it that is opened in its place.
    """

    def __init__(self, stream: TextIO | None, until: ExitStack):
        self._until = until
        self._stream = self._nothing() if stream is None else stream
        if hasattr(self._stream, "reconfigure"):  # not what replaces a stream in tests
            self._stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop the text."""
        try:
            return self._stream.write(text)
        except (OSError, ValueError) as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what is not written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._give_up(error)

    def _nothing(self) -> TextIO:
        return self._until.enter_context(open(os.devnull, "w"))

    def _give_up(self, error: Exception) -> None:
        """Drop what is still to come, what the interpreter writes at its end too; say so where that can be read."""
        name, self._stream = getattr(self._stream, "name", "a stream"), self._nothing()
        for number, of_process in ((1, sys.__stdout__), (2, sys.__stderr__)):
            if of_process is not None and name == of_process.name:
                os.dup2(self._stream.fileno(), number)
        print(f"{name} cannot be written to any more ({first_line(error)}); the work goes on", file=sys.stderr)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let no failure of stdout or stderr end what is done in the ``with``."""
    before = sys.stdout, sys.stderr
    with ExitStack() as until:
        sys.stdout, sys.stderr = (_Lasting(stream, until) for stream in before)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = before
