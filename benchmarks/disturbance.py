"""What else runs on the processors while something is timed: libraries whose threads spin while they wait lose most by it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from benchmarks.environment import available_cores

_STAT = Path("/proc/stat")
_WORK = (0, 1, 2, 5, 6, 7)  # user, nice, system, irq, softirq, steal: all but idle, waiting for disks, and guests, who are users
_MOST_SHARE = 0.05
"""Of the processors' time that others may take."""
_LEAST_SECONDS = 0.05
"""Less than this is what the kernel's counters, in hundredths of a second, cannot tell."""


class Work(NamedTuple):
    """Processor seconds since some time in the past."""

    of_all: float
    """On the cores that this process may use, also what a hypervisor gave to others; 0 where the kernel does not say (not Linux)."""
    own: float
    """Of this process and its finished children."""


def work_so_far() -> Work:
    """At this moment."""
    times = os.times()
    return Work(_work_of_all(), times.user + times.system + times.children_user + times.children_system)


def is_disturbed(since: Work, seconds: float) -> bool:
    """Whether others took more than a twentieth of the cores' time in the last ``seconds``, since that moment."""
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
