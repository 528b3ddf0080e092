"""Run work in processes that are killed; they are forked from a process that has imported everything, which saves imports.

A process kills itself with SIGKILL at its n-th call of a Python or C function: at the same place every time, inside a step, while a
file is written, or between a write and a rename.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any


def run_and_kill(work: Callable[[], None], after_calls: int | None) -> int:
    """Run work in a child that is killed after so many calls, and return its exit code: -9 if killed, 0, or 1 for an exception."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            if after_calls is not None:
                _kill_after(after_calls)
            work()
            sys.setprofile(None)
            code = 0
        except BaseException as error:
            sys.setprofile(None)
            sys.excepthook(type(error), error, error.__traceback__)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def count_calls(work: Callable[[], None]) -> int:
    """Return the number of calls that the work makes, counted in a child."""
    reader, writer = os.pipe()

    def counted() -> None:
        calls = 0

        def profile(_frame: Any, event: str, _argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(profile)
        work()
        sys.setprofile(None)
        os.write(writer, str(calls).encode())

    assert run_and_kill(counted, None) == 0
    os.close(writer)
    with os.fdopen(reader) as stream:
        return int(stream.read())


def _kill_after(n_calls: int) -> None:
    calls = 0

    def profile(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")
        if calls >= n_calls:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
