"""Retraining: a schedule or a job marks an experiment, and a sensor requests its stages, one after another, until all are fresh.

Marks are dynamic partitions of the instance. Each stage needs the artefacts of the stage before and has other partitions, and requests of
one tick do not wait for each other: so one stage is requested at a time.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors and ops at run time.
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from saeens_pipeline.assets.staleness import stages_of
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.instance import declare_layers
from saeens_pipeline.orchestration.layers import layers_of_source
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

TICK_SECONDS = 15
WHY_TAG = "saeens/why"
_MARK_TAG = "saeens/retraining"
_MOST_TAG_CHARACTERS = 63


def marks_name(experiment: str) -> str:
    """Return the name of the dynamic partitions that hold the marks of an experiment."""
    return f"{experiment}/retraining"  # no experiment can have this name


def retraining_schedule(ops: Ops, experiment: ExperimentSettings) -> dg.ScheduleDefinition:
    """Return a schedule whose job marks an experiment, unless all of it is fresh. The sensor requests the runs."""
    name = f"{experiment.name}_retraining"

    @dg.op(
        name=f"{name}__mark",
        description="Marks the experiment; the sensor `retraining` requests its runs, with the device of this one.",
        required_resource_keys={"compute"},
    )
    def mark(context: dg.OpExecutionContext) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
        context.instance.add_run_tags(context.run.run_id, {_MARK_TAG: now})
        context.instance.add_dynamic_partitions(marks_name(experiment.name), [now])
        context.log.info("marked: the sensor `retraining` requests a run for each stage with missing or stale artefacts")

    @dg.job(
        name=name,
        description=f"Marks {experiment.name} for retraining: missing and stale artefacts are computed, a run for each stage.",
        executor_def=dg.in_process_executor,
    )
    def retraining() -> None:
        mark()

    @dg.schedule(
        name=f"{name}_schedule",
        job=retraining,
        cron_schedule=experiment.schedule,
        description=f"Retrains {experiment.name} after changes of settings, code versions, the language model's revision or the corpus.",
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        if next_request(ops, experiment, context.instance, mark="") is None:
            return dg.SkipReason("All artefacts are fresh: there is nothing to retrain.")
        return dg.RunRequest(tags={"user": name})

    return schedule


def retraining_sensor(ops: Ops) -> dg.SensorDefinition:
    """Return the sensor that requests the stages of marked experiments."""

    @dg.sensor(
        name="retraining",
        description="Requests a run for each missing or stale stage of experiments that a retraining job has marked.",
        asset_selection=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def retraining(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        requests: list[dg.RunRequest] = []
        finished: list[dg.DeleteDynamicPartitionsRequest] = []
        for experiment in ops.experiments.values():
            marks = context.instance.get_dynamic_partitions(marks_name(experiment.name))
            if not marks:
                continue
            request = next_request(ops, experiment, context.instance, marks[-1])
            if request is None:
                finished.append(dg.DynamicPartitionsDefinition(name=marks_name(experiment.name)).build_delete_request(marks))
            elif request.run_key and not _run_of(context.instance, request.run_key):
                requests.append(request)
        if not requests and not finished:
            return dg.SkipReason("No experiment is marked, or the run of a stage has not finished.")
        return dg.SensorResult(run_requests=requests, dynamic_partitions_requests=finished)

    return retraining


def next_request(ops: Ops, experiment: ExperimentSettings, instance: dg.DagsterInstance, mark: str) -> dg.RunRequest | None:
    """Return the request of the first stage with wanted artefacts; None if there is none, or if a stage has failed.

    With `freshness`, fresh tables are requested too: a cache hit confirms them.
    """
    source = ops.sources[experiment.source]
    declare_layers(instance, experiment.source, source.layers)
    layers = layers_of_source(source, instance).layers
    stages = stages_of(Store(data_root()), ops.ops(experiment), layers, experiment.ensemble.seeds)
    for number, stage in enumerate(stages):
        wanted = [
            each for each in stage.statuses if each.state != "fresh" or (experiment.freshness and each.declaration.address.kind == "eval")
        ]
        key = f"{experiment.name}:{mark}:{number}:{stage.partition}"
        run = _run_of(instance, key)
        if run and run.is_failure:
            return None
        if wanted and not (run and run.is_success):
            reasons = [each.reason or each.state for each in wanted if each.state != "fresh"] or ["confirmed by a cache hit"]
            return dg.RunRequest(
                run_key=key,
                partition_key=partition_key(wanted[0].declaration, wanted[0].partition),
                asset_selection=[dg.AssetKey(each.declaration.address.key) for each in wanted],
                run_config=_chosen_device(experiment, instance, mark),
                tags={"user": f"{experiment.name}_retraining", _MARK_TAG: mark, WHY_TAG: reasons[0][:_MOST_TAG_CHARACTERS]},
            )
    return None


def _chosen_device(experiment: ExperimentSettings, instance: dg.DagsterInstance, mark: str) -> dict[str, Any]:
    """Return the configuration of runs with the device that was chosen for the run of the job that set a mark."""
    marking = dg.RunsFilter(job_name=f"{experiment.name}_retraining", tags={_MARK_TAG: mark})
    resources = next((run.run_config.get("resources", {}) for run in instance.get_runs(marking, limit=1)), {})
    return {"resources": {"compute": resources["compute"]}} if "compute" in resources else {}


def _run_of(instance: dg.DagsterInstance, key: str) -> dg.DagsterRun | None:
    return next(iter(instance.get_runs(dg.RunsFilter(tags={"dagster/run_key": key}), limit=1)), None)
