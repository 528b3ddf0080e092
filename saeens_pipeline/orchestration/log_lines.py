"""Log lines of the packages in the run's event log and on the console."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator

_LOGGERS = ("saeens_models", "saeens_pipeline")


@contextlib.contextmanager
def forwarded_to(say: Callable[[int, str], None]) -> Iterator[None]:
    """Call `say` with level and message of each log line from level INFO within this context."""
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: say(record.levelno, record.getMessage())
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
