"""Retraining: an experiment's job or its schedule marks what is wanted, and a sensor requests runs until all of it is fresh.

Marks are dynamic partitions of the instance. A run computes one partition. Requests of one tick do not wait for each other: a run is
requested once the runs with its inputs have ended, so that all layers and seeds whose activations are there are requested together.
"""

# Without `from __future__ import annotations`: Dagster reads the annotations of sensors and ops at run time.
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from urllib.parse import quote

import dagster as dg
from pydantic import Field

from saeens_pipeline.assets.staleness import Stage, Status, plan
from saeens_pipeline.errors import counted
from saeens_pipeline.orchestration.assets import partition_key
from saeens_pipeline.orchestration.instance import declare_layers
from saeens_pipeline.orchestration.layers import layers_of_source
from saeens_pipeline.orchestration.ops import Ops
from saeens_pipeline.settings import ExperimentSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

TICK_SECONDS = 15
WHY_TAG = "saeens/why"
MARK_TAG = "saeens/mark"
_MARKED_TAG = "saeens/marked"  # of the run that set a mark
_MOST_TAG_CHARACTERS = 63
_MOST_REASONS = 3  # that a log line of a tick names


class Wanted(dg.Config):
    """Layers and seeds that a job marks: the launchpad shows these fields."""

    layers: list[int] = Field(default=[], description="only these layers, such as [1, 2]; empty: all layers of the source")
    seeds: list[int] = Field(default=[], description="only these ensemble seeds; empty: all seeds of the experiment")


class Mark(NamedTuple):
    """A mark: when it was made, and what is wanted. Empty layers or seeds stand for all of them."""

    at: str
    layers: tuple[int, ...] = ()
    seeds: tuple[int, ...] = ()

    @classmethod
    def read(cls, key: str) -> "Mark":
        """Return the mark of a dynamic partition: the inverse of `key`."""
        at, *parts = key.split(" ")
        given = dict(part.split("=") for part in parts)
        layers, seeds = (tuple(int(number) for number in given.get(name, "").split(",") if number) for name in ("layers", "seeds"))
        return cls(at, layers, seeds)

    @property
    def key(self) -> str:
        """The mark as a dynamic partition, such as `2026-01-31T03-00-00 layers=1,2`."""
        given = {"layers": self.layers, "seeds": self.seeds}
        return " ".join([self.at, *(f"{name}={','.join(map(str, numbers))}" for name, numbers in given.items() if numbers)])

    def includes(self, partition: Partition) -> bool:
        """Return whether the artefacts of a partition are wanted."""
        is_layer = not self.layers or partition.layer is None or partition.layer in self.layers
        return is_layer and (not self.seeds or partition.seed is None or partition.seed in self.seeds)


class _Work(NamedTuple):
    """Artefacts of a partition to compute: those that are not fresh, or that `freshness` wants confirmed."""

    partition: Partition
    wanted: list[Status]

    @property
    def reasons(self) -> list[str]:
        """Why: one sentence for each cause, the first ones of its artefacts."""
        reasons = [f"{each.declaration.address} {each.reason or f'is {each.state}'}" for each in self.wanted if each.state != "fresh"]
        return list(dict.fromkeys(reasons)) or ["confirmed by a cache hit"]

    def __str__(self) -> str:
        reasons = self.reasons
        more = f"; and {len(reasons) - _MOST_REASONS} more" if len(reasons) > _MOST_REASONS else ""
        where = str(self.partition) or "of all layers"
        return f"{where}: {counted(len(self.wanted), 'artefact')}: {'; '.join(reasons[:_MOST_REASONS])}{more}"


class _LeftOut(NamedTuple):
    """Work that a mark names and does not compute, and the partitions that it waits for, which are neither chosen nor fresh."""

    work: _Work
    waits_for: list[Partition]

    def __str__(self) -> str:
        missing = "; ".join(dict.fromkeys(str(each) or "what all layers share" for each in self.waits_for))
        return f"{self.work}; left out, since it waits for what is neither chosen nor fresh: {missing}"


def marks_name(experiment: str) -> str:
    """Return the name of the dynamic partitions that hold the marks of an experiment."""
    return f"{experiment}/retraining"  # no experiment can have this name


