"""Load from other processes during a measurement. It slows libraries with spinning threads most."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from benchmarks.environment import available_cores

_STAT = Path("/proc/stat")
_WORK = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal; without idle, iowait, and guest, which is in user
_MOST_SHARE = 0.05
"""Largest share of the processors' time that other processes may use."""
_LEAST_SECONDS = 0.05
"""Smallest time that counts: the kernel's counters have steps of 0.01 s."""


class Work(NamedTuple):
    """Processor seconds since a fixed time in the past."""

    of_all: float
    """All processes on the cores that this process may use, with time stolen by a hypervisor; 0 if not on Linux."""
    own: float
    """This process and its finished children."""


def work_so_far() -> Work:
    """Return the processor seconds up to now."""
    times = os.times()
    return Work(_work_of_all(), times.user + times.system + times.children_user + times.children_system)


def is_disturbed(since: Work, seconds: float) -> bool:
    """Return True if other processes used more than a twentieth of the cores' time since ``since``, ``seconds`` ago."""
    now = work_so_far()
    others = (now.of_all - since.of_all) - (now.own - since.own)
    return others > max(_LEAST_SECONDS, _MOST_SHARE * available_cores() * seconds)


def _work_of_all() -> float:
    try:
        lines = _STAT.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    counts = [line.split()[1:] for line in lines if line.split()[0] in cores]
    return sum(int(count[field]) for count in counts for field in _WORK) / os.sysconf("SC_CLK_TCK")
