"""States of artefacts from Dagster's runs: `running`, or `failed` with the reason.

Recipes decide which artefacts are fresh. Runs only change the state of artefacts that are not.
"""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, EventLogEntry
from dagster import DagsterEventType as Type

from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.staleness import Status
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.instance import PROCESS_TAG, recorded_instance
from saeens_pipeline.storage.recipes import is_alive

RECENT_RUNS = 300  # older runs are not read, to save time
_PARTITION_TAG = "dagster/partition"
_INTERRUPTED = "DagsterExecutionInterruptedError"  # Dagster's error for Ctrl-C and SIGTERM, without a message


def with_run_states(statuses: Sequence[Status], ops: Iterable[Op]) -> list[Status]:
    """Return the statuses, with `running` or `failed`, run and reason if Dagster's newest run of an artefact is so.

    Reads the instance of DAGSTER_HOME if it exists, and creates none.
    """
    if all(status.state == "fresh" for status in statuses):
        return list(statuses)
    steps = {output.address: op.name for op in ops for output in op.outputs}
    with recorded_instance() as instance:
        if instance is None:
            return list(statuses)
        runs = [_Run(instance, record.dagster_run) for record in instance.get_run_records(limit=RECENT_RUNS)]
        return [s if s.state == "fresh" else _seen_by_runs(s, steps[s.declaration.address], runs) for s in statuses]


def _seen_by_runs(status: Status, step: str, runs: Sequence[_Run]) -> Status:
    """Return the status of an artefact with the outcome of the newest run that selected it."""
    key = partition_key(status.declaration, status.partition)
    for run in runs:
        if run.was_to_make(status.declaration.address.key, key):
            found = run.outcome(step)
            return replace(status, state=found.state, reason=found.reason) if found.state else status
    return status


class _Outcome(NamedTuple):
    """The outcome of a run for one artefact. `state` is empty if the state from recipes stands."""

    state: str
    reason: str = ""


class _Run:
    """A run with the events of its steps, which are read on demand."""

    def __init__(self, instance: DagsterInstance, run: DagsterRun) -> None:
        self._instance, self._run = instance, run
        self._events: list[EventLogEntry] | None = None

    def was_to_make(self, key: Sequence[str], partition: str | None) -> bool:
        chosen = self._run.asset_selection
        same_partition = partition is None or self._run.tags.get(_PARTITION_TAG) == str(partition)
        return same_partition and chosen is not None and AssetKey(list(key)) in chosen

    def outcome(self, step: str) -> _Outcome:
        name = f"run {self._run.run_id[:8]}"
        failure = next(self._of_type(Type.STEP_FAILURE, step), None)
        if failure:
            return _Outcome("failed", f"{name}: {_first_line(failure)}".replace(_INTERRUPTED, "it was interrupted"))
        if self._run.status == DagsterRunStatus.SUCCESS or any(self._of_type(Type.STEP_SUCCESS, step)):
            return _Outcome("")
        began = any(self._of_type(Type.STEP_START, step))
        if not self._run.is_finished:
            if self._process_is_dead():
                return _Outcome("failed", f"{name}: its process was killed") if began else _Outcome("")
            return _Outcome("running", name if began else f"{name}, which has not reached it yet")
        if self._run.status == DagsterRunStatus.CANCELED:
            return _Outcome("failed", f"{name}: its process was killed, or it was cancelled") if began else _Outcome("")
        ended = next(self._of_type(Type.RUN_FAILURE), None)
        at_work = began or not any(self._of_type(Type.STEP_START))  # without any step, the run failed before its steps
        return _Outcome("failed", f"{name}: {_first_line(ended)}") if ended and at_work else _Outcome("")

    def _of_type(self, event_type: object, step: str | None = None) -> Iterator[EventLogEntry]:
        if self._events is None:
            wanted = {Type.STEP_START, Type.STEP_SUCCESS, Type.STEP_FAILURE, Type.RUN_FAILURE}
            self._events = list(self._instance.all_logs(self._run.run_id, of_type=wanted))
        for entry in self._events:
            event = entry.dagster_event
            if event and event.event_type == event_type and (step is None or event.step_key == step):
                yield entry

    def _process_is_dead(self) -> bool:
        host, _, pid = self._run.tags.get(PROCESS_TAG, "").rpartition(":")
        return host == socket.gethostname() and not is_alive(int(pid))


def _first_line(entry: EventLogEntry) -> str:
    """Return the first line of the root cause: `SaeensError: the disk is full`."""
    event = entry.dagster_event
    data = event.event_specific_data if event else None
    error = getattr(data, "error", None)
    while error is not None and error.cause is not None:
        error = error.cause
    message = error.message if error is not None else (event.message if event else "") or entry.user_message
    line = next(iter(message.strip().splitlines()), "it failed without a message")
    name, colon, rest = line.partition(": ")
    return f"{name.rpartition('.')[2]}{colon}{rest}" if " " not in name else line