def experiment_job(ops: Ops, experiment: ExperimentSettings) -> dg.JobDefinition:
    """Return the job that marks an experiment: the sensor `retraining` then computes what is missing or stale."""
    name = experiment.name

    @dg.op(
        name=f"{name}__mark",
        description="Marks what is wanted; the sensor `retraining` requests its runs, with the device of this one.",
        required_resource_keys={"compute"},
    )
    def mark(context: dg.OpExecutionContext, config: Wanted) -> None:
        layers = _layers(ops, experiment, context.instance)
        for given, known, what in ((config.layers, layers, "layer"), (config.seeds, experiment.ensemble.seeds, "seed")):
            if unknown := sorted(set(given) - set(known)):
                raise dg.Failure(f"{name} has no {what} {', '.join(map(str, unknown))}; it has {', '.join(map(str, known))}")
        made = Mark(datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S"), tuple(sorted(set(config.layers))), tuple(sorted(set(config.seeds))))
        todo, left_out = _reached(list(_works(ops, experiment, context.instance)), made)
        for each in left_out:
            context.log.warning(str(each))
        told: dict[str, Any] = {"left out": "\n".join(map(str, left_out))} if left_out else {}
        if not todo:
            context.log.info("nothing is marked: all that was chosen is fresh, or left out")
            context.add_output_metadata(told)
            return
        context.instance.add_run_tags(context.run.run_id, {_MARKED_TAG: made.at})
        context.instance.add_dynamic_partitions(marks_name(name), [made.key])
        runs = f"/runs?q[]={quote(f'tag:{MARK_TAG}={made.key}', safe='')}"
        context.log.info(f"marked; the sensor `retraining` requests {counted(len(todo), 'run')}: {runs}")
        for work in todo:
            context.log.info(str(work))
        context.add_output_metadata({"runs": dg.MetadataValue.url(runs), "marked": "\n".join(map(str, todo))} | told)

    @dg.job(
        name=name,
        description="Trains and evaluates what is missing or stale, of all layers and seeds or of those chosen in the launchpad.",
        executor_def=dg.in_process_executor,
        tags={"experiment": name},
    )
    def train() -> None:
        mark()

    return train


def retraining_schedule(ops: Ops, experiment: ExperimentSettings, job: dg.JobDefinition) -> dg.ScheduleDefinition:
    """Return a schedule of an experiment's job. It skips when all of it is fresh."""
    assert experiment.schedule is not None, "an experiment without a schedule has no schedule"

    @dg.schedule(
        name=f"{experiment.name}_schedule",
        job=job,
        cron_schedule=experiment.schedule,
        description=f"Retrains {experiment.name} after changes of settings, code versions, the language model's revision or the corpus.",
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )
    def schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest | dg.SkipReason:
        todo = [work for work in _works(ops, experiment, context.instance) if work.wanted]
        if not todo:
            return dg.SkipReason("All artefacts are fresh: there is nothing to retrain.")
        for work in todo:
            context.log.info(str(work))
        would = f"{counted(sum(len(work.wanted) for work in todo), 'artefact')} in {counted(len(todo), 'run')}"
        return dg.RunRequest(tags={"user": "schedule", "saeens/computes": would, WHY_TAG: todo[0].reasons[0][:_MOST_TAG_CHARACTERS]})

    return schedule


def retraining_sensor(ops: Ops) -> dg.SensorDefinition:
    """Return the sensor that requests the runs of marked experiments."""

    @dg.sensor(
        name="retraining",
        description="Requests a run for each missing or stale partition of experiments that their job or schedule has marked.",
        asset_selection=dg.AssetSelection.all(),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=TICK_SECONDS,
    )
    def retraining(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        requests: list[dg.RunRequest] = []
        finished: list[dg.DeleteDynamicPartitionsRequest] = []
        waiting: list[str] = []
        for experiment in ops.experiments.values():
            keys = context.instance.get_dynamic_partitions(marks_name(experiment.name))
            if not keys:
                continue
            due = due_requests(ops, experiment, context.instance, [Mark.read(key) for key in keys])
            requests += due.requests
            for work in due.works:
                context.log.info(f"requested: {experiment.name}, {work}")
            if due.finished:
                ended = [mark.key for mark in due.finished]
                finished.append(dg.DynamicPartitionsDefinition(name=marks_name(experiment.name)).build_delete_request(ended))
            elif not due.requests:
                waiting.append(experiment.name)
        if not requests and not finished:
            waits = f"The requested runs of {', '.join(waiting)} have not ended." if waiting else "No experiment is marked."
            return dg.SkipReason(waits)
        ended = None if requests else dg.SkipReason("All that was marked has ended or waits for a failed run: the marks are removed.")
        return dg.SensorResult(run_requests=requests or None, skip_reason=ended, dynamic_partitions_requests=finished)

    return retraining


class Due(NamedTuple):
    """Requests of a tick for an experiment: the run requests, what they are for, and the marks that have nothing left to wait for."""

    requests: list[dg.RunRequest]
    works: list[_Work]
    finished: list[Mark]


def due_requests(ops: Ops, experiment: ExperimentSettings, instance: dg.DagsterInstance, marks: Sequence[Mark]) -> Due:
    """Return what marks of an experiment, the oldest first, ask for now.

    A run waits for those of its layer and seed that come before it. A failed run is not repeated, and what waits for it is not requested.
    """
    works = list(_works(ops, experiment, instance))
    due = Due([], [], [])
    claimed: set[int] = set()  # places in `works`: activations and tables of a layer have the same partition
    for mark in marks:
        is_pending, unfinished = False, list[_Work]()
        for number, work in enumerate(works):
            key = f"{experiment.name}:{mark.key}:{number}:{work.partition}"
            run = _run_of(instance, key) if work.wanted and mark.includes(work.partition) else None
            if not work.wanted or (run and run.is_success):
                continue
            waits = any(_comes_before(other.partition, work.partition) for other in unfinished)
            unfinished.append(work)
            if not mark.includes(work.partition) or (run and run.is_finished):
                continue
            if run or number in claimed:
                is_pending = True
            elif not waits:
                is_pending = True
                due.works.append(work)
                due.requests.append(_request(work, mark, key, _chosen_device(experiment, instance, mark)))
            if run or not waits:
                claimed.add(number)
        if not is_pending:
            due.finished.append(mark)
    return due


def _reached(works: Sequence[_Work], mark: Mark) -> tuple[list[_Work], list[_LeftOut]]:
    """Return the works that a mark computes, and those that it names and that wait for works outside it."""
    reached, left_out = list[_Work](), list[_LeftOut]()
    causes: list[tuple[Partition, list[Partition]]] = []  # of what stays unfinished: its partition, and what is not chosen behind it
    for work in works:
        if not work.wanted:
            continue
        waits_for = [cause for other, behind in causes if _comes_before(other, work.partition) for cause in behind]
        if not mark.includes(work.partition):
            causes.append((work.partition, [work.partition]))
        elif waits_for:
            left_out.append(_LeftOut(work, waits_for))
            causes.append((work.partition, waits_for))
        else:
            reached.append(work)
    return reached, left_out


def _chosen_device(experiment: ExperimentSettings, instance: dg.DagsterInstance, mark: Mark) -> dict[str, Any]:
    """Return the configuration of runs with the device that was chosen for the run of the job that set a mark."""
    marking = dg.RunsFilter(job_name=experiment.name, tags={_MARKED_TAG: mark.at})
    configs: list[Mapping[str, Any]] = [run.run_config for run in instance.get_runs(marking, limit=1)]
    resources = configs[0].get("resources", {}) if configs else {}
    return {"resources": {"compute": resources["compute"]}} if "compute" in resources else {}


def _request(work: _Work, mark: Mark, key: str, run_config: dict[str, Any]) -> dg.RunRequest:
    return dg.RunRequest(
        run_key=key,
        partition_key=partition_key(work.wanted[0].declaration, work.partition),
        asset_selection=[dg.AssetKey(each.declaration.address.key) for each in work.wanted],
        run_config=run_config,
        tags={"user": "retraining", MARK_TAG: mark.key, WHY_TAG: work.reasons[0][:_MOST_TAG_CHARACTERS]},
    )


def _comes_before(earlier: Partition, later: Partition) -> bool:
    """Return whether artefacts of the later of two partitions may have inputs in the earlier one."""
    return earlier.layer in (None, later.layer) and (None in (earlier.seed, later.seed) or earlier.seed == later.seed)


def _works(ops: Ops, experiment: ExperimentSettings, instance: dg.DagsterInstance) -> Iterator[_Work]:
    """Yield what is to be done for each partition, in order. With `freshness`, fresh tables count: a cache hit confirms them."""
    for stage in _stages(ops, experiment, instance):
        confirms = experiment.freshness is not None
        wanted = [each for each in stage.statuses if each.state != "fresh" or (confirms and each.declaration.address.kind == "eval")]
        yield _Work(stage.partition, wanted)


def _stages(ops: Ops, experiment: ExperimentSettings, instance: dg.DagsterInstance) -> list[Stage]:
    return plan(Store(data_root()), ops.ops(experiment), _layers(ops, experiment, instance), experiment.ensemble.seeds)


def _layers(ops: Ops, experiment: ExperimentSettings, instance: dg.DagsterInstance) -> list[int]:
    source = ops.sources[experiment.source]
    declare_layers(instance, source.name, source.layers)
    return layers_of_source(source, instance).layers


def _run_of(instance: dg.DagsterInstance, key: str) -> dg.DagsterRun | None:
    return next(iter(instance.get_runs(dg.RunsFilter(tags={"dagster/run_key": key}), limit=1)), None)
