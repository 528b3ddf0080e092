"""`boosting: concurrent`: all rounds in one pass over the activations, otherwise as in the sequential mode."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import polars as pl
import pytest
from test_experiment import D_SAE, TEST, TRAIN, plain_boosting, plain_explained_variance, plain_saes, stored_activations
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import read_table

CONCURRENT = {"members": MEMBERS, "seeds": list(SEEDS), "boosting": "concurrent"}
ROUNDS = [f"boosting/round_{j}" for j in range(1, MEMBERS + 1)]


@pytest.fixture(scope="module")
def switched_laboratory(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment, run sequentially and then concurrently; for reading only."""
    home = tmp_path_factory.mktemp("switched")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    shutil.copytree(finished_laboratory.root, laboratory.root, ignore=shutil.ignore_patterns("dagster", "residual_*"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(ensemble=CONCURRENT)
        laboratory.run()
    return laboratory


@pytest.fixture
def concurrent(empty: Laboratory) -> Laboratory:
    """The tiny experiment with concurrent boosting declared, nothing made yet."""
    empty.declare(ensemble=CONCURRENT)
    return empty


@pytest.fixture
def switched(switched_laboratory: Laboratory, concurrent: Laboratory) -> Laboratory:
    """A copy of the switched laboratory, to change at will."""
    shutil.copytree(switched_laboratory.root, concurrent.root)
    return concurrent


def _weights(laboratory: Laboratory, key: str, seed: int = SEEDS[0]) -> bytes:
    return (laboratory.artefact(key, seed).path / "sae_weights.safetensors").read_bytes()


def _stamps(laboratory: Laboratory) -> dict[Path, int]:
    files = [file for file in laboratory.root.rglob("*") if file.is_file() and laboratory.root / "dagster" not in file.parents]
    return {file: file.stat().st_ino for file in files}


# the asset graph


def test_concurrent_rounds_are_one_op_on_the_activations_without_residuals(concurrent: Laboratory):
    definitions = concurrent.catalogue.definitions()
    deps = {
        spec.key.to_user_string().removeprefix(f"{NAME}/"): [d.asset_key.to_user_string().removeprefix(f"{NAME}/") for d in spec.deps]
        for spec in definitions.resolve_all_asset_specs()
    }
    assert {key: deps[key] for key in ROUNDS} == {
        "boosting/round_1": ["activations", "bagging/member_1"],
        "boosting/round_2": ["activations", "boosting/round_1"],
        "boosting/round_3": ["activations", "boosting/round_2"],
    }
    assert not [key for key in deps if "residual" in key]
    op = definitions.resolve_assets_def([NAME, "boosting", "round_2"])
    assert op.op.name == f"{NAME}__boosting__rounds"
    assert op.can_subset and len(list(op.keys)) == MEMBERS


def test_the_mode_is_in_the_recipes_of_later_rounds_and_of_the_cost_table_alone(empty: Laboratory):
    sequential = empty.declarations()
    empty.declare(ensemble=CONCURRENT)
    concurrent = empty.declarations()
    assert sequential.keys() - concurrent.keys() == {f"{NAME}/boosting/residual_{j}" for j in range(1, MEMBERS)}
    here = Partition(LAYER, SEEDS[0])
    settings = {
        key: [{**each[key].settings, **each[key].partition_settings(here)} for each in (sequential, concurrent)] for key in concurrent
    }
    different = {key.removeprefix(f"{NAME}/") for key, (before, after) in settings.items() if before != after}
    assert different == {"boosting/round_2", "boosting/round_3", "eval/cost"}
    code_versions = {key.removeprefix(f"{NAME}/") for key in concurrent if concurrent[key].code_version != sequential[key].code_version}
    assert code_versions == different


# what is made


def test_switching_the_mode_rebuilds_later_rounds_and_their_descendants(finished_laboratory: Laboratory, switched_laboratory: Laboratory):
    kept = ["bagging/member_1", "bagging/member_3", "bagging/bagging_ensemble", "baseline/expanded", "boosting/round_1"]
    made = ["boosting/round_2", "boosting/round_3", "boosting/boosting_ensemble", "eval/reconstruction"]
    for key in kept + made:
        before, after = (laboratory.artefact(key, SEEDS[1]).data_version for laboratory in (finished_laboratory, switched_laboratory))
        assert (before == after) == (key in kept), key


def test_everything_is_fresh_after_a_run_and_a_second_run_computes_nothing(switched: Laboratory):
    assert {status.state for status in status_of(NAME)} == {"fresh"}
    before = _stamps(switched)
    assert "nothing to do" in switched.run()
    assert _stamps(switched) == before


def test_concurrent_round_1_links_to_member_1(switched_laboratory: Laboratory, concurrent: Laboratory):
    concurrent.run(select=["boosting/round_1"], seeds=[1])
    first, member = (concurrent.artefact(key, 1) for key in ("boosting/round_1", "bagging/member_1"))
    assert first.data_version == member.data_version == switched_laboratory.artefact("boosting/round_1", 1).data_version
    assert first.provenance["same_as"] == f"{NAME}/bagging/member_1"


def test_a_round_requested_alone_has_the_bits_of_one_trained_with_all(concurrent: Laboratory, switched_laboratory: Laboratory):
    concurrent.run(select=["boosting/round_2"], seeds=[1])
    assert not (concurrent.root / "experiments" / NAME / f"layer={LAYER}" / "seed=1" / "boosting" / "round_3").exists()
    assert concurrent.artefact("boosting/round_2", 1).data_version == switched_laboratory.artefact("boosting/round_2", 1).data_version
    assert concurrent.artefact("boosting/round_2", 1).provenance["trained_together"] == 2


def test_a_removed_round_is_rebuilt_alone_with_the_same_bits(switched: Laboratory, switched_laboratory: Laboratory):
    shutil.rmtree(switched.artefact("boosting/round_2", 1).path)
    before = _stamps(switched)
    switched.run()
    after = _stamps(switched)
    assert {file.parent.name for file in after if before.get(file) != after[file]} == {"round_2"}
    assert _weights(switched, "boosting/round_2") == _weights(switched_laboratory, "boosting/round_2")


def test_rounds_trained_only_for_a_later_one_are_not_written(switched: Laboratory):
    shutil.rmtree(switched.artefact("boosting/round_3", 1).path)
    shutil.rmtree(switched.artefact("boosting/round_1", 1).path)
    switched.materialise([f"{NAME}/boosting/round_3"], Partition(LAYER, 1))
    assert switched.artefact("boosting/round_3", 1).provenance["trained_together"] == MEMBERS
    assert switched.store.find(switched.declarations()[f"{NAME}/boosting/round_1"].address, Partition(LAYER, 1)) is None


def test_a_larger_ensemble_keeps_its_rounds(switched: Laboratory, switched_laboratory: Laboratory):
    switched.declare(ensemble=CONCURRENT | {"members": MEMBERS + 1})
    switched.run(select=[f"boosting/round_{MEMBERS + 1}"], seeds=[1])
    for key in ROUNDS:
        assert switched.artefact(key, 1).data_version == switched_laboratory.artefact(key, 1).data_version
    assert switched.artefact(f"boosting/round_{MEMBERS + 1}", 1).provenance["trained_together"] == MEMBERS + 1


def test_every_stale_round_names_the_changed_settings(switched: Laboratory):
    switched.declare(ensemble=CONCURRENT, training={"learning_rate": 0.02, "batch_tokens": 64})
    reasons = {str(s.declaration.address).removeprefix(f"{NAME}/"): s.reason for s in status_of(NAME) if s.state == "stale"}
    for key in ROUNDS:
        assert "training.learning_rate: 0.01 -> 0.02" in reasons[key]


# numbers


def test_concurrent_rounds_reconstruct_the_residual_of_earlier_rounds(switched_laboratory: Laboratory):
    x = stored_activations(switched_laboratory, "test")
    table = read_table(switched_laboratory.root, NAME, "reconstruction")
    for n in range(1, MEMBERS + 1):
        (row,) = table.filter(method="boosting", n_members=n, seed=1).iter_rows(named=True)
        x_hat, _ = plain_boosting(plain_saes(switched_laboratory, "boosting/round", 1, n), x)
        assert row["tokens"] == TEST
        assert row["explained_variance"] == pytest.approx(plain_explained_variance(x, x_hat), abs=1e-4)


def test_concurrent_rounds_explain_about_as_much_as_sequential_ones(finished_laboratory: Laboratory, switched_laboratory: Laboratory):
    values = [
        read_table(laboratory.root, NAME, "reconstruction").filter(method="boosting", seed=1).sort("n_members")["explained_variance"]
        for laboratory in (finished_laboratory, switched_laboratory)
    ]
    assert values[1].is_sorted()
    assert values[1][-1] == pytest.approx(values[0][-1], abs=0.1)  # ten steps


def test_cfg_json_records_the_input_that_an_sae_was_trained_on(switched_laboratory: Laboratory):
    for key, given in zip(ROUNDS, ("activations", "residual_1", "residual_2"), strict=True):
        assert f'"trained_on": "{given}"' in (switched_laboratory.artefact(key, 1).path / "cfg.json").read_text()


def test_cost_records_the_mode_and_no_passes_over_residuals(switched_laboratory: Laboratory):
    cost = read_table(switched_laboratory.root, NAME, "cost")
    boosting = cost.filter(method="boosting")
    assert set(boosting["boosting_mode"]) == {"concurrent"}
    assert set(cost.filter(pl.col("method") != "boosting")["boosting_mode"]) == {None}
    assert set(boosting["residual_flops"]) == set(boosting["residual_seconds"]) == {0.0}
    each = sm.SAEConfig(architecture="topk", d_in=D_MODEL, d_sae=D_SAE, k=4).train_flops_per_token * TRAIN
    assert set(boosting.select("n_members", "train_flops").iter_rows()) == {(n, n * each) for n in range(1, MEMBERS + 1)}
    seconds = [switched_laboratory.artefact(key, 1).provenance["train_seconds"] for key in ROUNDS[1:]]
    assert seconds == [seconds[0]] * (MEMBERS - 1)


def test_a_single_round_records_its_mode(empty: Laboratory):
    single = {"members": 1, "seeds": [7]}
    for mode in ("sequential", "concurrent"):
        empty.declare(ensemble=single | {"boosting": mode}, baselines=[], evaluations=["cost"])
        empty.run()
        assert set(read_table(empty.root, NAME, "cost").filter(method="boosting")["boosting_mode"]) == {mode}


# settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ensemble": CONCURRENT | {"boosting": "parallel"}}, "attributes.ensemble.boosting: .*'sequential' or 'concurrent'.*'parallel'"),
        ({"ensemble": CONCURRENT, "keep_residuals": "all"}, "keep_residuals: all, but ensemble.boosting: concurrent has no residuals"),
    ],
)
def test_invalid_boosting_settings_are_refused(empty: Laboratory, changes: dict, message: str):
    empty.declare(**changes)
    (said,) = empty.catalogue.broken.values()
    assert re.search(message, said), said
