"""How a training goes, in Dagster's UI while it goes on: a few observations of each SAE. The whole curve is in `eval/training_curves`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeens_pipeline.assets.declarations import RunContext, Task

if TYPE_CHECKING:
    from saeens_models.training import CurvePoint

MOST_OBSERVATIONS = 30
"""Of one SAE: they share a time axis with all others of its asset, and fill the page of its events."""
INTERVAL_SECONDS = 30.0
"""Between two: each costs some 0.04 s, and what is over in a minute needs none."""


class LiveCurves:
    """Tells Dagster where the SAEs of some tasks stand, at most 30 times in all `n_tokens`."""

    def __init__(self, context: RunContext, tasks: Sequence[Task], n_tokens: int) -> None:
        self._context, self._tasks, self._n_tokens = context, tasks, n_tokens
        self._told_at = time.monotonic()
        self._told = 0

    def tell(self, points: Sequence[CurvePoint]) -> None:
        """Called with one point per SAE, as often as there are new ones."""
        due = points[0].tokens * MOST_OBSERVATIONS // self._n_tokens
        if due <= self._told or time.monotonic() - self._told_at < INTERVAL_SECONDS:
            return
        for task, point in zip(self._tasks, points, strict=True):
            self._context.observe(
                task.declaration,
                task.partition,
                {
                    "tokens": point.tokens,
                    "loss": point.loss,
                    "explained variance": round(point.explained_variance, 4),
                    "L0 [features per token]": round(point.l0, 2),
                    "dead features": round(point.dead_features, 4),
                    "learning rate": point.learning_rate,
                },
            )
        self._told, self._told_at = due, time.monotonic()
