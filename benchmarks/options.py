"""Options of all benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.runner import Effort

_FULL = Effort(rounds=5, budget_seconds=20, settle_seconds=6)
_QUICK = Effort(rounds=1, budget_seconds=0)


@dataclass(frozen=True)
class Options:
    """Options of a run. ``quick``: one round, small shapes. ``scratch``: a folder for temporary files."""

    quick: bool
    scratch: Path

    @property
    def effort(self) -> Effort:
        return _QUICK if self.quick else _FULL
