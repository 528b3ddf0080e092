"""Automation: layers of experiment files become partitions, missing and stale artefacts are computed, schedules retrain.

Only experiments with `automation: on` and their sources are computed automatically.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors and ops at run time.
from collections.abc import Iterable, Mapping
from datetime import timedelta

import dagster as dg
from dagster import AutomationCondition as Condition

from saeens_pipeline.assets.registry import listed
from saeens_pipeline.orchestration.alerts import alerts_sensor, webhook
from saeens_pipeline.orchestration.external_data import external_data_sensor, external_selection
from saeens_pipeline.orchestration.instance import end_dead_runs, layer_changes, layers_name
from saeens_pipeline.orchestration.new_models import new_models_sensor
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.orchestration.retraining import experiment_job, retraining_schedule, retraining_sensor
from saeens_pipeline.orchestration.staleness import staleness_sensor
from saeens_pipeline.settings import ExperimentSettings, SourceSettings
from saeens_pipeline.storage.names import SOURCES_GROUP

TICK_SECONDS = 15  # between two evaluations of conditions and layers
ARRAY_KIND = "zarr"  # kind of tokens, activations and residuals


def automate(assets: Iterable[dg.AssetsDefinition], catalogue: Ops) -> dg.Definitions:
    """Return the assets with their conditions and freshness policies, and the sensors, schedules and jobs."""
    jobs = {experiment.name: experiment_job(catalogue, experiment) for experiment in catalogue.experiments.values()}
    scheduled = [experiment for experiment in catalogue.experiments.values() if experiment.schedule]
    return dg.Definitions(
        assets=[asset.map_asset_specs(lambda spec: _with_policies(spec, catalogue.experiments)) for asset in assets],
        sensors=[
            layers_sensor(catalogue.sources),
            automation_sensor(),
            retraining_sensor(catalogue),
            staleness_sensor(catalogue),
            external_data_sensor(catalogue),
            *([new_models_sensor(catalogue)] if catalogue.followed else []),
            *([alerts_sensor()] if webhook() else []),
        ],
        schedules=[retraining_schedule(catalogue, experiment, jobs[experiment.name]) for experiment in scheduled],
        jobs=list(jobs.values()),
    )


def automation_condition(*, reads_external_data: bool = False) -> Condition:
    """Return the condition that requests a missing or changed partition, once, when its inputs are settled.

    A failed partition is requested again when its settings or inputs change. Assets with the same partitions as an input are computed in
    the same run, in order. Inputs from other runs, such as activations, have to be up to date first, and so do the inputs of arrays: SAEs
    wait while the tokens of their activations are computed again, and round 2 waits for the new round 1 behind its residual.
    """
    handled = Condition.newly_updated() | Condition.newly_requested()
    changed = (Condition.code_version_changed() | Condition.any_deps_match(Condition.data_version_changed())).since(handled)
    same_run = Condition.any_deps_match(Condition.will_be_requested())
    missing = Condition.missing() & ~Condition.execution_failed()
    wanted = (missing | changed | same_run).with_label("missing and did not fail, or settings or inputs changed")
    waits = (changed & ~Condition.will_be_requested()) | Condition.in_progress()
    behind_arrays = Condition.any_deps_match(Condition.any_deps_match(waits)).allow(dg.AssetSelection.kind(ARRAY_KIND))
    settled = (~Condition.any_deps_match(waits) & ~behind_arrays).with_label("no input is about to change")
    # At its end a partition briefly counts as not in progress and not computed: it would be requested a second time.
    just_ended = ((~Condition.in_progress()).newly_true() | Condition.newly_requested()).with_label("in progress a moment ago")
    idle = ~Condition.in_progress() & ~just_ended
    not_there = Condition.any_deps_missing()
    if reads_external_data:  # of what was never observed nothing is known
        not_there = not_there.ignore(external_selection())
    return (wanted & idle & ~not_there & settled).with_label("missing or outdated, inputs settled")


def leaderboard_condition() -> Condition:
    """Return the condition that requests the leaderboard when one of its tables was computed. It does not wait for missing tables.

    Tables computed after the request may not be in the leaderboard, so it is requested again. Waiting for tables that are requested at the
    same time is not possible: Dagster knows of such requests for equal partitions only.
    """
    updated = Condition.any_deps_match(Condition.newly_updated())
    settled = ~Condition.any_deps_in_progress() & ~Condition.in_progress()
    return (updated.since(Condition.newly_requested() & ~updated) & settled).with_label("a table that it shows was computed")


def _with_policies(spec: dg.AssetSpec, experiments: Mapping[str, ExperimentSettings]) -> dg.AssetSpec:
    automated = [experiment for experiment in experiments.values() if experiment.automation == "on"]
    if spec.tags.get("table") in {table.name for table in listed(over_experiments=True)}:
        return spec.replace_attributes(automation_condition=leaderboard_condition()) if automated else spec
    owner = spec.key.path[0]
    if spec.group_name == SOURCES_GROUP:
        in_use = any(experiment.source == owner for experiment in automated)
        return spec.replace_attributes(automation_condition=automation_condition(reads_external_data=True)) if in_use else spec
    experiment = experiments.get(owner)
    if experiment is None:  # the asset of a broken file
        return spec
    if experiment.automation == "on":
        spec = spec.replace_attributes(automation_condition=automation_condition())
    if experiment.freshness and "table" in spec.tags:
        fail, warn = experiment.freshness.fail_days, experiment.freshness.warn_days
        policy = dg.FreshnessPolicy.time_window(timedelta(days=fail), timedelta(days=warn) if warn is not None else None)
        spec = spec.replace_attributes(freshness_policy=policy)
    return spec


def automation_sensor() -> dg.AutomationConditionSensorDefinition:
    """Return the sensor that evaluates the automation conditions of assets. It is on by default, and experiments opt in."""
    return dg.AutomationConditionSensorDefinition(
        "automation",
        target=dg.AssetSelection.all(),
        description="Materialises missing and stale artefacts of experiments with `automation: on`.",
        run_tags={"user": "automation"},
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
        emit_backfills=False,  # a backfill waits up to a minute between two steps of the chain
    )


def layers_sensor(sources: Mapping[str, SourceSettings]) -> dg.SensorDefinition:
    """Return the sensor that keeps the partitions of every source equal to the layers of its experiment file.

    It also ends runs whose process was killed: they would hold the GPU pool, and the automation would wait for them forever.
    """

    @dg.sensor(
        name="layers",
        description="Adds the layers of the experiment files as partitions and removes layers that left the files. No data is removed.",
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def layers(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        end_dead_runs(context.instance)
        requests: list[dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest] = []
        changes: list[str] = []
        for source in sources.values():
            for name, added, gone in layer_changes(context.instance, source.name, source.layers):
                partitions = dg.DynamicPartitionsDefinition(name=name)
                parts = [f"{what} {', '.join(layers)}" for what, layers in (("added", added), ("removed", gone)) if layers]
                changes += [f"{name}: {', '.join(parts)}"] if parts and name == layers_name(source.name) else []
                requests += [partitions.build_add_request(added)] if added else []
                requests += [partitions.build_delete_request(gone)] if gone else []
        if not requests:
            return dg.SkipReason("The partitions are the layers of the experiment files and those added in the UI.")
        said = dg.SkipReason("; ".join(changes) or "The record of the layers in the experiment files was brought up to date.")
        return dg.SensorResult(skip_reason=said, dynamic_partitions_requests=requests)

    return layers
