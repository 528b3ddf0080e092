"""The sensor `staleness`: observations of what has become stale, damaged or fresh, each once, and no run."""

from __future__ import annotations

import json

import dagster as dg
import pytest
import yaml
from tiny_experiment import EXPERIMENT, LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.orchestration import staleness
from saeens_pipeline.orchestration.staleness import staleness_sensor
from saeens_pipeline.storage import recipes
from saeens_pipeline.storage.names import Partition


class Ticks:
    """Ticks of the sensor in one instance, each with the cursor of the one before. `checks`: the last evaluation of each asset."""

    def __init__(self, laboratory: Laboratory, instance: dg.DagsterInstance) -> None:
        self.laboratory, self.instance, self.cursor, self.said = laboratory, instance, None, ""
        self.checks: dict[str, dg.AssetCheckEvaluation] = {}

    def tick(self) -> dict[str, dg.AssetObservation]:
        """Return the observations by asset and partition."""
        with dg.build_sensor_context(self.instance, cursor=self.cursor) as context:
            result = staleness_sensor(self.laboratory.catalogue)(context)
            self.cursor = context.cursor
        if isinstance(result, dg.SkipReason):
            return {}
        assert isinstance(result, dg.SensorResult)
        assert not result.run_requests
        assert result.skip_reason
        self.said = str(result.skip_reason.skip_message)
        self.cursor = result.cursor
        self.checks |= {e.asset_key.to_user_string(): e for e in result.asset_events if isinstance(e, dg.AssetCheckEvaluation)}
        found = [event for event in result.asset_events if isinstance(event, dg.AssetObservation)]
        return {f"{event.asset_key.to_user_string()} {event.partition}": event for event in found}


@pytest.fixture
def ticks(finished: Laboratory):
    with dg.DagsterInstance.ephemeral() as instance:
        yield Ticks(finished, instance)


def _member(seed: int) -> str:
    return f"{NAME}/bagging/member_1 {LAYER}|{seed}"


def test_nothing_is_told_of_what_is_fresh_or_missing(ticks: Ticks):
    assert ticks.tick() == {}


