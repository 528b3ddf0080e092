"""Delayed delivery of Ctrl-C and SIGTERM: signals wait until a step is complete."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_ENDING = (signal.SIGINT, signal.SIGTERM)


class HeldSignals:
    """Signals that :func:`hold_signals` delays."""

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._came: int | None = None

    @property
    def pending(self) -> bool:
        """True if a signal was received and is not delivered yet."""
        return self._came is not None

    def deliver(self) -> None:
        """Raise the pending signal, if there is one, with its original handler."""
        signum, self._came = self._came, None
        if signum is not None:
            self._release()
            signal.raise_signal(signum)

    def _take(self, signum: int, _frame: FrameType | None) -> None:
        if self.pending:  # a second signal: the user does not want to wait
            self.deliver()
        self._came = signum

    def _hold(self) -> None:
        for signum in _ENDING:
            handler = signal.getsignal(signum)
            if handler not in (None, signal.SIG_IGN):  # None: not set from Python, so Python cannot restore it
                self._handlers[signum] = handler
                signal.signal(signum, self._take)

    def _release(self) -> None:
        while self._handlers:
            signal.signal(*self._handlers.popitem())


@contextmanager
def hold_signals() -> Iterator[HeldSignals]:
    """Delay Ctrl-C and SIGTERM until ``deliver`` is called or the context ends without an error.

    A second signal is delivered at once. Python handles signals on the main thread only: on other threads this does nothing.
    """
    held = HeldSignals()
    if threading.current_thread() is threading.main_thread():
        held._hold()
    try:
        yield held
    finally:
        held._release()
    held.deliver()
