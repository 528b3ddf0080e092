"""Options of all benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import Allocator
from benchmarks.runner import Effort

_FULL = Effort(rounds=5, budget_seconds=20, settle_seconds=6)
_QUICK = Effort(rounds=1, budget_seconds=0)


@dataclass(frozen=True)
class Options:
    """Options of a run."""

    quick: bool
    """One round, small shapes."""
    scratch: Path
    """A folder for temporary files."""
    allocator: Allocator = "retain"
    """Setting of malloc, for processes that a benchmark starts."""
    tokens: int | None = None
    """Training tokens of ``end_to_end``; None: its own number."""

    @property
    def effort(self) -> Effort:
        return _QUICK if self.quick else _FULL