def test_a_changed_setting_is_told_once_on_each_partition_with_its_reason(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staleness, "MOST_TOLD", 1000)
    ticks.laboratory.declare(sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    told = ticks.tick()
    for seed in SEEDS:
        metadata = told[_member(seed)].metadata
        assert metadata["state"].value == "stale"
        assert f"setting sae.k: {EXPERIMENT['sae']['k']} -> {EXPERIMENT['sae']['k'] + 1}" in str(metadata["why"].value)
    ensemble = told[f"{NAME}/bagging/bagging_ensemble {LAYER}|{SEEDS[0]}"]
    assert str(ensemble.metadata["why"].value).startswith("follows from tiny/bagging/member_1")
    assert not any(name.startswith(f"{NAME}/activations") for name in told)
    assert ticks.said.startswith(f"Told: {len(told)} partitions stale, ")
    assert ticks.tick() == {}
    ticks.laboratory.declare()
    assert {str(each.metadata["state"].value) for each in ticks.tick().values()} == {"fresh"}
    assert json.loads(ticks.cursor or "")["told"] == {}
    assert ticks.tick() == {}


def test_a_damaged_artefact_is_told_and_a_removed_one_is_forgotten(ticks: Ticks):
    store = ticks.laboratory.store
    artefact = ticks.laboratory.artefact("bagging/member_1", SEEDS[0])
    (artefact.path / "sae_weights.safetensors").write_bytes(b"x")
    told = ticks.tick()
    assert told[_member(SEEDS[0])].metadata["state"].value == "damaged"
    assert "has 1 bytes" in str(told[_member(SEEDS[0])].metadata["why"].value)
    table = ticks.laboratory.declarations()[f"{NAME}/eval/stability"]
    assert f"{NAME}/eval/stability {LAYER}" in told
    store.path(table.address, Partition(LAYER)).unlink()
    ticks.tick()
    assert "tiny/eval/stability" not in (ticks.cursor or "")


def test_many_changes_are_told_over_several_ticks(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staleness, "MOST_TOLD", 3)
    ticks.laboratory.declare(sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    first, second = ticks.tick(), ticks.tick()
    assert (len(first), len(second)) == (3, 3)
    assert not first.keys() & second.keys()


def test_experiments_of_one_source_do_not_forget_what_the_other_was_told(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staleness, "MOST_TOLD", 1000)
    folder = ticks.laboratory.root / "tables" / "second"
    folder.mkdir()
    ticks.laboratory.declare(sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    second = yaml.safe_dump({"type": "saeens_pipeline.components.EnsembleExperiment", "attributes": EXPERIMENT | {"name": "second"}})
    ticks.laboratory.write(second, "second")
    assert ticks.tick()
    assert ticks.tick() == {}


def test_a_tick_ends_after_its_time_and_the_next_one_goes_on(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    (ticks.laboratory.root / "tables" / "aaa").mkdir()
    first = yaml.safe_dump({"type": "saeens_pipeline.components.EnsembleExperiment", "attributes": EXPERIMENT | {"name": "aaa"}})
    ticks.laboratory.write(first, "aaa")
    ticks.laboratory.declare(sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    monkeypatch.setattr(staleness, "TICK_BUDGET_SECONDS", 1e-9)
    assert ticks.tick() == {}
    assert json.loads(ticks.cursor or "")["next"] == NAME
    assert _member(SEEDS[0]) in ticks.tick()


def test_the_check_recipe_lists_stale_partitions_and_passes_again(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staleness, "MOST_TOLD", 1000)
    ticks.tick()
    assert ticks.checks
    assert all(each.passed for each in ticks.checks.values())
    ticks.checks.clear()
    assert ticks.tick() == {}
    assert not ticks.checks  # nothing has changed
    ticks.laboratory.declare(sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    ticks.tick()
    member = ticks.checks[f"{NAME}/bagging/member_1"]
    assert (member.passed, member.severity) == (False, dg.AssetCheckSeverity.WARN)
    change = f"setting sae.k: {EXPERIMENT['sae']['k']} -> {EXPERIMENT['sae']['k'] + 1}"
    assert (member.description or "").split("  \n") == [f"layer {LAYER}, seed {seed}: stale: {change}" for seed in SEEDS]
    assert f"{NAME}/activations" not in ticks.checks
    ticks.laboratory.declare()
    ticks.tick()
    assert ticks.checks[f"{NAME}/bagging/member_1"].passed


def test_the_check_recipe_executed_in_the_ui_says_the_same(finished: Laboratory):
    def evaluate() -> dg.AssetCheckEvaluation:
        definitions = finished.catalogue.definitions()
        key = dg.AssetCheckKey(dg.AssetKey([NAME, "bagging", "member_1"]), staleness.RECIPE)
        job = dg.define_asset_job("check", selection=dg.AssetSelection.checks(key))
        result = dg.Definitions.merge(definitions, dg.Definitions(jobs=[job])).resolve_job_def("check").execute_in_process()
        (evaluation,) = result.get_asset_check_evaluations()
        return evaluation

    assert evaluate().passed
    finished.declare(sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    evaluation = evaluate()
    assert not evaluation.passed
    assert evaluation.metadata["stale or damaged partitions"].value == len(SEEDS)


def test_a_tick_reads_each_artefact_once(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    """Tables have all SAEs as inputs: without it, a tick over many members would read each of them for every table."""
    read: list[str] = []
    once = recipes.read_artefact
    monkeypatch.setattr(recipes, "read_artefact", lambda path: read.append(str(path)) or once(path))
    assert ticks.tick() == {}
    assert len(read) == len(set(read)) > len(ticks.laboratory.declarations())


def test_layers_take_turns(ticks: Ticks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(staleness, "TICK_BUDGET_SECONDS", 1e-9)
    ticks.laboratory.declare(source={"layers": [0, LAYER]}, sae=EXPERIMENT["sae"] | {"k": EXPERIMENT["sae"]["k"] + 1})
    assert ticks.tick() == {}  # nothing of layer 0 was computed
    assert (json.loads(ticks.cursor or "")["next"], json.loads(ticks.cursor or "")["layer"]) == (NAME, LAYER)
    assert _member(SEEDS[0]) in ticks.tick()


def test_ops_are_declared_once_for_all_ticks(ticks: Ticks):
    catalogue = ticks.laboratory.catalogue
    experiment = catalogue.experiment(NAME)
    assert all(one is other for one, other in zip(catalogue.ops(experiment), catalogue.ops(experiment), strict=True))
    changed = experiment.model_copy(update={"evaluations": ["cost"]})
    assert len(catalogue.ops(changed)) < len(catalogue.ops(experiment))
