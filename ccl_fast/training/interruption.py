"""Ctrl-C and SIGTERM at a moment that suits the training loop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], Any] | int | None


class Interrupted(Exception):
    """The run was asked to stop and has saved its state.

    Args:
        message: what happened.
        received: by which signal.
        go_on: the command that goes on.

    Attributes:
        code: the exit code that shells expect.
    """

    def __init__(self, message: str, received: signal.Signals, go_on: str):
        super().__init__(f"{message}; to go on:\n  {go_on}")
        self.message, self.received, self.code = message, received, 128 + received


class Interruption:
    """A ``with`` in which the first Ctrl-C or SIGTERM is only noted in ``received``; the second acts as ever.

    Signals reach the main thread alone; elsewhere nothing changes.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
