"""The sensor `staleness`: shows on the page of each partition that it is stale or damaged, why, and when it is fresh again.

It compares recipes, as `saeens status` does, and computes nothing. Dagster shows its observations on the pages of partitions, and its
evaluations of the check `recipe` on the Checks tabs, without a run.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors at run time.
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import dagster as dg

from saeens_pipeline.assets.staleness import Status, plan
from saeens_pipeline.errors import SaeensError, counted
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.layers import layers_of_source
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.settings import SourceSettings
from saeens_pipeline.storage.names import place
from saeens_pipeline.storage.recipes import Snapshot, Store
from saeens_pipeline.storage.root import data_root

RECIPE = "recipe"
TICK_SECONDS = 30
TICK_BUDGET_SECONDS = 1.0
"""After this time a tick ends, and the next one goes on with the next layer."""
MOST_TOLD = 40
"""Observations and evaluations of a tick. Each takes about 0.04 s; others follow in the next tick."""
_MOST_LINES, _MOST_CHARACTERS = 8, 300  # of the check `recipe`, for the partitions of a layer


def staleness_sensor(catalogue: Ops) -> dg.SensorDefinition:
    """Return the sensor, which looks at the layers of all experiments in turn.

    Its cursor has the experiment and layer that are next and, by source or experiment and layer, a hash of the reason for each partition
    that is told to be stale or damaged, and what the check `recipe` of each asset says of the layer.
    """

    @dg.sensor(
        name="staleness",
        description="Shows on each partition's page, and by the check `recipe`, what is stale or damaged and why. It computes nothing.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def staleness(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        cursor = json.loads(context.cursor or "{}")
        told: dict[str, dict[str, str]] = cursor.get("told", {})
        checked: dict[str, dict[str, _Layer]] = cursor.get("checked", {})
        turns = _turns(catalogue, context.instance)
        after = cursor.get("next", ""), cursor.get("layer", 0)
        i = first = next((i for i, turn in enumerate(turns) if turn >= after), 0)
        store, events = Snapshot(data_root()), list[dg.AssetObservation | dg.AssetCheckEvaluation]()
        began = time.monotonic()
        for i in range(first, first + len(turns)):
            if i > first and (len(events) >= MOST_TOLD or time.monotonic() - began > TICK_BUDGET_SECONDS):
                break
            is_told, by_owner = True, _on_disk(catalogue, store, *turns[i % len(turns)])
            for owner, statuses in by_owner.items():
                before = {name: reason for name, reason in told.get(owner, {}).items() if name in statuses}  # others were removed
                changed = [name for name, each in statuses.items() if before.get(name, "") != _digest(each)]
                is_told = is_told and len(changed) <= MOST_TOLD - len(events)
                for name in changed[: MOST_TOLD - len(events)]:
                    events.append(_observation(statuses[name]))
                    before[name] = _digest(statuses[name])
                told[owner] = {name: reason for name, reason in before.items() if reason}
            for owner, statuses in by_owner.items():
                layers = _by_asset(statuses.values())
                before = checked[owner] = {name: layer for name, layer in checked.get(owner, {}).items() if name in layers}
                changed = [name for name, (_, layer) in layers.items() if name not in before or before[name][1:] != layer[1:]]
                is_told = is_told and len(changed) <= MOST_TOLD - len(events)
                for name in changed[: max(MOST_TOLD - len(events), 0)]:
                    key, before[name] = layers[name]
                    told_of = recipe_check([of_owner[name] for of_owner in checked.values() if name in of_owner])
                    events.append(dg.AssetCheckEvaluation(asset_key=key, check_name=RECIPE, **told_of._asdict()))
            if not is_told:  # the next tick goes on with it
                break
        else:
            i = first
        owners = {owner for turn in turns for owner in _owners(catalogue, *turn)}
        told = {owner: of_owner for owner, of_owner in told.items() if of_owner and owner in owners}
        checked = {owner: of_owner for owner, of_owner in checked.items() if owner in owners}
        name, layer = turns[i % len(turns)] if turns else ("", 0)
        cursor = json.dumps({"next": name, "layer": layer, "told": told, "checked": checked})
        if not events:
            context.update_cursor(cursor)
            return dg.SkipReason("Nothing has become stale, damaged or fresh since the last tick.")
        return dg.SensorResult(asset_events=events, skip_reason=_said(events), cursor=cursor)

    return staleness


class RecipeCheck(NamedTuple):
    """The result of the check `recipe` for one asset."""

    passed: bool
    description: str | None
    severity: dg.AssetCheckSeverity
    metadata: dict[str, Any]


_Layer = Sequence[Any]
"""Partitions of an asset in one layer, for the check `recipe`: the numbers of fresh and of other ones, and lines about these."""


def recipe_check(layers: Sequence[_Layer]) -> RecipeCheck:
    """Return the result of the check `recipe` for an asset."""
    n_fresh, n_others = (sum(layer[i] for layer in layers) for i in (0, 1))
    lines = [layer[2] for layer in layers if layer[2]] if layers else ["There is nothing to compare: materialise the asset first."]
    counts = {"fresh partitions": n_fresh, "stale or damaged partitions": n_others}
    return RecipeCheck(bool(layers) and not n_others, "  \n".join(lines) or None, dg.AssetCheckSeverity.WARN, counts)


def recipe_checks(catalogue: Ops, name: str, instance: dg.DagsterInstance) -> dict[dg.AssetKey, RecipeCheck]:
    """Return the results of the check `recipe` for all assets on disk of an experiment and its source."""
    store, by_owner = Snapshot(data_root()), dict[str, dict[str, Status]]()
    for layer in _layers(catalogue.sources[catalogue.experiments[name].source], instance):
        by_owner |= _on_disk(catalogue, store, name, layer)  # tokens, which have no layer, once
    found: dict[dg.AssetKey, list[_Layer]] = {}
    for statuses in by_owner.values():
        for key, of_layer in _by_asset(statuses.values()).values():
            found.setdefault(key, []).append(of_layer)
    return {key: recipe_check(layers) for key, layers in found.items()}


def _by_asset(statuses: Iterable[Status]) -> dict[str, tuple[dg.AssetKey, _Layer]]:
    """Return, by asset, its key and what the check `recipe` says of these partitions."""
    by_asset: dict[str, list[Status]] = {}
    for each in statuses:
        by_asset.setdefault(str(each.declaration.address), []).append(each)
    found: dict[str, tuple[dg.AssetKey, _Layer]] = {}
    for name, of_asset in by_asset.items():
        others = [each for each in of_asset if each.state != "fresh"]
        lines = [": ".join(filter(None, (str(each.partition), each.state, each.reason)))[:_MOST_CHARACTERS] for each in others]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"and {len(lines) - _MOST_LINES} more"]
        key = dg.AssetKey(of_asset[0].declaration.address.key)
        found[name] = key, [len(of_asset) - len(others), len(others), "  \n".join(lines)]
    return found


def _turns(catalogue: Ops, instance: dg.DagsterInstance) -> list[tuple[str, int]]:
    """Return the layers of all experiments that have run, sorted by name and number."""
    store, layers = Store(data_root()), dict[str, list[int]]()
    turns: list[tuple[str, int]] = []
    for name, experiment in sorted(catalogue.experiments.items()):
        if store.has_any_of(name):
            if experiment.source not in layers:
                layers[experiment.source] = _layers(catalogue.sources[experiment.source], instance)
            turns += [(name, layer) for layer in layers[experiment.source]]
    return turns


def _layers(source: SourceSettings, instance: dg.DagsterInstance) -> list[int]:
    try:
        return layers_of_source(source, instance).layers
    except SaeensError:  # its language model is gone, and was needed to judge layers that were added by hand
        return sorted(source.layers)


def _owners(catalogue: Ops, name: str, layer: int) -> tuple[str, str, str]:
    """Return the keys in the cursor of tokens, activations and the artefacts of an experiment, which may have its source's name."""
    source = f"sources/{catalogue.experiments[name].source}"
    return source, f"{source}/{layer}", f"{name}/{layer}"


