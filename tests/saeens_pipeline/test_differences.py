"""The tables `differences` and `token_curves`, and the floors of the next-token loss, recomputed from the stored artefacts."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from tiny_experiment import MEMBERS, NAME, SEEDS, Laboratory

import saeens_models as sm
from saeens_models.metrics import paired_bootstrap
from saeens_pipeline.storage.tables import read_table

WHOLE = {"single": 1, "bagging": MEMBERS, "boosting": MEMBERS, "expanded": MEMBERS, "expanded_l0_matched": MEMBERS}
METRICS = ("explained_variance", "l0", "ce_loss_added_nats")


def table(laboratory: Laboratory, name: str = "differences", **where: Any) -> pl.DataFrame:
    return read_table(laboratory.root, NAME, name).filter(**where)


def dictionary(laboratory: Laboratory, method: str, n: int, seed: int) -> sm.Ensemble:
    if method in ("bagging", "boosting", "single"):
        kind = "boosting/round" if method == "boosting" else "bagging/member"
        saes = [sm.load_sae(laboratory.artefact(f"{kind}_{j}", seed).path) for j in range(1, n + 1)]
        return (sm.Boosting if method == "boosting" else sm.Bagging)(saes)
    return sm.Bagging([sm.load_sae(laboratory.artefact(f"baseline/{method}", seed).path)])


def test_whole_methods_are_compared_with_each_other_and_sizes_with_the_one_before(finished_laboratory: Laboratory):
    sizes = [((method, n), (method, n - 1)) for method in ("bagging", "boosting") for n in range(2, MEMBERS + 1)]
    expected = {(*pair, metric, seed) for pair in [*combinations(WHOLE.items(), 2), *sizes] for metric in METRICS for seed in SEEDS}
    rows = table(finished_laboratory).select("method", "n_members", "other_method", "other_n_members", "metric", "seed").rows()
    assert len(rows) == len(expected)
    assert {((a, n), (b, m), metric, seed) for a, n, b, m, metric, seed in rows} == expected


def test_differences_are_those_of_the_table_reconstruction(finished_laboratory: Laboratory):
    measured = {
        (row["method"], row["n_members"], row["seed"]): row for row in table(finished_laboratory, "reconstruction").iter_rows(named=True)
    }
    for row in table(finished_laboratory).iter_rows(named=True):
        one = measured[row["method"], row["n_members"], row["seed"]]
        other = measured[row["other_method"], row["other_n_members"], row["seed"]]
        assert row["difference"] == pytest.approx(one[row["metric"]] - other[row["metric"]], abs=1e-9)
        assert row["low"] <= row["difference"] <= row["high"]
        assert (row["sae_data_versions"], row["other_sae_data_versions"]) == (one["sae_data_versions"], other["sae_data_versions"])


def test_the_interval_is_that_of_documents_drawn_with_numpy(finished_laboratory: Laboratory):
    group: Any = zarr.open_group(finished_laboratory.artefact("activations").path, mode="r")
    x, document = torch.from_numpy(group["test/activations"][:].astype(np.float32)), group["test/document"][:]
    x_hats = [dictionary(finished_laboratory, method, MEMBERS, SEEDS[0])(x).detach() for method in ("boosting", "expanded")]
    squares = [((x_hat - x).double().numpy()) ** 2 for x_hat in x_hats]
    deviations = (x.double() - x.double().mean(0)).numpy() ** 2
    present = np.unique(document)
    sums = [np.stack([values[document == each].sum(0) for each in present]) for values in (*squares, deviations)]
    generator = torch.Generator().manual_seed(paired_bootstrap._SEED)
    drawn = torch.randint(len(present), (2000, len(present)), generator=generator).numpy()
    counts = np.stack([np.bincount(row, minlength=len(present)) for row in drawn])
    boosting, expanded, total = (counts @ each for each in sums)
    low, high = np.percentile(((expanded - boosting) / total).mean(1), [2.5, 97.5])
    row = table(finished_laboratory, method="boosting", other_method="expanded", metric="explained_variance", seed=SEEDS[0]).row(
        0, named=True
    )
    assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-5)
    assert (row["tokens"], row["documents"]) == (len(x), len(present))


def test_the_loss_has_two_floors_and_the_added_nats(finished_laboratory: Laboratory):
    for seed in SEEDS:
        loss = finished_laboratory.artefact("eval/reconstruction", seed).provenance["next_token_loss"]
        for row in table(finished_laboratory, "reconstruction", seed=seed).iter_rows(named=True):
            added = row["ce_loss_added_nats"]
            for column, floor in (("ce_loss_recovered", "ablated"), ("ce_loss_recovered_from_mean", "replaced_by_mean")):
                effect = loss[floor] - loss["clean"]
                assert row[column] == (pytest.approx(1 - added / effect, abs=1e-9) if abs(effect) >= 0.05 else None)


@pytest.mark.parametrize(("method", "n"), [("boosting", 2), ("expanded", MEMBERS)])
def test_curves_over_tokens_equal_the_metrics_of_the_first_tokens(finished_laboratory: Laboratory, method: str, n: int):
    group: Any = zarr.open_group(finished_laboratory.artefact("activations").path, mode="r")
    x = torch.from_numpy(group["test/activations"][:].astype(np.float32))
    fires = (dictionary(finished_laboratory, method, n, SEEDS[0]).encode(x).detach() != 0).double()
    curve = table(finished_laboratory, "token_curves", method=method, n_members=n, seed=SEEDS[0])
    assert curve["tokens"].to_list() == [-(-len(x) // parts) for parts in (16, 8, 4, 2, 1)]
    for tokens, connectivity, dead in curve.select("tokens", "connectivity", "dead_features").iter_rows():
        first = fires[:tokens]
        assert connectivity == pytest.approx(1 - ((first.T @ first) > 0).double().mean().item())
        assert dead == pytest.approx((first.sum(0) == 0).double().mean().item())
    whole = table(finished_laboratory, "coactivation", method=method, n_members=n, seed=SEEDS[0])
    assert curve["connectivity"][-1] == whole["connectivity"][0]


def test_one_document_and_no_loss_are_null_with_the_reason(empty: Laboratory):
    empty.declare({"test_tokens": 6}, baselines=[], ensemble={"members": 2, "seeds": [1]}, evaluations=["differences"], ce_loss_tokens=0)
    empty.run()
    found = table(empty)
    assert set(found["documents"].drop_nulls()) == {1}
    assert found.filter(metric="l0")["difference"].null_count() == 0
    assert found["low"].null_count() == found["high"].null_count() == len(found)
    assert found.filter(metric="ce_loss_added_nats")["difference"].null_count() == len(found) / 3
    assert empty.artefact("eval/differences", 1).provenance["not_measured"] == {
        "interval of explained_variance": "an interval over documents needs two, and there is one",
        "interval of l0": "an interval over documents needs two, and there is one",
        "ce_loss_added_nats": "the next-token loss was not measured",
    }
