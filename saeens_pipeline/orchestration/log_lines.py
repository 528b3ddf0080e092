"""Log lines of the packages in the run's event log and on the console."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

_LOGGERS = ("saeens_models", "saeens_pipeline")


class _Forward(logging.Handler):
    def __init__(self, say: Callable[[int, str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.levelno, record.getMessage())


def forwarded_to(log: logging.Logger) -> contextlib.AbstractContextManager[None]:
    """Forward log lines from level INFO to `log` within this context."""
    return _forwarded(log.log)


def written_with(write: Callable[[str], None]) -> contextlib.AbstractContextManager[None]:
    """Call `write` with each log message from level INFO within this context, as one line without its traceback."""
    return _forwarded(lambda _level, message: write(" ".join(message.splitlines())))


@contextlib.contextmanager
def _forwarded(say: Callable[[int, str], None]) -> Iterator[None]:
    handler = _Forward(say)
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