def _on_disk(catalogue: Ops, store: Store, name: str, layer: int) -> dict[str, dict[str, Status]]:
    """Return the status of every artefact on disk of a layer of an experiment and of its source, by owner and place."""
    tokens, activations, own = _owners(catalogue, name, layer)
    experiment = catalogue.experiments[name]
    found: dict[str, dict[str, Status]] = {tokens: {}, activations: {}, own: {}}
    for stage in plan(store, catalogue.ops(experiment), [layer], experiment.ensemble.seeds):
        for status in stage.statuses:
            if status.state != "missing":
                of_source = tokens if status.partition.layer is None else activations
                found[of_source if status.declaration.address.kind == "source" else own][place(*status.where)] = status
    return found


def _said(events: Sequence[dg.AssetObservation | dg.AssetCheckEvaluation]) -> dg.SkipReason:
    """Return what a tick has told, in words: Dagster shows it in the list of ticks."""
    observations = [each for each in events if isinstance(each, dg.AssetObservation)]
    states = Counter(str(each.metadata["state"].value) for each in observations)
    told = [f"{counted(n, 'partition')} {state}" for state, n in sorted(states.items())]
    n_checks = len(events) - len(observations)
    told += [f"{counted(n_checks, 'check')} `{RECIPE}`"] if n_checks else []
    return dg.SkipReason(f"Told: {', '.join(told)}.")


def _digest(status: Status) -> str:
    """Return a short hash of what is told of a status; empty for a fresh one, of which nothing is told unless it was stale."""
    return "" if status.state == "fresh" else hashlib.sha256(f"{status.state} {status.reason}".encode()).hexdigest()[:12]


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
