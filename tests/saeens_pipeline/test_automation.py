"""Automation: every asset is requested once, in order, after its inputs, and only if automation is on."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from tiny_experiment import EXPERIMENT, LAYER, NAME, SEEDS, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_pipeline.assets.registry import listed
from saeens_pipeline.orchestration.automation import layers_sensor
from saeens_pipeline.orchestration.dagster_internals import forget_partitions
from saeens_pipeline.orchestration.instance import PROCESS_TAG, declare_layers, layers_name, process_tag, register_layers
from saeens_pipeline.orchestration.retraining import Mark, marks_name
from saeens_pipeline.storage.recipes import digest

TOKENS, ACTIVATIONS, STABILITY, REPORT = (f"{NAME}/{key}" for key in ("tokens", "activations", "eval/stability", "report"))
SAES = {f"{NAME}/bagging/member_{j}" for j in (1, 2, 3)} | {f"{NAME}/boosting/round_{j}" for j in (1, 2, 3)}
BASELINES = {f"{NAME}/baseline/expanded"}
ENSEMBLES = {f"{NAME}/bagging/bagging_ensemble", f"{NAME}/boosting/boosting_ensemble"}
RESIDUALS = {f"{NAME}/boosting/residual_{j}" for j in (1, 2)}
TABLES = {f"{NAME}/eval/{table}" for table in ("reconstruction", "cost")}
AUTOMATED: dict[str, Any] = {"automation": True, "baselines": ["expanded"], "evaluations": ["reconstruction", "cost", "stability"]}
PER_SEED = SAES | BASELINES | ENSEMBLES | RESIDUALS | TABLES

SCHEDULE = f"{NAME}_schedule"
Requests = dict[str | None, set[str]]  # asset keys by partition


@dataclass
class Daemon:
    """Stands for Dagster's daemon: evaluates the conditions and materialises the requested assets in one run per partition."""

    laboratory: Laboratory
    instance: dg.DagsterInstance
    cursor: Any = None
    failed: list[str | None] = field(default_factory=list)
    asks_for_leaderboard: bool = False  # in the last tick

    def tick(self) -> Requests:
        """Return the assets requested by one tick, without the leaderboard."""
        definitions = self.laboratory.catalogue.definitions()
        with pytest.MonkeyPatch.context() as monkeypatch:  # asked for thousands of times in a tick, in which none is added
            monkeypatch.setattr(self.instance, "get_dynamic_partitions", functools.cache(self.instance.get_dynamic_partitions))
            result = dg.evaluate_automation_conditions(definitions, self.instance, cursor=self.cursor)
        self.cursor = result.cursor
        requested: Requests = {}
        for spec in definitions.resolve_all_asset_specs():
            for partition in result.get_requested_partitions(spec.key):
                requested.setdefault(partition, set()).add(spec.key.to_user_string())
        self.asks_for_leaderboard = "leaderboard" in requested.get(None, set())
        return {partition: rest for partition, keys in requested.items() if (rest := keys - {"leaderboard"})}

    def next(self) -> Requests:
        """Return the requests of the next tick or the one after: new assets and those just in progress wait for one tick."""
        return self.tick() or self.tick()

    def make(self, requested: Requests) -> None:
        """Make what was asked for; remember the partitions where that failed."""
        job = self.laboratory.catalogue.definitions().resolve_implicit_global_asset_job_def()
        for partition, keys in requested.items():
            run = job.execute_in_process(
                instance=self.instance,
                partition_key=partition,
                asset_selection=[dg.AssetKey(key.split("/")) for key in keys],
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                raise_on_error=False,
            )
            if not run.success:
                self.failed.append(partition)

    def pretend(self, requested: Requests) -> None:
        """Record what was asked for as made, with a data version that follows from code versions as a recipe's does."""
        specs = {spec.key.to_user_string(): spec for spec in self.laboratory.catalogue.definitions().resolve_all_asset_specs()}

        def version(key: str) -> str:
            return digest([specs[key].code_version, [version(dep.asset_key.to_user_string()) for dep in specs[key].deps]])

        for partition, keys in requested.items():
            for key in sorted(keys):
                event = dg.AssetMaterialization(specs[key].key, partition=partition, tags={"dagster/data_version": version(key)})
                self.instance.report_runless_asset_event(event)

    def work(self, *, really: bool = False) -> list[Requests]:
        """Make, or pretend to make, what is asked for, until that is nothing."""
        history: list[Requests] = []
        while requested := self.next():
            history.append(requested)
            (self.make if really else self.pretend)(requested)
            assert len(history) < 10, f"never comes to rest: {history}"
        return history


