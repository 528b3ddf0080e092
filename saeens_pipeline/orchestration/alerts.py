"""Alerts: failed runs are posted to the webhook in SAEENS_ALERT_WEBHOOK, as Slack's incoming webhooks and similar ones take them.

The sensor `alerts` posts those of the UI, the automation and backfills; a command-line run posts its own failure. The address is a secret:
no message, log line or event shows it.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors at run time.
import contextlib
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import dagster as dg
from dagster import DagsterEventType as Type

from saeens_pipeline.errors import ConfigurationError, without_escapes
from saeens_pipeline.orchestration.instance import is_of_command_line, process_tag
from saeens_pipeline.orchestration.run_states import failure_reason
from saeens_pipeline.orchestration.trackers import without_secrets

VARIABLE = "SAEENS_ALERT_WEBHOOK"
ADDRESS_VARIABLE = "SAEENS_UI_URL"
TICK_SECONDS = 15
TIMEOUT_SECONDS = 5.0
MOST_POSTED = 5
"""Alerts of a tick; others follow in the next."""
OLDEST_SECONDS = 24 * 3600
"""Older failures are not posted, such as those before a webhook worked again."""
_MOST_CHARACTERS = 1000  # of an error
_LOOPBACK = ("127.0.0.1", "::1", "localhost")

logger = logging.getLogger(__name__)


class Alert(NamedTuple):
    """A failed run. Its fields are those of the JSON object that is posted, with `text`, their summary, before them."""

    experiment: str
    """Experiment or source of the assets; the job's name for a run without assets."""
    assets: list[str]
    """Assets of the steps that failed; of a run that failed before its steps, all that it selects."""
    partition: str | None
    error: str
    """First line of the error."""
    run_id: str
    url: str | None
    """Page of the run in the UI; None if the address of the UI is not known."""

    @property
    def text(self) -> str:
        """The summary, with the three characters escaped that Slack gives a meaning."""
        where = ", ".join(filter(None, [*self.assets, self.partition and f"partition {self.partition}"]))
        text = f"{self.experiment} failed{f' ({where})' if where else ''}: {self.error}"
        text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        return "\n".join(filter(None, [text, self.url]))


def webhook() -> str:
    """Return the address in SAEENS_ALERT_WEBHOOK; empty without one.

    Raises ConfigurationError, which does not show it, unless it begins with https://, or with http:// and is on this machine.
    """
    address = os.environ.get(VARIABLE, "").strip()
    if not address:
        return ""
    with contextlib.suppress(ValueError):  # a host or port that is none
        parts = urlsplit(address)
        is_plain = address.isascii() and address.isprintable() and " " not in address and "@" not in parts.netloc
        has_scheme = parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in _LOOPBACK)
        if is_plain and has_scheme and parts.hostname and (parts.port is None or parts.port > 0):
            return address
    raise ConfigurationError(
        f"{VARIABLE}: alerts cannot be posted there. Give an address that begins with https://, or with http:// for a program on this "
        "machine, without user and password. The value is a secret, and is not shown"
    )


def alert_of(instance: dg.DagsterInstance, run: dg.DagsterRun) -> Alert:
    """Return the alert about a failed run, from its events."""
    events = instance.all_logs(run.run_id, of_type={Type.ASSET_MATERIALIZATION_PLANNED, Type.STEP_FAILURE, Type.RUN_FAILURE})
    failures = [entry for entry in events if entry.dagster_event_type == Type.STEP_FAILURE]
    of_run = [entry for entry in events if entry.dagster_event_type == Type.RUN_FAILURE]
    steps = {entry.step_key for entry in failures}
    planned = [entry.dagster_event for entry in events if not steps or entry.step_key in steps]
    keys = [event.asset_key for event in planned if event and event.event_type == Type.ASSET_MATERIALIZATION_PLANNED and event.asset_key]
    reason = failure_reason((failures or of_run)[0]) if failures or of_run else "it failed without a message"
    others = f" ({len(failures) - 1} more failed)" if len(failures) > 1 else ""
    address = os.environ.get(ADDRESS_VARIABLE, "").rstrip("/")
    return Alert(
        experiment=keys[0].path[0] if keys else run.job_name,
        assets=sorted({"/".join(key.path[1:] or key.path) for key in keys}),
        partition=run.tags.get("dagster/partition"),
        error=without_escapes(without_secrets(reason))[:_MOST_CHARACTERS] + others,
        run_id=run.run_id,
        url=f"{address}/runs/{run.run_id}" if address else None,
    )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Take a redirection as a refusal: another host must not see the alert."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> None:  # noqa: PLR0917
        return None


def post(address: str, alert: Alert) -> str:
    """Post an alert, and return why it was not taken; empty if it was."""
    body = json.dumps({"text": alert.text, **alert._asdict()}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json", "User-Agent": "saeens"})
    handlers: list[urllib.request.BaseHandler] = [_NoRedirects()]
    handlers += [urllib.request.ProxyHandler({})] if urlsplit(address).scheme == "http" else []  # not to a proxy, which is not this machine
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_SECONDS):
            return ""
    except urllib.error.HTTPError as error:
        error.close()
        return f"it answered with status {error.code}"
    except (OSError, HTTPException, ValueError) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception) else error
        return " ".join(without_secrets(f"{type(cause).__name__}: {cause}").split())


def alerts_sensor() -> dg.SensorDefinition:
    """Return the sensor that posts failed runs. Its cursor is the event of the last failure that was posted or left out.

    A failure that the webhook does not take is posted in a later tick.
    """

    @dg.sensor(
        name="alerts",
        description=f"Posts failed runs to the webhook in {VARIABLE}.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        if context.cursor is None:
            newest = context.instance.fetch_run_status_changes(Type.RUN_FAILURE, limit=1).records
            context.update_cursor(str(newest[0].storage_id if newest else 0))
            return dg.SkipReason("Runs that fail from now on are posted.")
        later = dg.RunStatusChangeRecordsFilter(Type.RUN_FAILURE, after_storage_id=int(context.cursor))
        posted: list[str] = []
        for record in context.instance.fetch_run_status_changes(later, limit=MOST_POSTED, ascending=True).records:
            run = context.instance.get_run_by_id(record.run_id)
            if run and not is_of_command_line(run) and record.timestamp > time.time() - OLDEST_SECONDS:
                if refusal := post(webhook(), alert_of(context.instance, run)):
                    return dg.SkipReason(f"The alert about run {run.run_id[:8]} was not taken: {refusal}. It is posted again later.")
                posted.append(run.run_id[:8])
            context.update_cursor(str(record.storage_id))
        return dg.SkipReason(f"Posted: {', '.join(posted)}." if posted else "No run has failed since the last tick.")

    return alerts


@contextlib.contextmanager
def alerting(instance: dg.DagsterInstance) -> Iterator[None]:
    """Post the failed run of this process that raises in this context. An alert that is not taken is a warning."""
    try:
        yield
    except Exception:
        failed = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags=process_tag())
        for run in instance.get_runs(failed, limit=1) if webhook() else ():
            if refusal := post(webhook(), alert_of(instance, run)):
                logger.warning("the alert about this run was not taken: %s", refusal)
        raise
