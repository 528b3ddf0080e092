"""Language model and corpus as assets that are observed: what is seen of a change, when, and what the automation does with it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from tiny_experiment import EXPERIMENT, LAYER, NAME, SOURCE, Laboratory, experiment_file
from tiny_models import write_tiny_model

from saeens_pipeline.assets import sources
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models import corpora, descriptions, hub
from saeens_pipeline.orchestration.external_data import external_data_sensor
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.storage.names import Partition

MODEL, CORPUS = dg.AssetKey([NAME, "language_model"]), dg.AssetKey([NAME, "corpus"])
TEXTS = "".join(f"def step_{i}(x):\n    return x + {i}  # {'abcdefgh'[i % 8] * (i % 5)}\n\n" for i in range(60))


class Watched:
    """A tiny source with files of its own, and the ticks of the sensor."""

    def __init__(self, laboratory: Laboratory, instance: dg.DagsterInstance, folder: Path) -> None:
        self.laboratory, self.instance, self.model, self.texts = laboratory, instance, folder / "model", folder / "texts"
        self.cursor: str | None = None

    def declare(self, **experiment: Any) -> None:
        """Write the experiment file."""
        corpus = {"files": f"{self.texts}/*.txt", "test_files": f"{self.texts}/held_out/*.txt"}
        source = SOURCE | {"language_model": str(self.model), "corpus": corpus}
        documents = [("ActivationSource", source), ("EnsembleExperiment", EXPERIMENT | experiment)]
        self.laboratory.write(experiment_file(*documents))

    def make(self, *keys: str, partition: str | None = None) -> None:
        """Materialise assets of the source in one run."""
        job = self.laboratory.catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def()
        selection = [dg.AssetKey([NAME, key]) for key in keys]
        job.execute_in_process(instance=self.instance, asset_selection=selection, partition_key=partition)

    def tick(self) -> list[dg.AssetObservation] | str:
        """Return the observations of a tick, which are reported as the daemon does, or its message."""
        with dg.build_sensor_context(self.instance, cursor=self.cursor) as context:
            result = external_data_sensor(self.laboratory.catalogue)(context)
            self.cursor = context.cursor
        if isinstance(result, dg.SkipReason):
            return str(result.skip_message)
        assert isinstance(result, dg.SensorResult)
        assert not result.run_requests
        self.cursor = result.cursor
        found = [event for event in result.asset_events if isinstance(event, dg.AssetObservation)]
        assert result.skip_reason
        assert found[0].asset_key.to_user_string() in str(result.skip_reason.skip_message)
        for event in found:
            self.instance.report_runless_asset_event(event)
        return found

    def versions(self, key: dg.AssetKey) -> list[str | None]:
        """Return the data versions that were observed, the newest first."""
        records = self.instance.fetch_observations(key, limit=10).records
        return [each.asset_observation.data_version for each in records if each.asset_observation]

    def other_weights(self) -> None:
        """Replace the weights of the language model."""
        write_tiny_model(self.model, seed=1)

    def other_texts(self) -> None:
        """Add a text to the corpus."""
        (self.texts / "new.txt").write_text(TEXTS.replace("step", "stage"))


@pytest.fixture
def watched(empty: Laboratory, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    shutil.copytree(tiny_model, tmp_path / "model")
    for name in ("texts/a.txt", "texts/b.txt", "texts/held_out/c.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(TEXTS.replace("step", file.stem))
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])
        watched = Watched(empty, instance, tmp_path)
        watched.declare()
        yield watched


def test_lineage_begins_with_the_language_model_and_the_corpus(watched: Watched):
    graph = watched.laboratory.catalogue.definitions().resolve_asset_graph()
    parents = {name: graph.get(dg.AssetKey([NAME, name])).parent_keys for name in ("tokens", "activations")}
    assert parents == {"tokens": {MODEL, CORPUS}, "activations": {MODEL, dg.AssetKey([NAME, "tokens"])}}
    assert graph.observable_asset_keys == {MODEL, CORPUS}
    assert graph.get(MODEL).group_name == "sources"
    assert str(watched.model) in (graph.get(MODEL).description or "")
    assert f"{watched.texts}/*.txt" in (graph.get(CORPUS).description or "")


def test_nothing_is_observed_before_something_was_computed(watched: Watched):
    assert watched.tick() == "No language model and no corpus has changed since the last tick."


def test_a_run_observes_what_it_has_read_before_its_artefacts(watched: Watched):
    watched.make("tokens")
    watched.make("activations", partition=str(LAYER))
    for key in (MODEL, CORPUS):
        (version,) = watched.versions(key)
        for made in ("tokens", "activations") if key == MODEL else ("tokens",):
            record = watched.instance.get_latest_materialization_event(dg.AssetKey([NAME, made]))
            assert record is not None
            assert record.asset_materialization is not None
            assert (record.asset_materialization.tags or {})[f"dagster/input_data_version/{key.to_user_string()}"] == version
    assert watched.tick() == "No language model and no corpus has changed since the last tick."


def test_changed_files_are_observed_once(watched: Watched):
    watched.make("tokens")
    watched.other_texts()
    (event,) = watched.tick()
    assert isinstance(event, dg.AssetObservation)
    assert event.asset_key == CORPUS
    assert "new.txt" in str(event.metadata["identity"].value)
    assert watched.tick() == "No language model and no corpus has changed since the last tick."
    watched.other_weights()
    (event,) = watched.tick()
    assert isinstance(event, dg.AssetObservation)
    assert event.asset_key == MODEL
    assert [len(set(watched.versions(key))) for key in (MODEL, CORPUS)] == [2, 2]


def test_the_observed_version_is_that_of_the_recipe(watched: Watched):
    watched.make("tokens")
    watched.other_weights()
    watched.tick()
    observed = watched.versions(MODEL)[0]
    watched.make("tokens")
    watched.make("activations", partition=str(LAYER))
    assert watched.versions(MODEL)[0] == observed
    assert watched.versions(MODEL).count(observed) == 1


def test_files_are_hashed_again_only_if_size_or_time_differ(watched: Watched, monkeypatch: pytest.MonkeyPatch):
    watched.make("tokens")
    watched.tick()
    hashed: list[str] = []
    whole = descriptions.fingerprint
    monkeypatch.setattr(descriptions, "fingerprint", lambda file, **how: hashed.append(file.name) or whole(file, **how))
    watched.tick()
    assert hashed == []
    (watched.model / "config.json").touch()
    assert watched.tick() == "No language model and no corpus has changed since the last tick."
    assert hashed == ["config.json"]


def test_missing_files_are_one_line(watched: Watched):
    watched.make("tokens")
    shutil.rmtree(watched.texts)
    line = watched.tick()
    assert isinstance(line, str)
    assert line.startswith(f"{NAME}: corpus: there is no file")
    assert "\n" not in line


def test_the_hub_is_not_asked_by_the_sensor(watched: Watched, monkeypatch: pytest.MonkeyPatch):
    """Report a model that is not in the cache in one line, also where the hub would answer."""
    watched.make("tokens")

    def describe(*_: Any) -> None:
        hub.resolve_commit("owner/model", "main", "model")

    monkeypatch.setattr(sources, "describe_language_model", describe)
    assert watched.tick() == f"{NAME}: owner/model, revision main, is not in the hub's cache, and the hub is not asked now"
    with pytest.raises(SaeensError, match="the hub cannot be reached"):  # outside of it, it is
        describe()


def test_observing_in_the_ui_records_the_version(watched: Watched):
    definitions = watched.laboratory.catalogue.definitions()
    job = definitions.resolve_implicit_global_asset_job_def()
    job.execute_in_process(instance=watched.instance, asset_selection=[MODEL])
    (version,) = watched.versions(MODEL)
    watched.make("tokens")
    assert watched.versions(MODEL) == [version]


def test_a_synthetic_source_reads_nothing_from_outside(empty: Laboratory):
    synthetic = {"n_features": 8, "d_in": 4, "features_per_row": 1.0}
    source = {"name": NAME, "language_model": "builtin/synthetic", "synthetic": synthetic, "layers": [0], "context_length": 8}
    empty.write(experiment_file(("ActivationSource", source | {"train_tokens": 64, "test_tokens": 16})))
    definitions = empty.catalogue.definitions()
    assert not definitions.resolve_asset_graph().observable_asset_keys
    with dg.DagsterInstance.ephemeral() as instance, dg.build_sensor_context(instance) as context:
        assert isinstance(external_data_sensor(empty.catalogue)(context), dg.SkipReason)


class Automation:
    """Evaluates the conditions as the daemon does."""

    def __init__(self, watched: Watched) -> None:
        self.watched, self.cursor = watched, None

    def tick(self) -> set[str]:
        """Return what is requested of the source: asset and partition."""
        definitions = self.watched.laboratory.catalogue.definitions()
        result = dg.evaluate_automation_conditions(definitions, self.watched.instance, cursor=self.cursor)
        self.cursor = result.cursor
        keys = [spec.key for spec in definitions.resolve_all_asset_specs() if spec.group_name == "sources"]
        return {f"{key.path[-1]} {partition}" for key in keys for partition in result.get_requested_partitions(key)}

    def next(self) -> set[str]:
        """Return the requests of the next tick or the one after."""
        return self.tick() or self.tick()


@pytest.mark.parametrize("change", ["other_texts", "other_weights"])
def test_with_automation_a_change_is_computed_without_a_schedule(watched: Watched, change: str):
    watched.declare(automation="on", baselines=[], evaluations=["cost"], ensemble={"members": 2, "seeds": [1]})
    automation = Automation(watched)
    assert automation.next() == {"tokens None"}  # which does not wait for an observation
    watched.make("tokens")
    assert automation.next() == {f"activations {LAYER}"}
    watched.make("activations", partition=str(LAYER))
    assert automation.next() == set()
    getattr(watched, change)()
    assert automation.next() == set()
    watched.tick()
    assert automation.next() == {"tokens None"}
    before = watched.laboratory.artefact("tokens", layer=None).data_version
    watched.make("tokens")
    assert watched.laboratory.artefact("tokens", layer=None).data_version != before
    assert automation.next() == {f"activations {LAYER}"}


def test_observations_that_change_nothing_request_nothing(watched: Watched):
    watched.declare(automation="on")
    automation = Automation(watched)
    automation.next()
    watched.make("tokens")
    automation.next()
    watched.make("activations", partition=str(LAYER))
    automation.next()
    tokens = watched.laboratory.declarations()[f"{NAME}/tokens"]
    version = tokens.external["corpus"].version(tokens.partition_settings(Partition()))
    watched.instance.report_runless_asset_event(dg.AssetObservation(CORPUS, tags={"dagster/data_version": version}))
    assert automation.next() == set()
