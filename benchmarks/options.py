"""What every benchmark is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner import Effort

_FULL = Effort(rounds=5, budget_seconds=20, settle_seconds=6)
_QUICK = Effort(rounds=1, budget_seconds=0)


@dataclass(frozen=True)
class Options:
    """``quick``: one round, small shapes. ``scratch``: a folder for what is written on the way, removed afterwards."""

    quick: bool
    scratch: Path

    @property
    def effort(self) -> Effort:
        return _QUICK if self.quick else _FULL
