"""Live training curves: a few observations of each SAE in Dagster's UI. The whole curve is in the table `training_curves`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeens_pipeline.assets.declarations import RunContext, Task

if TYPE_CHECKING:
    from saeens_models.training import CurvePoint

MOST_OBSERVATIONS = 30
"""Largest number for one SAE: the observations of an asset share one time axis and fill its page of events."""
INTERVAL_SECONDS = 30.0
"""Time between two: each costs about 0.04 s, and a training of less than a minute needs none."""


class LiveCurves:
    """Observations in Dagster of the SAEs of some tasks, at most `MOST_OBSERVATIONS` over `n_tokens`."""

    def __init__(self, context: RunContext, tasks: Sequence[Task], n_tokens: int) -> None:
        self._context, self._tasks, self._n_tokens = context, tasks, n_tokens
        self._told_at = time.monotonic()
        self._told = 0

    def tell(self, points: Sequence[CurvePoint]) -> None:
        """Report one point for each SAE if an observation is due."""
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
