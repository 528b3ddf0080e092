"""External data: the language model and the corpus of each source, as assets that Dagster observes and does not compute.

Their data version is a hash of the identity that recipes hold: of files, or the commit of a revision of the hub. Runs observe what they
have read; the sensor `external_data` sees what changes afterwards. With `automation: on` a change is computed without a schedule.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors and assets at run time.
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import dagster as dg

from saeens_pipeline.assets.declarations import Declaration, ExternalData, Op
from saeens_pipeline.assets.materialise import Materialised
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.hub import from_cache_alone
from saeens_pipeline.orchestration.dagster_internals import forget_input_version
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.storage.names import SOURCES_GROUP, Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

TICK_SECONDS = 30
TICK_BUDGET_SECONDS = 1.0
"""After this time a tick ends, and the next one goes on with the next source."""
DATA_VERSION_TAG = "dagster/data_version"
_MOST_CHARACTERS = 2000  # of an identity that is shown


def external_key(declaration: Declaration, name: str) -> dg.AssetKey:
    """Return the asset key of external data that an artefact is computed from."""
    return dg.AssetKey([declaration.source, name])


def external_selection() -> dg.AssetSelection:
    """Return the selection of all external data: what is observed of the group of sources."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        return dg.AssetSelection.groups(SOURCES_GROUP, include_sources=True) - dg.AssetSelection.groups(SOURCES_GROUP)


def external_assets(ops: Iterable[Op]) -> list[dg.AssetsDefinition]:
    """Return observable assets for everything that the outputs of these ops are computed from and no op computes, together by source."""
    declarations = {output.source: output for op in ops for output in op.outputs if output.external and not output.inputs}
    return [_external_asset(declaration) for declaration in declarations.values()]


def _external_asset(declaration: Declaration) -> dg.AssetsDefinition:
    """Return the observable assets of a source. `declaration`: its tokens, which read all of its external data."""
    read = {external_key(declaration, name): external for name, external in declaration.external.items()}
    specs = [
        dg.AssetSpec(key, group_name=SOURCES_GROUP, description=external.description, tags=dict(declaration.tags))
        for key, external in read.items()
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)

        @dg.multi_observable_source_asset(name=f"{declaration.source}__external_data", specs=specs, can_subset=True)
        def observe(context: dg.AssetExecutionContext) -> Iterator[dg.ObserveResult]:
            settings = declaration.partition_settings(Partition())
            for key, external in read.items():
                if key in context.selected_asset_keys:
                    version = dg.DataVersion(external.version(settings))
                    yield dg.ObserveResult(asset_key=key, data_version=version, metadata=_metadata(external, settings))

    return observe


def _metadata(external: ExternalData, settings: Mapping[str, Any]) -> dict[str, Any]:
    identity = {name: settings[name] for name in external.settings if name in settings}
    return {"identity": dg.MetadataValue.json(identity)} if len(json.dumps(identity)) <= _MOST_CHARACTERS else {}


def _changed(instance: dg.DagsterInstance, declaration: Declaration, settings: Mapping[str, Any]) -> Iterator[dg.AssetObservation]:
    """Yield an observation of each external data of an artefact whose version is not the one observed last.

    settings: those of a recipe, or of a partition.
    """
    for name, external in declaration.external.items():
        key, version = external_key(declaration, name), external.version(settings)
        last = instance.fetch_observations(key, limit=1).records
        if not last or last[0].event_log_entry.asset_observation.tags.get(DATA_VERSION_TAG) != version:  # pyright: ignore[reportOptionalMemberAccess]
            yield dg.AssetObservation(key, tags={DATA_VERSION_TAG: version}, metadata=_metadata(external, settings))


def observe_inputs(context: dg.AssetExecutionContext, made: Iterable[Materialised]) -> None:
    """Record in a run which versions of external data its artefacts were computed from, before the artefacts are reported."""
    for each in made:
        for observation in _changed(context.instance, each.declaration, each.artefact.recipe["settings"]):
            context.log_event(observation)
            forget_input_version(context, observation.asset_key)


def external_data_sensor(catalogue: Ops) -> dg.SensorDefinition:
    """Return the sensor, which looks at sources in turn; its cursor has the source that is next.

    It looks at sources with tokens only, and at the hub's cache only. Files are hashed again when their size or time of change differs.
    """
    names = sorted(name for name, source in catalogue.sources.items() if not source.synthetic)

    @dg.sensor(
        name="external_data",
        description="Observes the files of language models and corpora that artefacts were computed from. It computes nothing.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def external_data(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        first = names.index(context.cursor) if context.cursor in names else 0
        events: list[dg.AssetObservation] = []
        problems: list[str] = []
        began = time.monotonic()
        i = first
        for i in range(first, first + len(names)):
            if i > first and time.monotonic() - began > TICK_BUDGET_SECONDS:
                break
            name = names[i % len(names)]
            tokens = catalogue.source_ops(name)[0].outputs[0]
            if Store(data_root()).data_version(tokens.address, Partition()) is None:
                continue
            try:
                with from_cache_alone():
                    settings = tokens.partition_settings(Partition())
            except (SaeensError, OSError) as error:
                problems.append(f"{name}: {' '.join(str(error).split())}")
                continue
            events += _changed(context.instance, tokens, settings)
        cursor = names[i % len(names)] if names else ""
        for problem in problems:
            context.log.warning(problem)
        if events:
            said = f"Observed for the first time or changed: {', '.join(each.asset_key.to_user_string() for each in events)}."
            return dg.SensorResult(asset_events=events, skip_reason=dg.SkipReason(said), cursor=cursor)
        context.update_cursor(cursor)
        return dg.SkipReason("; ".join(problems) or "No language model and no corpus has changed since the last tick.")

    return external_data