@pytest.fixture
def daemon(empty: Laboratory) -> Iterator[Daemon]:
    empty.declare(**AUTOMATED)
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        yield Daemon(empty, instance)


def _per_seed(keys: set[str], layer: int = LAYER) -> Requests:
    return {f"{layer}|{seed}": keys for seed in SEEDS}


CHAIN = [{None: {TOKENS}}, {str(LAYER): {ACTIVATIONS}}, _per_seed(PER_SEED), {str(LAYER): {STABILITY, REPORT}}]


def test_every_asset_is_requested_once_and_in_order(daemon: Daemon):
    assert daemon.work(really=True) == CHAIN
    assert not daemon.failed


def test_a_new_layer_requests_its_own_partitions_only(daemon: Daemon):
    daemon.work()
    register_layers(daemon.instance, NAME, [0])
    assert daemon.work() == [{"0": {ACTIVATIONS}}, _per_seed(PER_SEED, layer=0), {"0": {STABILITY, REPORT}}]


def test_a_changed_setting_requests_its_descendants(daemon: Daemon):
    daemon.work()
    daemon.laboratory.declare(**AUTOMATED, sae=EXPERIMENT["sae"] | {"k": 5})
    assert daemon.work() == CHAIN[2:]
    daemon.laboratory.declare(**AUTOMATED, sae=EXPERIMENT["sae"] | {"k": 5}, keep_residuals="all")
    assert daemon.work() == []


def test_no_training_is_requested_while_its_inputs_are_stale(daemon: Daemon):
    daemon.work()
    daemon.laboratory.declare(source={"train_tokens": 500}, **AUTOMATED, sae=EXPERIMENT["sae"] | {"k": 5})
    assert daemon.work() == CHAIN


def test_the_table_of_features_waits_for_all_seeds(daemon: Daemon):
    """It reads activations and has their partitions, but it is not made in their run."""
    asked: dict[str, Any] = AUTOMATED | {"evaluations": [*AUTOMATED["evaluations"], "features"]}
    chain = [*CHAIN[:-1], {str(LAYER): {STABILITY, REPORT, f"{NAME}/eval/features"}}]
    daemon.laboratory.declare(**asked)
    assert daemon.work() == chain
    daemon.laboratory.declare(source={"hook": "resid_pre"}, **asked)
    assert daemon.work() == chain[1:]
    daemon.laboratory.declare(source={"hook": "resid_pre", "train_tokens": 500}, **asked)
    assert daemon.work() == chain


@pytest.mark.parametrize(("key", "partition"), [("tokens", None), ("activations", str(LAYER))])
def test_no_asset_is_requested_while_its_inputs_are_in_progress(daemon: Daemon, key: str, partition: str | None):
    daemon.work()
    job = daemon.laboratory.catalogue.definitions().resolve_implicit_global_asset_job_def()
    run = daemon.instance.create_run_for_job(
        job,
        status=dg.DagsterRunStatus.STARTED,
        asset_selection=frozenset({dg.AssetKey([NAME, key])}),
        tags={"dagster/partition": partition} if partition else {},
    )
    daemon.laboratory.declare(**AUTOMATED, sae=EXPERIMENT["sae"] | {"k": 5})
    assert daemon.work() == []
    daemon.instance.report_run_canceled(run)
    assert daemon.work() == CHAIN[2:]


def test_an_invalid_layer_fails_once_and_blocks_no_other(daemon: Daemon):
    daemon.instance.add_dynamic_partitions(layers_name(NAME), ["99", "last"])
    daemon.make(daemon.next())
    requested = daemon.next()
    assert requested == {layer: {ACTIVATIONS} for layer in (str(LAYER), "99", "last")}
    daemon.make(requested)
    assert sorted(map(str, daemon.failed)) == ["99", "last"]
    assert daemon.work() == CHAIN[2:]


def test_a_failed_asset_is_requested_again_after_its_settings_change(daemon: Daemon):
    daemon.pretend(daemon.next())
    daemon.make(daemon.next())  # fails: there are no tokens in truth
    assert daemon.failed == [str(LAYER)]
    assert daemon.work() == []
    daemon.laboratory.declare(source={"dtype": "float32"}, **AUTOMATED)
    assert daemon.work() == CHAIN[1:]


