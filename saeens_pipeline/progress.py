"""Progress of long work: bars in a terminal, plain lines elsewhere, log lines in Dagster's UI; and log lines of the packages."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_SECONDS = 15.0  # between two lines about the same task
PACE_SECONDS = 1.0  # shorter measurements give no usable rate
_LOGGERS = ("saeens_models", "saeens_pipeline")


class Advance(Protocol):
    """Count `n` more finished units. Units with `before=True` were finished before this task began and do not count for the rate."""

    def __call__(self, n: int, *, before: bool = False) -> None: ...


Reporter = Callable[[str, int, str], contextlib.AbstractContextManager[Advance]]
"""Shows the progress of a task, given its label, total and unit, for example tokens: `in_lines` or `in_bars`, with their first argument."""


class _Pace:
    """Rate of a task, measured from its first report: the time before that is preparation, such as compiling."""

    def __init__(self) -> None:
        self.done = 0
        self.done_before = 0
        self._first: tuple[float, int] | None = None

    def advance(self, n: int, *, before: bool) -> float | None:
        """Count `n` units and return the rate in units per second, or None while it is unknown."""
        self.done += n
        if before:
            self.done_before += n
            return None
        now = time.monotonic()
        if self._first is None:
            self._first = now, self.done
        began, at_first = self._first
        return (self.done - at_first) / (now - began) if now - began >= PACE_SECONDS else None


@contextlib.contextmanager
def in_lines(write: Callable[[str], None], label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a task in plain lines: one at its end, and one every 15 seconds before."""
    began = said = time.monotonic()
    pace = _Pace()

    def advance(n: int, *, before: bool = False) -> None:
        nonlocal said
        rate = pace.advance(n, before=before)
        if rate and time.monotonic() - said >= LINE_INTERVAL_SECONDS:
            said = time.monotonic()
            left = max(total - pace.done, 0) / rate  # a total may be an estimate
            write(f"{label}: {pace.done:,} of {total:,} {unit}, {rate:,.0f}/s, {left:.0f} s left")

    yield advance
    seconds = time.monotonic() - began
    done_now = pace.done - pace.done_before
    others = f"; {pace.done_before:,} were done before" if pace.done_before else ""
    write(f"{label}: {done_now:,} {unit} in {seconds:.1f} s ({done_now / max(seconds, 1e-9):,.0f}/s){others}")


@contextlib.contextmanager
def in_bars(console: Console, label: str, total: int, unit: str) -> Iterator[Advance]:
    """Show a task as a bar with rate and time left, for a terminal. Other output of the same console appears above it."""
    rate_column, label_column = TextColumn("{task.fields[rate]}", style="dim"), TextColumn("{task.description:<44}")
    columns = (label_column, BarColumn(24), TaskProgressColumn(), rate_column, TimeElapsedColumn(), TimeRemainingColumn())
    pace = _Pace()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(label, total=total, rate="")

        def advance(n: int, *, before: bool = False) -> None:
            rate = pace.advance(n, before=before)
            progress.update(bar, advance=n, rate=f"{rate:,.0f} {unit}/s" if rate else "")

        yield advance


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextlib.contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Show tasks with `reporter` inside this context, unless an outer context has set one."""
    token = None if _reporter.get() else _reporter.set(reporter)
    try:
        yield
    finally:
        if token:
            _reporter.reset(token)


@contextlib.contextmanager
def task(label: str, total: int, unit: str = "tokens") -> Iterator[Advance]:
    """Show a task with the current reporter, if there is one, and give the function that counts its units."""
    reporter = _reporter.get()
    if reporter is None:
        yield lambda n, before=False: None
    else:
        with reporter(label, total, unit) as advance:
            yield advance


def differences(advance: Advance) -> Callable[[int, int], None]:
    """Return a callback for (done so far, total) that calls `advance` with the difference."""
    before = 0

    def report(done: int, _total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return report


@contextlib.contextmanager
def forward_log_lines(say: Callable[[int, str], None]) -> Iterator[None]:
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
