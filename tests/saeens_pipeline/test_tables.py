"""The table contract: columns, types, and reading of partitions together."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from saeens_pipeline.assets.registry import TABLES, columns_of, listed, table_frame
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Recipe, Store
from saeens_pipeline.storage.tables import read_table

SUBJECT = ["experiment", "layer", "seed", "language_model", "method", "n_members", "sae_data_versions"]
CONTRACT = {
    "reconstruction": "n_features mse explained_variance fvu l0 l0_error relative_sparsity dead_features constant_dimensions "
    "description_length_bits ce_loss_recovered ce_loss_recovered_from_mean ce_loss_added_nats "
    "tokens train_rows_dropped test_rows_dropped top_rows_variance",
    "members": "member mse explained_variance l0 dead_features mean_max_cosine_to_other_members median_density",
    "coactivation": "connectivity diversity tokens",
    "token_curves": "tokens connectivity dead_features",
    "differences": "metric other_method other_n_members difference low high tokens documents other_sae_data_versions",
    "stability": "n_runs n_features stability stability_pairwise stability_pairwise_left_out stability_matched stability_reference "
    "stability_equal_candidates stability_of_member "
    + " ".join(
        f"{name}_chance_{kind}" for name in ("stability", "pw_mcc", "shared_fraction") for kind in ("isotropic", "covariance", "data")
    )
    + " pw_mcc pw_mcc_left_out pw_mcc_bound shared_fraction functional_stability",
    "feature_stability": "member index n_runs n_found best_cosine",
    "marginal_gain": "explained_variance_gain explained_variance_gain_low explained_variance_gain_high ce_loss_gain ce_loss_gain_low "
    "ce_loss_gain_high new_features worthwhile suggested",
    "cost": "train_tokens train_flops train_seconds residual_flops residual_seconds peak_memory_bytes inference_flops_per_token "
    "device dtype boosting_mode",
    "features": "member index density mean_activation nearest_member nearest_cosine matches nearest_other_seed_cosine nearest_other_seed "
    "nearest_other_seed_member nearest_other_seed_index top_tokens",
    "contexts": "member index max_activation contexts histogram bin_width promoted_tokens suppressed_tokens",
    "autointerp": "member index explanation detection_score true_positive_rate false_positive_rate control_score n_examples status model",
    "concept_detection": "dataset label n_probe_features code_scale accuracy n_distinct_features accuracy_distinct",
    "spurious_correlation": "task n_ablated accuracy_biased accuracy_clean accuracy_ablated worst_group_accuracy scr scr_metric",
    "recovery": "recovered_fraction mean_max_cosine precision n_true_features n_rows recovered_fraction_equal_rows "
    "mean_max_cosine_equal_rows recovered_fraction_chance mean_max_cosine_chance",
    "training_curves": "member step tokens loss explained_variance l0 dead_features learning_rate",
}
ROW = {
    "experiment": "e",
    "layer": 1,
    "seed": 42,
    "language_model": "trained",
    "method": "bagging",
    "n_members": 2,
    "sae_data_versions": "a,b",
    "connectivity": 0.5,
    "diversity": 7,
    "tokens": 100,
}


@pytest.mark.parametrize("table", CONTRACT)
def test_tables_have_the_columns_of_the_contract(table: str):
    columns = columns_of(table)
    assert [column.name for column in columns] == SUBJECT + CONTRACT[table].split()
    assert all(column.description for column in columns)
    assert TABLES[table].question


def test_the_contract_covers_all_tables():
    assert {table.name for table in listed(over_experiments=False)} == CONTRACT.keys()


def test_a_frame_has_every_column_in_order_and_type_for_any_rows():
    shuffled = dict(reversed(ROW.items())) | {"diversity": None}
    for rows in ([], [ROW], [shuffled, ROW]):
        table = table_frame("coactivation", rows)
        assert table.columns == SUBJECT + CONTRACT["coactivation"].split()
        assert table.schema["connectivity"] == pl.Float64
        assert table.schema["diversity"] == pl.Int64
        assert table.schema["method"] == pl.String
    assert table.row(1, named=True) == ROW
    assert table["diversity"].to_list() == [None, 7]


def test_columns_that_do_not_apply_are_null():
    (row,) = table_frame("reconstruction", [{"method": "single"}]).iter_rows(named=True)
    assert {name for name, value in row.items() if value is not None} == {"method"}


def test_a_column_outside_the_contract_is_refused():
    with pytest.raises(ValueError, match="table coactivation has no column purity"):
        table_frame("coactivation", [ROW | {"purity": 1.0}])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Tables of three partitions, written in another order than they are read."""
    for layer, seed in ((10, 1), (2, 2), (2, 1)):
        rows = [ROW | {"layer": layer, "seed": seed, "method": method, "n_members": n} for method, n in (("single", 1), ("bagging", 1))]
        address = Address("e", "eval", "coactivation")
        Store(tmp_path).write_table(
            address, Partition(layer, seed), Recipe("table coactivation", 1, {}), {}, table_frame("coactivation", rows)
        )
    return tmp_path


def test_all_partitions_are_read_in_numeric_order(root: Path):
    table = read_table(root, "e", "coactivation")
    subjects = [(layer, seed, method) for layer, seed in ((2, 1), (2, 2), (10, 1)) for method in ("bagging", "single")]
    assert list(table.select("layer", "seed", "method").iter_rows()) == subjects
    assert table.columns == SUBJECT + CONTRACT["coactivation"].split()


def test_one_scan_of_the_folder_reads_all_partitions(root: Path):
    scanned = pl.scan_parquet(root / "tables" / "e" / "coactivation").filter(pl.col("layer") == 2).collect()
    assert sorted(scanned.select("layer", "seed").unique().iter_rows()) == [(2, 1), (2, 2)]
    assert scanned.columns == SUBJECT + CONTRACT["coactivation"].split()


def test_an_absent_table_is_named_with_the_command_that_computes_it(root: Path):
    with pytest.raises(SaeensError, match=r"e has no table cost below .* yet: `saeens run e` computes it"):
        read_table(root, "e", "cost")


@pytest.mark.parametrize(("experiment", "table"), [("..", "coactivation"), ("e", "../e/coactivation"), ("e", "/etc")])
def test_table_names_cannot_leave_the_folder_of_tables(root: Path, experiment: str, table: str):
    (root / "coactivation").symlink_to(root / "tables" / "e" / "coactivation")
    with pytest.raises((SaeensError, ValueError)):
        read_table(root, experiment, table)
