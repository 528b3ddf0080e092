"""The sensor `staleness`: shows on the page of each partition that it is stale or damaged, why, and when it is fresh again.

It compares recipes, as `saeens status` does, and computes nothing. Dagster shows its observations on the pages of partitions, and its
evaluations of the check `recipe` on the Checks tabs, without a run.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors at run time.
import hashlib
import json
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import dagster as dg

from saeens_pipeline.assets.staleness import Status, plan
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.layers import layers_of_source
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.storage.names import place
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

RECIPE = "recipe"
TICK_SECONDS = 30
TICK_BUDGET_SECONDS = 1.0
"""After this time a tick ends, and the next one goes on with the next experiment."""
MOST_TOLD = 40
"""Observations and evaluations of a tick. Each takes about 0.04 s; others follow when it is the experiment's turn again."""


def staleness_sensor(catalogue: Ops) -> dg.SensorDefinition:
    """Return the sensor, which looks at experiments in turn.

    Its cursor has the experiment that is next and, by source and experiment, a hash of the reason for each partition that is told to be
    stale or damaged, and of what the check `recipe` of each asset has been told.
    """
    names = sorted(catalogue.experiments)

    @dg.sensor(
        name="staleness",
        description="Shows on each partition's page, and by the check `recipe`, what is stale or damaged and why. It computes nothing.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def staleness(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        cursor = json.loads(context.cursor or "{}")
        told: dict[str, dict[str, str]] = cursor.get("told", {})
        checked: dict[str, dict[str, str]] = cursor.get("checked", {})
        first = names.index(cursor["next"]) if cursor.get("next") in names else 0
        events: list[dg.AssetObservation | dg.AssetCheckEvaluation] = []
        began = time.monotonic()
        for i in range(first, first + len(names)):
            if i > first and (len(events) >= MOST_TOLD or time.monotonic() - began > TICK_BUDGET_SECONDS):
                break
            by_owner = statuses_on_disk(catalogue, names[i % len(names)], context.instance)
            for owner, statuses in by_owner.items():
                before = {name: reason for name, reason in told.get(owner, {}).items() if name in statuses}  # others were removed
                changed = [name for name, each in statuses.items() if before.get(name, "") != _digest(each)]
                for name in changed[: MOST_TOLD - len(events)]:
                    events.append(_observation(statuses[name]))
                    before[name] = _digest(statuses[name])
                told[owner] = {name: reason for name, reason in before.items() if reason}
            for owner, statuses in by_owner.items():
                checks = _checks(list(statuses.values()))
                before = {key: digest for key, digest in checked.get(owner, {}).items() if key in checks}
                changed = [key for key, (digest, _) in checks.items() if before.get(key) != digest]
                for key in changed[: max(MOST_TOLD - len(events), 0)]:
                    before[key], evaluation = checks[key]
                    events.append(evaluation)
                checked[owner] = before
        else:
            i = first
        told, checked = ({owner: each for owner, each in of_owners.items() if each} for of_owners in (told, checked))
        cursor = json.dumps({"next": names[i % len(names)], "told": told, "checked": checked}) if names else ""
        if not events:
            context.update_cursor(cursor)
            return dg.SkipReason("Nothing has become stale, damaged or fresh since the last tick.")
        return dg.SensorResult(asset_events=events, cursor=cursor)

    return staleness


class RecipeCheck(NamedTuple):
    """The result of the check `recipe` for one asset."""

    passed: bool
    description: str | None
    severity: dg.AssetCheckSeverity
    metadata: dict[str, Any]


def recipe_check(statuses: Sequence[Status]) -> RecipeCheck:
    """Return the result of the check `recipe`, from the statuses of an asset's partitions on disk."""
    outdated = [each for each in statuses if each.state != "fresh"]
    told = [": ".join(filter(None, (str(each.partition), each.state, each.reason))) for each in outdated]
    if not statuses:
        told = ["There is nothing to compare: materialise the asset first."]
    counts = {"fresh partitions": len(statuses) - len(outdated), "stale or damaged partitions": len(outdated)}
    return RecipeCheck(bool(statuses) and not outdated, "  \n".join(told) or None, dg.AssetCheckSeverity.WARN, counts)


def _checks(statuses: Sequence[Status]) -> dict[str, tuple[str, dg.AssetCheckEvaluation]]:
    """Return, by asset, a hash of what the check `recipe` says, and its evaluation."""
    by_asset: dict[str, list[Status]] = {}
    for each in statuses:
        by_asset.setdefault(str(each.declaration.address), []).append(each)
    found: dict[str, tuple[str, dg.AssetCheckEvaluation]] = {}
    for name, of_asset in by_asset.items():
        told, key = recipe_check(of_asset), dg.AssetKey(of_asset[0].declaration.address.key)
        evaluation = dg.AssetCheckEvaluation(asset_key=key, check_name=RECIPE, **told._asdict())
        found[name] = (_hash(f"{told.passed} {told.description or ''}"), evaluation)
    return found


def statuses_on_disk(catalogue: Ops, name: str, instance: dg.DagsterInstance) -> dict[str, dict[str, Status]]:
    """Return the status of every artefact on disk of an experiment and of its source, by these two and place.

    Empty before the experiment's first run.
    """
    store, experiment = Store(data_root()), catalogue.experiments[name]
    if not store.has_any_of(name):
        return {}
    source = catalogue.sources[experiment.source]
    try:
        layers = layers_of_source(source, instance).layers
    except SaeensError:  # its language model is gone, and was needed to judge layers that were added by hand
        layers = sorted(source.layers)
    of_source = f"sources/{source.name}"  # an experiment may have the same name, and other experiments the same source
    found: dict[str, dict[str, Status]] = {of_source: {}, name: {}}
    for stage in plan(store, catalogue.ops(experiment), layers, experiment.ensemble.seeds):
        for status in stage.statuses:
            if status.state != "missing":
                found[of_source if status.declaration.address.kind == "source" else name][place(*status.where)] = status
    return found


def _digest(status: Status) -> str:
    """Return a short hash of what is told of a status; empty for a fresh one, of which nothing is told unless it was stale."""
    return "" if status.state == "fresh" else _hash(f"{status.state} {status.reason}")


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _observation(status: Status) -> dg.AssetObservation:
    told = {"state": status.state, "why": status.reason or None}
    if status.state != "fresh":
        told["what to do"] = "materialise it: what it is computed from is computed first, if it is selected too"
    return dg.AssetObservation(
        dg.AssetKey(status.declaration.address.key),
        description=f"{status.state}: {status.reason}" if status.reason else status.state,
        partition=partition_key(status.declaration, status.partition),
        metadata={name: value for name, value in told.items() if value is not None},
    )
