"""The sensor `new_models`: has the code location reloaded when a followed set has gained or lost a language model.

A sensor cannot add assets. After the reload the sensor `layers` adds the partitions, and the automation computes what is missing.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors at run time.
import http.client
import json
import os
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import dagster as dg

from saeens_pipeline.assets.catalogue import FollowedSource
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.followed_models import ask_hub, followed_sources, hub_model
from saeens_pipeline.orchestration.instance import LOCATION
from saeens_pipeline.orchestration.ops import Ops

ADDRESS_VARIABLE = "SAEENS_UI"
"""Environment variable with the address of the webserver; `saeens ui` sets it for its code servers."""
TICK_SECONDS = 15
HUB_SECONDS = 300
"""Seconds between two questions to the hub about one model."""
RELOAD_SECONDS = 600
"""Seconds after which a reload is asked for again if the definitions are still those of before."""
ANSWER_SECONDS = 2.0
"""Seconds to wait for the webserver, which answers when everything is loaded. By then the process of this tick is being replaced."""
_RELOAD = """
mutation ($location: String!) {
  reloadRepositoryLocation(repositoryLocationName: $location) { __typename ... on PythonError { message } }
}"""


def new_models_sensor(catalogue: Ops) -> dg.SensorDefinition:
    """Return the sensor for the sets that these definitions follow.

    Its cursor has the time of the last question about each model on the hub, with the error, and the sources of the last reload, with its
    time.
    """

    @dg.sensor(
        name="new_models",
        description="Has the code location reloaded when a source that follows a set of language models has gained or lost one.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def new_models(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        cursor: dict[str, Any] = {"hub": {}, "reloaded": None} | json.loads(context.cursor or "{}")
        said = list(_ask_hub(catalogue, cursor["hub"]))
        changed: list[str] = []
        now: dict[str, list[str]] = {}
        for name, followed in catalogue.followed.items():
            try:
                sources, waiting = followed_sources(followed.settings)
            except ConfigurationError as error:
                said.append(f"source {name}: {error}")
                continue
            now[name] = [source.name for source in sources]
            changed += _changes(followed, now[name])
            said += [f"source {name}: {sentence}" for sentence in waiting]
        if changed:
            said = [*changed, _reload(cursor, now), *said]
        context.update_cursor(json.dumps(cursor))
        n_models = sum(len(each.sources) for each in catalogue.followed.values())
        return dg.SkipReason("; ".join(said or [f"No new language model. Followed: {', '.join(catalogue.followed)}, {n_models} in all."]))

    return new_models


def _ask_hub(catalogue: Ops, asked: dict[str, tuple[float, str]]) -> Iterator[str]:
    """Ask the hub for revisions, and record when, and what went wrong. Yield what went wrong last."""
    for name in filter(None, (hub_model(each.settings) for each in catalogue.followed.values())):
        at, problem = asked.get(name, (0.0, ""))
        if time.time() - at >= HUB_SECONDS:
            problem = ""
            try:
                ask_hub(name)
            except SaeensError as error:
                problem = str(error)
            asked[name] = time.time(), problem
        if problem:
            yield problem


def _changes(followed: FollowedSource, now: list[str]) -> Iterator[str]:
    """Yield in words which sources of a set came and which went."""
    for change, names in (("new", set(now) - set(followed.sources)), ("gone", set(followed.sources) - set(now))):
        if names:
            yield f"source {followed.settings.name}: {change}: {', '.join(each for each in (*now, *followed.sources) if each in names)}"


def _reload(cursor: dict[str, Any], now: dict[str, list[str]]) -> str:
    """Have the code location reloaded, unless this was asked for a moment ago for the same sources. Return in words what was done."""
    if cursor["reloaded"] and cursor["reloaded"][0] == now and time.time() - cursor["reloaded"][1] < RELOAD_SECONDS:
        return "a reload of the code location was asked for"
    address = os.environ.get(ADDRESS_VARIABLE)
    if not address:
        return f"reload the code location in the UI. `saeens ui` does so by itself, and other webservers with {ADDRESS_VARIABLE}=ADDRESS"
    if problem := reload_location(address):
        return f"the webserver at {address} does not reload the code location ({problem}): reload it in the UI"
    cursor["reloaded"] = now, time.time()
    return "the code location is being reloaded"


def reload_location(address: str) -> str:
    """Ask a webserver to reload the code location, and return what went wrong. Does not wait until everything is loaded."""
    parts = urlsplit(address)
    connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection  # no proxy is asked
    connection = connect(parts.netloc, timeout=ANSWER_SECONDS)
    body = json.dumps({"query": _RELOAD, "variables": {"location": LOCATION}})
    try:
        connection.request("POST", f"{parts.path.rstrip('/')}/graphql", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode("utf-8", "replace")
        if answer.status != http.client.OK:
            return f"status {answer.status}: {' '.join(text.split())[:200]}"
        result = json.loads(text)["data"]["reloadRepositoryLocation"]
        return "" if result["__typename"] == "WorkspaceLocationEntry" else result.get("message") or result["__typename"]
    except TimeoutError:
        return ""
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        connection.close()
