"""States of artefacts from Dagster's runs: `queued`, `running`, or `failed` with the reason.

Recipes decide which artefacts are fresh. Runs only change the state of artefacts that are not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

from dagster import AssetKey, DagsterInstance, DagsterRun, DagsterRunStatus, EventLogEntry
from dagster import DagsterEventType as Type

from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.staleness import Status
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.instance import RECENT_RUNS, process_is_gone, recorded
from saeens_pipeline.storage.names import Address

_PARTITION_TAG = "dagster/partition"
_IN_WORDS = {  # Dagster's errors without a message: for Ctrl-C and SIGTERM, and for a step's process that ends without an answer
    "DagsterExecutionInterruptedError": "it was interrupted",
    "ChildProcessCrashException": "its process was killed or aborted, mostly because memory ran out",
}


def with_run_states(statuses: Sequence[Status], ops: Iterable[Op]) -> list[Status]:
    """Return the statuses, with `queued`, `running` or `failed`, run and reason if Dagster's newest run of an artefact is so.

    Reads the instance of DAGSTER_HOME if it exists, and creates none.
    """
    if all(status.state == "fresh" for status in statuses):
        return list(statuses)
    steps = {output.address: op.name for op in ops for output in op.outputs}
    return recorded(partial(_seen_by_runs, statuses, steps), list(statuses))


def _seen_by_runs(statuses: Sequence[Status], steps: Mapping[Address, str], instance: DagsterInstance) -> list[Status]:
    runs = [record.dagster_run for record in instance.get_run_records(limit=RECENT_RUNS)]

    @cache
    def events(run_id: str) -> list[EventLogEntry]:
        return list(instance.all_logs(run_id, of_type={Type.STEP_START, Type.STEP_SUCCESS, Type.STEP_FAILURE, Type.RUN_FAILURE}))

    def seen(status: Status) -> Status:
        asset, key = AssetKey(status.declaration.address.key), partition_key(status.declaration, status.partition)
        for run in runs if status.state != "fresh" else ():
            if asset in (run.asset_selection or ()) and (key is None or run.tags.get(_PARTITION_TAG) == str(key)):
                if run.status == DagsterRunStatus.SUCCESS:
                    return status
                state, reason = _outcome(run, steps[status.declaration.address], events(run.run_id))
                return replace(status, state=state, reason=f"run {run.run_id[:8]}{reason}") if state else status
        return status

    return [seen(status) for status in statuses]


def why_it_failed(instance: DagsterInstance, run: DagsterRun) -> str:
    """Return the sentence of the first failed step of a run: the first line of its Failure, or of its root cause; or that of the run."""
    entries = instance.all_logs(run.run_id, of_type={Type.STEP_FAILURE, Type.RUN_FAILURE})
    if not entries:
        return "it failed without a message"
    entry = next((each for each in entries if each.dagster_event_type == Type.STEP_FAILURE), entries[0])
    told = getattr(entry.dagster_event and entry.dagster_event.event_specific_data, "user_failure_data", None)
    sentence = (told.description or "").strip() if told else ""
    line = sentence.splitlines()[0] if sentence else _first_line(entry)
    return _IN_WORDS.get(line, line)


def _outcome(run: DagsterRun, step: str, events: Sequence[EventLogEntry]) -> tuple[str, str]:
    """Return state and reason of a step's artefacts after a run without success; an empty state if the one from recipes stands."""
    of_step = {entry.dagster_event_type: entry for entry in reversed(events) if entry.step_key == step}
    of_run = {entry.dagster_event_type: entry for entry in reversed(events)}
    began, nothing = Type.STEP_START in of_step, ("", "")
    if failure := of_step.get(Type.STEP_FAILURE):
        return "failed", f": {failure_reason(failure)}"
    if Type.STEP_SUCCESS in of_step:
        return nothing
    if run.status in (DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED):
        return "queued", ""
    if not run.is_finished and not process_is_gone(run):
        return "running", "" if began else ", which has not reached it yet"
    if not run.is_finished or run.status == DagsterRunStatus.CANCELED:
        reason = ": its process was killed, or it was cancelled" if run.is_finished else ": its process was killed"
        return ("failed", reason) if began else nothing
    at_work = began or Type.STEP_START not in of_run  # without any step, the run failed before its steps
    return ("failed", f": {failure_reason(of_run[Type.RUN_FAILURE])}") if Type.RUN_FAILURE in of_run and at_work else nothing


def failure_reason(entry: EventLogEntry) -> str:
    """Return the first line of the error of a failed step or run, or what it means, if Dagster has no words for it."""
    line = _first_line(entry)
    return _IN_WORDS.get(line, line)


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
