"""How far long work has come: bars in a terminal, plain lines elsewhere, log lines in Dagster's UI."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

LINE_INTERVAL_SECONDS = 15.0  # between two lines about the same work


class Advance(Protocol):
    """Say that `n` more units are done."""

    def __call__(self, n: int) -> None: ...


class Reporter(Protocol):
    """Shows work; `unit` is what is counted, for example tokens."""

    def task(self, label: str, total: int, unit: str) -> contextlib.AbstractContextManager[Advance]: ...


class LineReporter:
    """Plain lines: one at the end of each piece of work, and one now and then meanwhile."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        began = said = time.monotonic()
        done = 0

        def advance(n: int) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if now - said >= LINE_INTERVAL_SECONDS and done:
                said = now
                left = (now - began) / done * (total - done)
                self._write(f"{label}: {done:,} of {total:,} {unit}, {done / (now - began):,.0f}/s, {left:.0f} s left")

        yield advance
        seconds = time.monotonic() - began
        self._write(f"{label}: {done:,} {unit} in {seconds:.1f} s ({done / max(seconds, 1e-9):,.0f}/s)")


class BarReporter:
    """Progress bars with rate and time left, for a terminal."""

    @contextlib.contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Advance]:
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        rate = TextColumn("{task.fields[rate]}", style="dim")
        began = time.monotonic()
        with Progress(
            TextColumn("{task.description:<44}"), BarColumn(24), TaskProgressColumn(), rate, TimeElapsedColumn(), TimeRemainingColumn()
        ) as progress:
            bar = progress.add_task(label, total=total, rate="")

            def advance(n: int) -> None:
                done = progress.tasks[bar].completed + n
                progress.update(bar, advance=n, rate=f"{done / max(time.monotonic() - began, 1e-9):,.0f} {unit}/s")

            yield advance


_reporter: ContextVar[Reporter | None] = ContextVar("reporter", default=None)


@contextlib.contextmanager
def report_to(reporter: Reporter) -> Iterator[None]:
    """Within this context, work is shown by that reporter, unless one outside it was set before."""
    token = None if _reporter.get() else _reporter.set(reporter)
    try:
        yield
    finally:
        if token:
            _reporter.reset(token)


@contextlib.contextmanager
def task(label: str, total: int, unit: str = "tokens") -> Iterator[Advance]:
    """Work that is shown by whoever asked for it, or by nobody."""
    reporter = _reporter.get()
    if reporter is None:
        yield lambda n: None
    else:
        with reporter.task(label, total, unit) as advance:
            yield advance


def differences(advance: Advance) -> Callable[[int, int], None]:
    """Turn `advance(more)` into a callback that is given (done so far, total)."""
    before = 0

    def report(done: int, _total: int) -> None:
        nonlocal before
        advance(done - before)
        before = done

    return report
