"""A command in a process of its own: its time, and the memory of it and its children."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.disturbance import is_disturbed, work_so_far

_INTERVAL_SECONDS = 0.1
_SHOWN_CHARACTERS = 4000


class ChildUse(NamedTuple):
    """Time and memory of a command."""

    started: float
    """Seconds since the epoch at which the process was started."""
    seconds: float
    """From the start of the process to its end."""
    peak_bytes: int
    """Largest sum of the resident memory of the process and its descendants, ten times a second. Shared pages count in each."""
    disturbed: bool
    """True: other processes used the processors."""


def run_child(command: Sequence[str], environment: Mapping[str, str], log: Path) -> ChildUse:
    """Run a command to its end, with its output in the file ``log``. Raises RuntimeError, with the output's end, if it fails."""
    peak, before, clock = 0, work_so_far(), time.perf_counter()
    with log.open("w", encoding="utf-8") as output:
        started = time.time()
        process = subprocess.Popen(command, env=dict(environment), stdout=output, stderr=subprocess.STDOUT)
        while True:
            try:
                status = process.wait(_INTERVAL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, _resident_of_tree(process.pid))
            except BaseException:
                process.terminate()  # `saeens run` ends its own children
                process.wait()
                raise
    seconds = time.perf_counter() - clock
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text(encoding='utf-8', errors='replace')[-_SHOWN_CHARACTERS:]}")
    return ChildUse(started, seconds, peak, is_disturbed(before, seconds))


def folder_bytes(folder: Path) -> int:
    """Return the bytes of the files in a folder and its subfolders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def _resident_of_tree(pid: int) -> int:
    import psutil

    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    total = 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total