def test_the_assets_of_a_killed_run_are_requested_again(daemon: Daemon):
    daemon.pretend(daemon.next())
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    run = daemon.instance.create_run_for_job(
        daemon.laboratory.catalogue.definitions().resolve_implicit_global_asset_job_def(),
        status=dg.DagsterRunStatus.STARTED,
        asset_selection=frozenset({dg.AssetKey([NAME, "activations"])}),
        tags={"dagster/partition": str(LAYER), PROCESS_TAG: process_tag()[PROCESS_TAG].replace(f":{os.getpid()}", f":{gone.pid}")},
    )
    assert daemon.work() == []
    _layers_tick(daemon.laboratory, daemon.instance)
    ended = daemon.instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.CANCELED
    assert daemon.work() == CHAIN[1:]


def test_a_layer_removed_and_added_again_is_requested(daemon: Daemon):
    register_layers(daemon.instance, NAME, [0])
    daemon.work()
    daemon.instance.delete_dynamic_partition(layers_name(NAME), "0")
    daemon.tick()
    register_layers(daemon.instance, NAME, [0])
    assert daemon.work() == []
    for spec in daemon.laboratory.catalogue.definitions().resolve_all_asset_specs():
        if spec.partitions_def:
            forget_partitions(daemon.instance, spec.key.path, ["0", *(f"0|{seed}" for seed in SEEDS)])
    assert daemon.work() == [{"0": {ACTIVATIONS}}, _per_seed(PER_SEED, layer=0), {"0": {STABILITY, REPORT}}]


@pytest.mark.parametrize("ticks", [0, 1])  # between the leaderboard's request and the table's update
def test_the_leaderboard_is_requested_once_more_for_tables_written_meanwhile(daemon: Daemon, ticks: int):
    for requested in CHAIN[:3]:
        assert daemon.next() == requested
        daemon.pretend(requested)
    while not daemon.asks_for_leaderboard:
        daemon.tick()
    for _ in range(ticks):
        daemon.tick()
        assert not daemon.asks_for_leaderboard
    daemon.pretend(CHAIN[3])
    daemon.pretend({None: {"leaderboard"}})
    asked = []
    for _ in range(4):
        assert daemon.tick() == {}
        asked.append(daemon.asks_for_leaderboard)
    assert sum(asked) == 1


def test_without_automation_nothing_is_requested(empty: Laboratory):
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        assert Daemon(empty, instance).work() == []


def test_only_experiments_with_automation_and_their_sources_have_conditions(empty: Laboratory):
    sources = [("ActivationSource", source_settings(empty.model, name=name)) for name in ("used", "unused")]
    experiments = [
        ("EnsembleExperiment", experiment_settings(name=name, source=source, automation=automation))
        for name, source, automation in (("eager", "used", "on"), ("patient", "used", "off"), ("idle", "unused", False))
    ]
    empty.write(experiment_file(*sources, *experiments), "several")
    specs = empty.catalogue.definitions().resolve_all_asset_specs()
    automated = {spec.key.path[0] for spec in specs if spec.automation_condition}
    assert automated - {"leaderboard"} == {"eager", "used"}


def test_the_automation_sensor_starts_running_and_the_retraining_schedule_stopped(empty: Laboratory):
    definitions = empty.catalogue.definitions()
    for name in ("automation", "layers"):
        assert definitions.resolve_sensor_def(name).default_status == dg.DefaultSensorStatus.RUNNING
    schedule = definitions.resolve_schedule_def(SCHEDULE)
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    assert schedule.cron_schedule == "0 3 * * 0"
    empty.declare(schedule="30 6 1 * *")
    assert empty.catalogue.definitions().resolve_schedule_def(SCHEDULE).cron_schedule == "30 6 1 * *"


def _layers_tick(laboratory: Laboratory, instance: dg.DagsterInstance) -> list[str]:
    """Evaluate the sensor and do what it asks for, as the daemon does. Gives the partitions."""
    catalogue = laboratory.catalogue
    with dg.build_sensor_context(instance=instance, definitions=catalogue.definitions()) as context:
        result = layers_sensor(catalogue.sources)(context)
    if isinstance(result, dg.SensorResult):
        assert result.skip_reason  # the list of ticks shows it
        for request in result.dynamic_partitions_requests or ():
            if isinstance(request, dg.AddDynamicPartitionsRequest):
                instance.add_dynamic_partitions(request.partitions_def_name, request.partition_keys)
            else:
                for key in request.partition_keys:
                    instance.delete_dynamic_partition(request.partitions_def_name, key)
    else:
        assert isinstance(result, dg.SkipReason)
    return list(instance.get_dynamic_partitions(layers_name(NAME)))


