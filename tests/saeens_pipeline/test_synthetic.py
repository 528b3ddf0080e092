"""Synthetic sources: activations without tokens, the table `recovery`, and what such a source refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.numpy import load_file
from tiny_experiment import MEMBERS, NAME, SEEDS, Laboratory, experiment_file, experiment_settings, source_settings

from saeens_models.synthetic import SyntheticActivations
from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.assets.forecast import forecast
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models import synthetic as writing
from saeens_pipeline.orchestration.layers import add_layers
from saeens_pipeline.settings import SourceSettings
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

SYNTHETIC: dict[str, Any] = {"n_features": 24, "d_in": 12, "features_per_row": 2, "frequency_exponent": 0.5, "noise": 0.1, "seed": 5}
SOURCE: dict[str, Any] = {
    **dict.fromkeys(("corpus", "hook", "packing", "drop")),
    "language_model": "builtin/synthetic",
    "synthetic": SYNTHETIC,
    "layers": [0],
    "context_length": 16,
    "train_tokens": 1000,
    "test_tokens": 200,
}
EVALUATIONS = ["reconstruction", "members", "coactivation", "recovery", "stability", "marginal_gain", "cost", "training_curves"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment on a synthetic source, with its control, run once."""
    home = tmp_path_factory.mktemp("synthetic")
    laboratory = Laboratory(Path("builtin/synthetic"), home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(SOURCE, evaluations=EVALUATIONS)
        laboratory.run()
    return laboratory


@pytest.fixture
def synthetic(made: Laboratory, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    made.activate(monkeypatch)
    return made


def test_rows_are_those_of_the_settings_in_blocks_that_count_as_documents(synthetic: Laboratory):
    store = ActivationStore(synthetic.artefact("activations", layer=0).path)
    expected = SyntheticActivations(**SYNTHETIC)
    for i, (split, n_rows) in enumerate({"train": 1000, "test": 200}.items()):
        rows = torch.cat(list(store.chunks(split)))
        blocks = torch.cat([expected.rows(16, i, each) for each in range(-(-n_rows // 16))])[:n_rows]
        assert torch.equal(rows, blocks.half().float())
        origin = [store._arrays[split][name][:] for name in ("document", "position")]
        assert np.array_equal(np.stack(origin), np.stack(np.divmod(np.arange(n_rows), 16)))


def test_every_table_is_filled_and_nothing_is_computed_twice(synthetic: Laboratory):
    for table in EVALUATIONS:
        assert len(read_table(synthetic.root, NAME, table))
    assert read_table(synthetic.root, NAME, "reconstruction")["ce_loss_recovered"].null_count() > 0
    assert "nothing to do" in synthetic.run()
    assert f"{NAME}/tokens" not in synthetic.declarations()


def test_the_true_features_are_kept_with_the_activations(synthetic: Laboratory):
    activations = synthetic.artefact("activations", layer=0)
    stored, expected = load_file(activations.path / "features.safetensors"), SyntheticActivations(**SYNTHETIC)
    assert np.array_equal(stored["W_dec"], expected.features.numpy())
    assert np.array_equal(stored["firing_rate"], expected.firing_rate)
    assert activations.recipe["settings"]["synthetic"] == {**SYNTHETIC, "group_size": 1, "correlation": 0.0, "children_per_parent": 0}


def _best(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    unit_a, unit_b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    return (unit_a @ unit_b.T).max(1)


def test_recovery_equals_numpy_for_every_size(synthetic: Laboratory):
    table = read_table(synthetic.root, NAME, "recovery")
    assert set(table["seed"]) == set(SEEDS)
    features = SyntheticActivations(**SYNTHETIC).features.numpy()
    for seed in SEEDS:
        for method, kind, name in (("bagging", "bagging", "member"), ("boosting", "boosting", "round")):
            rows = [
                load_file(synthetic.artefact(f"{kind}/{name}_{j}", seed, layer=0).path / "sae_weights.safetensors")["W_dec"]
                for j in range(1, MEMBERS + 1)
            ]
            for n in range(1, MEMBERS + 1):
                W_dec = np.concatenate(rows[:n])
                row = table.filter(method=method, n_members=n, seed=seed).row(0, named=True)
                assert row["recovered_fraction"] == pytest.approx((_best(features, W_dec) >= 0.9).mean())
                assert row["mean_max_cosine"] == pytest.approx(_best(features, W_dec).mean(), abs=1e-6)
                assert row["precision"] == pytest.approx((_best(W_dec, features) >= 0.9).mean())
                assert (row["n_true_features"], row["n_rows"]) == (24, n * 24)
    single = table.filter(method="single")
    assert single["recovered_fraction"].to_list() == single["recovered_fraction_equal_rows"].to_list()
    whole = table.filter(pl.col("n_rows") > 24)
    assert (whole["mean_max_cosine_equal_rows"] < whole["mean_max_cosine"]).all()
    assert (table["mean_max_cosine_chance"] > 0.4).all()


def test_an_saes_metadata_names_the_source(synthetic: Laboratory):
    import saeens_models as sm

    metadata = sm.load_sae(synthetic.artefact("bagging/member_1", SEEDS[0], layer=0).path).metadata
    assert (metadata["model_name"], metadata["dataset_path"], metadata["context_size"]) == ("builtin/synthetic", "builtin/synthetic", 16)


def test_a_killed_write_is_resumed_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = SourceSettings.model_validate(
        {"name": NAME, **{key: value for key, value in SOURCE.items() if value is not None}, "train_tokens": 9000, "dtype": "float32"}
        | {"synthetic": SYNTHETIC | {"d_in": 512}}
    )
    monkeypatch.setattr("saeens_pipeline.storage.activation_writer._CHUNKS_PER_SHARD", 1)
    writing.write_synthetic_activations(tmp_path / "whole", settings)

    def kill(done: int, of: int) -> None:
        if done > 5000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        writing.write_synthetic_activations(tmp_path / "killed", settings, kill)
    statistics = writing.write_synthetic_activations(tmp_path / "killed", settings)
    whole, resumed = (ActivationStore(tmp_path / name) for name in ("whole", "killed"))
    assert statistics["train"].rows == 9000
    for split in ("train", "test"):
        assert all(torch.equal(a, b) for a, b in zip(whole.chunks(split), resumed.chunks(split), strict=True))


def test_the_same_source_with_random_weights_is_its_control(synthetic: Laboratory):
    source = source_settings("builtin/synthetic", **SOURCE | {"name": "dense", "weights": "random"})
    experiment = experiment_settings(name="dense", source="dense", evaluations=["recovery"])
    file = synthetic.write(experiment_file(("ActivationSource", source), ("EnsembleExperiment", experiment)), "dense")
    assert synthetic.catalogue.controls == {NAME: "dense"}
    file.unlink()


def test_a_plan_has_no_tokens_and_no_language_model(synthetic: Laboratory):
    catalogue = synthetic.catalogue
    experiment, source = catalogue.experiment(NAME), catalogue.sources[NAME]
    lines = forecast(source, experiment, catalogue.ops(experiment), layers=[0], store=synthetic.store, compute=Compute(device="cpu"))
    amounts = {(line.section, line.item): line.amount for line in lines}
    assert (lines[0].amount, amounts["disk", "tokens"], amounts["computation", "language model"]) == (12, 0, 0)
    assert amounts["disk", "activations"] == 1200 * (2 * 12 + 8)


@pytest.mark.parametrize(
    ("source", "experiment", "said"),
    [
        ({}, {"evaluations": ["contexts"]}, "evaluations.0: contexts needs tokens and a language model, and the source 'tiny' has no text"),
        ({}, {"evaluations": ["reconstruction", "features"]}, "evaluations.1: features needs tokens"),
        ({}, {"evaluations": ["concept_detection"]}, "concept_detection needs tokens"),
        ({}, {"ce_loss_tokens": 100}, "ce_loss_tokens: 100, but the source 'tiny' has no text"),
        (
            {},
            {"ensemble": {"members": 2, "seeds": [1], "specialised": [{"member": 2, "documents": {"language": ["c"]}}]}},
            "documents have no labels",
        ),
        ({"synthetic": None}, {}, "builtin/synthetic and the section synthetic need each other"),
        ({"language_model": "some/model"}, {}, "need each other"),
        ({"hook": "resid_post", "drop": ["first"]}, {}, "drop, hook: synthetic activations have no text"),
        ({"layers": [0, 1]}, {}, "write layers: [0]"),
        ({"synthetic": SYNTHETIC | {"features_per_row": 13}}, {}, "at most 12, half of the features"),
        ({"synthetic": SYNTHETIC | {"correlation": 0.5}}, {}, "set group_size to 2 or more"),
        ({"synthetic": SYNTHETIC | {"n_feature": 13}}, {}, "synthetic.n_feature: unknown key; one of: n_features"),
    ],
)
def test_what_needs_text_and_impossible_settings_are_refused(
    empty: Laboratory, source: dict[str, Any], experiment: dict[str, Any], said: str
):
    empty.declare(SOURCE | source, **experiment)
    (message,) = empty.catalogue.broken.values()
    assert said in message


def test_recovery_needs_a_synthetic_source(empty: Laboratory):
    empty.declare(evaluations=["recovery"])
    (message,) = empty.catalogue.broken.values()
    assert "recovery compares with the true features of a synthetic source, and the source 'tiny' has none" in message


def test_a_synthetic_source_has_one_layer(synthetic: Laboratory):
    with pytest.raises(ConfigurationError, match="builtin/synthetic has no layer 3: it has layers 0 to 0"):
        add_layers(synthetic.catalogue, NAME, [3])
    assert synthetic.artefact("activations", layer=0).path == synthetic.store.path(
        synthetic.declarations()[f"{NAME}/activations"].address, Partition(0)
    )
