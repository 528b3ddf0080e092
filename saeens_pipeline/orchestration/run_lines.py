"""Lines about Dagster's runs for a terminal: one when a run starts, and one when it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunRecord, RunsFilter

from saeens_pipeline.orchestration.run_states import why_it_failed

LOOK_SECONDS = 2.0  # between two looks at the runs
_OVERLAP = timedelta(seconds=30)  # of what two looks see: clocks of processes differ, and events are written late
_RECENT_RUNS = 50
_SHOWN_OWNERS = 3
_LAYER_TAG, _SEED_TAG, _PARTITION_TAG = "dagster/partition/layer", "dagster/partition/seed", "dagster/partition"

logger = logging.getLogger(__name__)


def tell_runs(instance: DagsterInstance, say: Callable[[str], None], stop: threading.Event) -> None:
    """Say a line for each run that starts or ends from now on, whoever started it, until `stop` is set. For a thread of its own."""
    lines = RunLines(instance)
    lines.look()  # at those of before
    while not stop.wait(LOOK_SECONDS):
        try:
            for line in lines.look():
                say(line)
        except Exception:  # such as a database in use: the next look sees the same runs
            logger.exception("the runs could not be read")


class RunLines:
    """The lines about runs since the last look."""

    def __init__(self, instance: DagsterInstance) -> None:
        self._instance = instance
        self._looked: datetime | None = None
        self._started: set[str] = set()
        self._ended: set[str] = set()

    def look(self) -> list[str]:
        """Return the lines about runs that started or ended since the last look, oldest first; of the first look none."""
        is_first, now = self._looked is None, datetime.now(UTC)
        filters = None if self._looked is None else RunsFilter(updated_after=self._looked - _OVERLAP)
        records = self._instance.get_run_records(filters, limit=_RECENT_RUNS if is_first else None)
        lines = [line for record in reversed(records) for line in self._lines_about(record)]
        self._looked = now
        return [] if is_first else lines

    def _lines_about(self, record: RunRecord) -> Iterator[str]:
        run = record.dagster_run
        if run.run_id in self._ended:
            return
        if record.start_time and run.run_id not in self._started:
            self._started.add(run.run_id)
            yield f"{name_of(run)}: started, run {run.run_id[:8]}"
        if run.is_finished:
            self._ended.add(run.run_id)
            yield f"{name_of(run)}: {self._end_of(record)}"

    def _end_of(self, record: RunRecord) -> str:
        after = f" after {record.end_time - record.start_time:.1f} s" if record.start_time and record.end_time else ""
        match record.dagster_run.status:
            case DagsterRunStatus.SUCCESS:
                return f"finished{after}"
            case DagsterRunStatus.FAILURE:
                return f"failed{after}: {why_it_failed(self._instance, record.dagster_run)}"
        return f"cancelled{after}"


def name_of(run: DagsterRun) -> str:
    """Return experiments or sources of a run's assets, or its job, with the partition: `quickstart, layer 1, seed 42`."""
    owners = sorted({key.path[0] for key in run.asset_selection or ()}) or [run.job_name]
    more = [f"{len(owners) - _SHOWN_OWNERS} more"] if len(owners) > _SHOWN_OWNERS else []
    layer, seed = run.tags.get(_LAYER_TAG, run.tags.get(_PARTITION_TAG)), run.tags.get(_SEED_TAG)
    partition = [f"{name} {value}" for name, value in (("layer", layer), ("seed", seed)) if value]
    return ", ".join([*owners[:_SHOWN_OWNERS], *more, *partition])
