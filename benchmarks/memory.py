"""Peak memory of a piece of work in this process, from the kernel's high-water mark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

Result = TypeVar("Result")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_HIGH_WATER_MARK = "5"


class MemoryUse(NamedTuple, Generic[Result]):
    """The result of some work, and its peak memory."""

    result: Result
    peak_bytes: int | None
    """Largest resident memory during the work, minus that before; None if not on Linux."""


def measure_peak(work: Callable[[], Result]) -> MemoryUse[Result]:
    """Run ``work`` and measure its peak memory. Freed memory is returned to the system first; otherwise its reuse would not count."""
    gc.collect()
    _return_freed_memory()
    before = _resident("VmRSS") if _reset_high_water_mark() else None
    result = work()
    peak = None if before is None else max(_resident("VmHWM") - before, 0)
    return MemoryUse(result, peak)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
    except OSError:
        return False
    return _STATUS.is_file()


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_STATUS} has no {field}")


def _return_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
