"""Signals that ask a process to end, held back until it is at a place where it can."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Ctrl-C and SIGTERM while :func:`hold_signals` is in force."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: int | None = None

    @property
    def pending(self) -> bool:
        """Whether one has come."""
        return self._came is not None

    def deliver(self) -> None:
        """Let what has come, if anything has, take the course that it would have taken without this."""
        signum, self._came = self._came, None
        if signum is not None:
            self._release()
            signal.raise_signal(signum)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if self.pending:  # whoever asks a second time does not want to wait
            self.deliver()
        self._came = signum

    def _hold(self) -> None:
        for signum in _ENDING:
            handler = signal.getsignal(signum)
            if handler not in (None, signal.SIG_IGN):  # None: not set from Python, and could not be set back
                self._handlers[signum] = handler
                signal.signal(signum, self._take)

    def _release(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


@contextmanager
def hold_signals() -> Iterator[HeldSignals]:
    """Hold Ctrl-C and SIGTERM back until ``deliver`` is called or the context is left without an error.

    A second one is delivered at once. Python handles signals on the main thread alone: on another one this does nothing.
    """
    held = HeldSignals()
    if threading.current_thread() is threading.main_thread():
        held._hold()
    try:
        yield held
    finally:
        held._release()
    held.deliver()