def test_partitions_follow_the_layers_of_the_file_and_keep_added_ones(empty: Laboratory):
    with dg.DagsterInstance.ephemeral() as instance:
        empty.declare(source={"layers": [2, 0]})
        assert _layers_tick(empty, instance) == ["0", "2"]
        instance.add_dynamic_partitions(layers_name(NAME), ["1"])
        assert _layers_tick(empty, instance) == ["0", "2", "1"]
        empty.declare(source={"layers": [2]})
        assert _layers_tick(empty, instance) == ["2", "1"]
        declare_layers(instance, NAME, [0, 2])  # as a command does
        assert _layers_tick(empty, instance) == ["2", "1"]


def _retraining(laboratory: Laboratory, instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    schedule = laboratory.catalogue.definitions().resolve_schedule_def(SCHEDULE)
    with dg.build_schedule_context(instance=instance) as context:
        result = schedule(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def _retrain(laboratory: Laboratory, instance: dg.DagsterInstance, **wanted: list[int]) -> list[dg.RunRequest]:
    """Run the experiment's job, and what the sensor requests after it, tick by tick; gives the requests in order."""
    definitions = laboratory.catalogue.definitions(disk_checks=False)
    job, assets = definitions.resolve_job_def(NAME), definitions.resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=instance, run_config={"ops": {f"{NAME}__mark": {"config": wanted}}})
    made: list[dg.RunRequest] = []
    while requests := _tick(laboratory, instance):
        for request in requests:
            assert request.tags["saeens/why"]
            assets.execute_in_process(
                instance=instance,
                partition_key=request.partition_key,
                asset_selection=request.asset_selection,
                tags={**request.tags, "dagster/run_key": request.run_key or ""},
            )
        made += requests
    assert not instance.get_dynamic_partitions(marks_name(NAME))
    return made


def _tick(laboratory: Laboratory, instance: dg.DagsterInstance) -> list[dg.RunRequest]:
    """Evaluate the sensor `retraining`, and delete the marks that it has finished, as the daemon does. Gives the requests."""
    definitions = laboratory.catalogue.definitions(disk_checks=False)
    (sensor,) = [each for each in definitions.sensors or () if each.name == "retraining"]
    with dg.build_sensor_context(instance=instance, definitions=definitions) as context:
        result = sensor(context)
    if isinstance(result, dg.SkipReason):
        return []
    assert isinstance(result, dg.SensorResult)
    for request in result.dynamic_partitions_requests or ():
        for mark in request.partition_keys:
            instance.delete_dynamic_partition(request.partitions_def_name, mark)
    return list(result.run_requests or ())


def _keys(requests: Iterable[dg.RunRequest]) -> set[str]:
    return {key.to_user_string() for request in requests for key in request.asset_selection or ()}


def test_the_schedule_skips_fresh_assets_and_retrains_stale_ones(finished: Laboratory, tmp_path: Path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        result = _retraining(finished, instance)
        assert isinstance(result, dg.SkipReason)
        assert "fresh" in str(result.skip_message)
        finished.declare(baselines=["expanded"])  # tables and what compares them are stale
        assert isinstance(_retraining(finished, instance), dg.RunRequest)
        on_request = {"features", "feature_stability", "contexts", "autointerp", "concept_detection", "spurious_correlation", "recovery"}
        tables = {f"{NAME}/eval/{name}" for name in {table.name for table in listed(over_experiments=False)} - on_request}
        assert _keys(_retrain(finished, instance)) == tables | {REPORT}
        assert isinstance(_retraining(finished, instance), dg.SkipReason)


def test_the_schedule_trains_added_layers(finished: Laboratory, tmp_path: Path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.add_dynamic_partitions(layers_name(NAME), ["0"])
        _retrain(finished, instance)
        assert isinstance(_retraining(finished, instance), dg.SkipReason)
    assert finished.artefact("eval/stability", layer=0).files


def test_the_job_trains_all_layers_and_seeds_in_one_run_each(empty: Laboratory, tmp_path: Path):
    empty.declare(source={"layers": [0, 2]}, evaluations=["reconstruction", "stability"], baselines=[])
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        requests = _retrain(empty, instance)
        partitions = [str(request.partition_key or "") for request in requests]
        of_seeds = [f"{layer}|{seed}" for layer in (0, 2) for seed in SEEDS]
        assert partitions == ["", "0", "2", *of_seeds, "0", "2"]
        assert isinstance(_retraining(empty, instance), dg.SkipReason)
        assert _retrain(empty, instance) == []


def test_the_job_trains_the_chosen_layers_and_seeds_only(empty: Laboratory, tmp_path: Path):
    empty.declare(source={"layers": [0, 2]}, evaluations=["reconstruction", "stability"], baselines=[])
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        chosen = _retrain(empty, instance, layers=[2], seeds=[SEEDS[1]])
        assert [str(request.partition_key or "") for request in chosen] == ["", "2", f"2|{SEEDS[1]}"]  # stability compares all seeds
        rest = _retrain(empty, instance, layers=[2])
        assert [str(request.partition_key or "") for request in rest] == [f"2|{SEEDS[0]}", "2"]


def test_the_job_names_what_waits_for_seeds_that_are_not_chosen_and_marks_nothing_for_it_alone(empty: Laboratory, tmp_path: Path):
    empty.declare(source={"layers": [0, 2]}, evaluations=["reconstruction", "stability"], baselines=[])
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        job = empty.catalogue.definitions(disk_checks=False).resolve_job_def(NAME)
        config = {"ops": {f"{NAME}__mark": {"config": {"layers": [2], "seeds": [SEEDS[1]]}}}}
        told = job.execute_in_process(instance=instance, run_config=config)
        (output,) = (event.step_output_data for event in told.all_node_events if event.event_type_value == "STEP_OUTPUT")
        metadata = {name: str(value.value) for name, value in output.metadata.items()}
        assert [line.split(":")[0] for line in metadata["marked"].splitlines()] == ["of all layers", "layer 2", f"layer 2, seed {SEEDS[1]}"]
        (left_out,) = metadata["left out"].splitlines()
        assert left_out.startswith("layer 2: 2 artefacts: ")
        assert "stability" in left_out
        assert left_out.endswith(f"waits for what is neither chosen nor fresh: layer 2, seed {SEEDS[0]}")
        while requests := _tick(empty, instance):
            for request in requests:
                empty.catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def().execute_in_process(
                    instance=instance,
                    partition_key=request.partition_key,
                    asset_selection=request.asset_selection,
                    tags={**request.tags, "dagster/run_key": request.run_key or ""},
                )
        told = job.execute_in_process(instance=instance, run_config=config)  # only what waits is left
        (output,) = (event.step_output_data for event in told.all_node_events if event.event_type_value == "STEP_OUTPUT")
        assert set(output.metadata) == {"left out"}
        assert not instance.get_dynamic_partitions(marks_name(NAME))


def test_the_job_refuses_a_layer_and_a_seed_that_are_not_there(empty: Laboratory, tmp_path: Path):
    job = empty.catalogue.definitions(disk_checks=False).resolve_job_def(NAME)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        refused = ({"layers": [LAYER, 77]}, f"{NAME} has no layer 77; it has {LAYER}"), ({"seeds": [9]}, f"{NAME} has no seed 9")
        for wanted, message in refused:
            with pytest.raises(dg.Failure, match=message):
                job.execute_in_process(instance=instance, run_config={"ops": {f"{NAME}__mark": {"config": wanted}}})
        assert not instance.get_dynamic_partitions(marks_name(NAME))


def test_two_marks_request_each_run_once_and_a_failed_one_stops_what_waits_for_it(empty: Laboratory, tmp_path: Path):
    empty.declare(source={"layers": [0, 2]}, evaluations=["reconstruction"], baselines=[])
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        for mark in (Mark("first", layers=(0,)), Mark("second")):
            instance.add_dynamic_partitions(marks_name(NAME), [mark.key])
        (request,) = _tick(empty, instance)
        run = instance.create_run_for_job(
            empty.catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def(),
            tags={**request.tags, "dagster/run_key": request.run_key or ""},
        )
        assert _tick(empty, instance) == []  # it runs
        assert len(instance.get_dynamic_partitions(marks_name(NAME))) == 2
        instance.report_run_failed(run)
        (again,) = _tick(empty, instance)  # of the second mark
        assert again.run_key != request.run_key
        assert list(instance.get_dynamic_partitions(marks_name(NAME))) == ["second"]


def test_freshness_watches_the_tables_and_the_schedule_confirms_them(finished: Laboratory, tmp_path: Path):
    finished.declare(freshness={"warn_days": 7, "fail_days": 10.5})
    specs = {spec.key.to_user_string(): spec.freshness_policy for spec in finished.catalogue.definitions().resolve_all_asset_specs()}
    policy = dg.FreshnessPolicy.time_window(fail_window=timedelta(days=10.5), warn_window=timedelta(days=7))
    watched = {key for key in specs if key.startswith(f"{NAME}/eval/")}
    assert {key: each for key, each in specs.items() if each} == dict.fromkeys(watched, policy)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        assert isinstance(_retraining(finished, instance), dg.RunRequest)
        before = finished.artefact("eval/cost", SEEDS[0])
        assert _keys(_retrain(finished, instance)) == watched
        assert finished.artefact("eval/cost", SEEDS[0]) == before
