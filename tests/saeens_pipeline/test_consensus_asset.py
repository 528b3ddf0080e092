"""The asset `EXPERIMENT/consensus` and its counterpart of equal width, from the stored members."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import polars as pl
import pytest
import torch
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory

import saeens_models as sm
from saeens_models.consensus import find_clusters
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.names import CLUSTERS_FILE, Address, Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import read_table

METHODS = ["consensus", "consensus_matched"]


@pytest.fixture(scope="module")
def laboratory(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """The tiny experiment, whose SAEs are trained for long enough to have features in common."""
    home = tmp_path_factory.mktemp("consensus")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(baselines=METHODS, evaluations=["reconstruction", "stability", "cost"])
        laboratory.run()
        yield laboratory


def stored(laboratory: Laboratory, method: str, seed: int) -> tuple[sm.SAE, Store, Address]:
    address = Address(NAME, "consensus" if method == "consensus" else "baseline", method)
    return sm.load_sae(laboratory.store.require(address, Partition(LAYER, seed)).path), laboratory.store, address


@pytest.mark.parametrize("seed", SEEDS)
def test_consensus_has_the_rows_of_the_members_clusters(laboratory: Laboratory, seed: int):
    members = [sm.load_sae(laboratory.artefact(f"bagging/member_{j}", seed).path) for j in range(1, MEMBERS + 1)]
    clusters = find_clusters([member.W_dec for member in members])
    sae, store, address = stored(laboratory, "consensus", seed)
    chosen = [cluster.features[cluster.representative] for cluster in clusters]
    torch.testing.assert_close(sae.W_dec, torch.stack([members[member].W_dec[row] for member, row in chosen]))
    table = pl.read_parquet(store.require(address, Partition(LAYER, seed)).path / CLUSTERS_FILE)
    rows = [(i, member + 1, row) for i, cluster in enumerate(clusters) for member, row in cluster.features]
    assert table.select("feature", "member", "index").rows() == rows
    assert table.filter("is_representative").select("member", "index").rows() == [(member + 1, row) for member, row in chosen]


@pytest.mark.parametrize("seed", SEEDS)
def test_its_counterpart_has_its_width_and_own_features(laboratory: Laboratory, seed: int):
    consensus, matched = (stored(laboratory, method, seed)[0] for method in METHODS)
    assert matched.config.d_sae == consensus.config.d_sae
    assert not torch.equal(matched.W_dec, consensus.W_dec)


@pytest.mark.parametrize("method", METHODS)
def test_both_are_methods_of_the_tables(laboratory: Laboratory, method: str):
    for seed in SEEDS:
        width = stored(laboratory, method, seed)[0].config.d_sae
        (row,) = read_table(laboratory.root, NAME, "reconstruction").filter(method=method, seed=seed).iter_rows(named=True)
        assert (row["n_features"], row["n_members"]) == (width, 1)
    assert len(read_table(laboratory.root, NAME, "stability").filter(method=method)) == len(SEEDS)


def test_the_asset_is_named_after_the_experiment_and_depends_on_the_members(laboratory: Laboratory):
    specs = {spec.key: spec for spec in laboratory.catalogue.definitions().resolve_all_asset_specs()}
    deps = {dep.asset_key.to_user_string() for dep in specs[dg.AssetKey([NAME, "consensus"])].deps}
    assert {f"{NAME}/bagging/member_{j}" for j in range(1, MEMBERS + 1)} <= deps


def test_another_member_makes_the_consensus_stale(laboratory: Laboratory):
    declared = {str(d.address): d for op in laboratory.catalogue.ops(laboratory.catalogue.experiment(NAME)) for d in op.outputs}
    recipe = declared[f"{NAME}/consensus"].recipe(laboratory.store, Partition(LAYER, SEEDS[0]))
    assert {"activations", *(f"member_{j}" for j in range(1, MEMBERS + 1))} == set(recipe.inputs)


def test_without_a_common_feature_the_error_says_what_to_do(empty: Laboratory):
    empty.declare(ensemble={"members": 2, "seeds": [1]}, sae={"architecture": "topk", "d_sae": 2, "k": 1}, baselines=["consensus"])
    with pytest.raises(SaeensError, match=r"there is no consensus\. Train longer, or leave consensus and consensus_matched out"):
        empty.run()


def test_one_member_has_no_consensus(empty: Laboratory):
    file = empty.declare(ensemble={"members": 1, "seeds": [1]}, baselines=["consensus"])
    assert "a consensus needs at least two members: add some, or leave it out" in empty.catalogue.broken[file]
