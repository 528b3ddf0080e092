"""Held-out figures on the pages of SAEs and ensembles: those of the tables, of the present SAEs only, with links both ways."""

from __future__ import annotations

import shutil
from typing import Any

import dagster as dg
import polars as pl
import pytest
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

from saeens_pipeline.assets.held_out import held_out
from saeens_pipeline.orchestration.external_data import DATA_VERSION_TAG
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.orchestration.metadata import describe_artefact
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Artefact

WHERE = Partition(LAYER, SEEDS[0])
EV, OWN_EV = "held-out explained variance", "held-out explained variance of its own input"


def _described(laboratory: Laboratory, name: str, **changes: Any) -> dict[str, Any]:
    declaration = laboratory.declarations()[f"{NAME}/{name}"]
    artefact = laboratory.artefact(name, SEEDS[0])
    artefact = Artefact(**{**vars(artefact), **changes})
    return describe_artefact(laboratory.store, declaration, WHERE, artefact, is_hit=False)


def _rows(laboratory: Laboratory, table: str, **row: Any) -> pl.DataFrame:
    return pl.read_parquet(laboratory.artefact(f"eval/{table}", SEEDS[0]).path, hive_partitioning=False).filter(**row)


def test_members_rounds_ensembles_and_baselines_lead_with_their_held_out_figures(finished: Laboratory):
    expected = {
        "bagging/member_1": (EV, _rows(finished, "reconstruction", method="single")),
        "bagging/member_2": (OWN_EV, _rows(finished, "members", method="bagging", member=2)),
        "boosting/round_3": (OWN_EV, _rows(finished, "members", method="boosting", member=3)),
        "bagging/bagging_ensemble": (EV, _rows(finished, "reconstruction", method="bagging", n_members=3)),
        "boosting/boosting_ensemble": (EV, _rows(finished, "reconstruction", method="boosting", n_members=3)),
        "baseline/expanded": (EV, _rows(finished, "reconstruction", method="expanded", n_members=3)),
    }
    for name, (title, rows) in expected.items():
        (row,) = rows.iter_rows(named=True)
        metadata = _described(finished, name)
        assert next(iter(metadata)) == title
        assert metadata[title] == pytest.approx(row["explained_variance"], abs=6e-5)
        assert metadata["held-out L0 [features per token]"] == pytest.approx(row["l0"], abs=6e-5)
        assert metadata["held-out share of dead features"] == pytest.approx(row["dead_features"], abs=6e-5)


def test_figures_of_an_earlier_sae_are_not_shown(finished: Laboratory):
    metadata = _described(finished, "bagging/member_2", data_version="0" * 16)
    assert not [title for title in metadata if title.startswith("held-out")]
    assert "explained variance in training" in metadata
    shutil.rmtree(finished.root / "tables")
    member = finished.declarations()[f"{NAME}/bagging/member_2"]
    assert held_out(finished.store, member, WHERE, finished.artefact("bagging/member_2", SEEDS[0])) is None


def test_links_keep_the_partition_in_both_directions(finished: Laboratory):
    query = f"?view=partitions&partition={LAYER}%7C{SEEDS[0]}"
    member, table = _described(finished, "bagging/member_2"), _described(finished, "eval/members")
    assert f"(/assets/{NAME}/eval/members{query})" in member["held-out figures are from"].value
    assert f"(/assets/{NAME}/bagging/member_2{query})" in table["SAEs of bagging_ensemble"].value
    version = finished.artefact("bagging/bagging_ensemble", SEEDS[0]).data_version
    assert table["data version"] == finished.artefact("eval/members", SEEDS[0]).data_version
    assert f"(/assets/{NAME}/bagging/bagging_ensemble{query}) `{version}`" in table["computed from"].value
    assert f"(/assets/{NAME}/activations?view=partitions&partition={LAYER})" in member["computed from"].value


def test_new_tables_report_the_saes_that_they_are_about_again_with_their_figures(finished: Laboratory):
    for table in ("members", "reconstruction"):
        shutil.rmtree(finished.root / "tables" / NAME / table)
    known = ["bagging/member_2", "bagging/bagging_ensemble"]
    partition = dg.MultiPartitionKey({"layer": str(LAYER), "seed": str(SEEDS[0])})
    job = finished.catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def()
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [LAYER])

        def make(*names: str) -> None:
            keys = [dg.AssetKey([NAME, *name.split("/")]) for name in names]
            job.execute_in_process(instance=instance, partition_key=partition, asset_selection=keys)

        def reports(name: str) -> list[dg.AssetMaterialization]:
            records = instance.fetch_materializations(dg.AssetKey([NAME, *name.split("/")]), limit=10).records
            return [each.asset_materialization for each in records if each.asset_materialization]

        make(*known)
        assert not [name for each in known for report in reports(each) for name in report.metadata if name.startswith("held-out")]
        for _ in range(2):  # the second time the tables are cache hits
            make("eval/members", "eval/reconstruction")
        for name, title in zip(known, (OWN_EV, EV), strict=True):
            told, before = reports(name)
            assert next(iter(told.metadata)) == title
            assert told.metadata[title].value == _described(finished, name)[title]
            assert before.metadata.items() <= told.metadata.items()
            assert told.tags == before.tags
            assert told.tags and told.tags[DATA_VERSION_TAG] == finished.artefact(name, SEEDS[0]).data_version
            assert told.partition == f"{LAYER}|{SEEDS[0]}"
        assert not reports("bagging/member_1")  # this instance has never heard of it


def test_tables_lead_with_numbers_that_the_ui_plots_by_partition(finished: Laboratory):
    rows = pl.read_parquet(finished.artefact("eval/members", SEEDS[0]).path, hive_partitioning=False)
    ev = {m: rows.filter(method=m)["explained_variance"].to_numpy().mean() for m in ("bagging", "boosting")}
    members = _described(finished, "eval/members")
    title = "mean explained variance of own inputs, bagging"
    assert next(iter(members)) == title
    assert members[title] == pytest.approx(ev["bagging"], abs=6e-5)
    assert members["mean explained variance of own inputs, boosting"] == pytest.approx(ev["boosting"], abs=6e-5)
