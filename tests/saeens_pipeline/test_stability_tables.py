"""The tables `stability` and `feature_stability`, recomputed with numpy and scipy from the stored artefacts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import zarr
from scipy.optimize import linear_sum_assignment
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory
from tiny_models import D_MODEL

import saeens_models as sm
from saeens_pipeline.storage.tables import read_table

D_SAE = 2 * D_MODEL


@pytest.fixture(scope="module")
def laboratory(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Laboratory]:
    """The tiny experiment with these tables and nothing else made."""
    home = tmp_path_factory.mktemp("stability")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(evaluations=["stability", "feature_stability"])
        laboratory.run()
        yield laboratory


def table(laboratory: Laboratory, name: str = "stability", **where: Any) -> pl.DataFrame:
    return read_table(laboratory.root, NAME, name).filter(**where)


def saes(laboratory: Laboratory, method: str, seed: int, n: int) -> list[sm.SAE]:
    kind = {"bagging": "bagging/member", "boosting": "boosting/round"}[method]
    return [sm.load_sae(laboratory.artefact(f"{kind}_{j}", seed).path) for j in range(1, n + 1)]


def dictionary(laboratory: Laboratory, method: str, seed: int, n: int) -> np.ndarray:
    if method not in ("bagging", "boosting"):
        rows = sm.load_sae(laboratory.artefact(f"baseline/{method}", seed).path).W_dec.detach().double().numpy()
    else:
        rows = np.concatenate([sae.W_dec.detach().double().numpy() for sae in saes(laboratory, method, seed, n)])
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("method", ["bagging", "boosting", "expanded"])
def test_reference_is_member_1_against_as_many_features_of_the_other_seeds_bag(laboratory: Laboratory, method: str):
    n = MEMBERS if method == "expanded" else 2
    for seed, other in (SEEDS, SEEDS[::-1]):
        own, others = dictionary(laboratory, "bagging", seed, 1), dictionary(laboratory, "bagging", other, n)
        (value,) = table(laboratory, method=method, n_members=n, seed=seed)["stability_reference"]
        assert value == pytest.approx((own @ others.T).max(1).clip(0).mean(), abs=1e-5)


@pytest.mark.parametrize("method", ["bagging", "boosting"])
def test_members_and_rounds_have_a_stability_of_their_own(laboratory: Laboratory, method: str):
    for n in range(1, MEMBERS + 1):
        rows = [dictionary(laboratory, method, seed, n)[-D_SAE:] for seed in SEEDS]
        (value,) = table(laboratory, method=method, n_members=n, seed=SEEDS[0])["stability_of_member"]
        assert value == pytest.approx((rows[0] @ rows[1].T).max(1).clip(0).mean(), abs=1e-5)
    assert table(laboratory, method="expanded")["stability_of_member"].null_count() == len(SEEDS)


@pytest.mark.parametrize(("method", "n"), [("single", 1), ("bagging", MEMBERS), ("boosting", 2), ("expanded", MEMBERS)])
def test_matched_columns_follow_from_scipys_assignment(laboratory: Laboratory, method: str, n: int):
    stored = "bagging" if method == "single" else method
    a, b = (dictionary(laboratory, stored, seed, n) for seed in SEEDS)
    row_a, row_b = linear_sum_assignment(np.abs(a @ b.T), maximize=True)
    cosines = (a @ b.T)[row_a, row_b]
    found = table(laboratory, method=method, n_members=n)
    assert found["pw_mcc"].to_list() == pytest.approx([np.abs(cosines).mean()] * len(SEEDS), abs=1e-5)
    assert found["pw_mcc_bound"].to_list() == found["pw_mcc"].to_list()
    if method == "expanded":
        return
    ensembles = [(sm.Boosting if method == "boosting" else sm.Bagging)(saes(laboratory, stored, seed, n)) for seed in SEEDS]
    encoders = [np.concatenate([sae.W_enc.detach().double().numpy().T for sae in each]) for each in ensembles]
    encoders = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in encoders]
    encoder_cosines = (encoders[0][row_a] * encoders[1][row_b]).sum(1)
    assert found["shared_fraction"][0] == pytest.approx(((cosines >= 0.7) & (encoder_cosines >= 0.7)).mean())
    group: Any = zarr.open_group(laboratory.artefact("activations").path, mode="r")
    x = torch.from_numpy(group["test/activations"][:].astype(np.float32))
    z_a, z_b = (each.encode(x).detach().double().numpy() for each in ensembles)
    pairs = [(z_a[:, i], z_b[:, j]) for i, j in zip(row_a, row_b, strict=True)]
    correlations = [np.corrcoef(p, q)[0, 1] for p, q in pairs if p.std() and q.std()]
    assert found["functional_stability"][0] == pytest.approx(np.mean(correlations), abs=1e-5)


def test_chance_levels_are_equal_for_dictionaries_of_equal_width(laboratory: Laboratory):
    found = table(laboratory)
    for kind in ("isotropic", "covariance"):
        for column in ("stability", "pw_mcc", "shared_fraction"):
            levels = found.group_by("n_features").agg(pl.col(f"{column}_chance_{kind}").unique())
            assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in levels[f"{column}_chance_{kind}"])
    by_width = found.unique("n_features").sort("n_features")["stability_chance_isotropic"].to_list()
    assert by_width == sorted(by_width), "chance grows with the number of candidates"
    rng = np.random.default_rng(0)
    drawn = [rng.standard_normal((2, D_SAE, D_MODEL)) for _ in range(30)]
    cosines = [np.divide(a, np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T for a, b in drawn]
    assert by_width[0] == pytest.approx(np.mean([each.max(1).clip(0).mean() for each in cosines]), abs=0.03)


def test_picked_activations_without_enough_documents_are_null_with_the_reason(empty: Laboratory):
    empty.declare({"train_tokens": 60}, evaluations=["stability"])
    empty.run()
    assert table(empty)["stability_chance_data"].null_count() == len(table(empty))
    reasons = empty.artefact("eval/stability").provenance["not_measured"]
    assert "rows: 32 are needed" in reasons[f"chance_data of {D_SAE} features"]


def test_with_one_seed_nothing_is_measured_and_the_record_says_why(empty: Laboratory):
    empty.declare(ensemble={"members": 2, "seeds": [1]}, evaluations=["stability", "feature_stability"])
    empty.run()
    assert table(empty)["stability", "pw_mcc", "stability_reference"].null_count().row(0) == (len(table(empty)),) * 3
    assert empty.artefact("eval/stability").provenance["not_measured"] == {"all": "stability compares seeds, and there is one"}
    assert table(empty, "feature_stability")["n_found"].null_count() == len(table(empty, "feature_stability"))


def test_matching_pursuit_has_no_encoder_to_share(empty: Laboratory):
    empty.declare(ensemble={"members": 2, "seeds": [1, 2]}, baselines=["matching_pursuit"], evaluations=["stability"])
    empty.run()
    found = table(empty, method="matching_pursuit")
    assert found["shared_fraction"].null_count() == 2
    assert found["pw_mcc"].null_count() == 0


def test_every_feature_says_in_how_many_seeds_it_is_found(laboratory: Laboratory):
    for method, n in (("single", 1), ("bagging", MEMBERS), ("boosting", MEMBERS), ("expanded", MEMBERS)):
        a, b = (dictionary(laboratory, "bagging" if method == "single" else method, seed, n) for seed in SEEDS)
        found = table(laboratory, "feature_stability", method=method, seed=SEEDS[0])
        assert found["best_cosine"].to_numpy() == pytest.approx((a @ b.T).max(1), abs=1e-5)
        assert found["n_found"].to_list() == ((a @ b.T).max(1) >= 0.7).astype(int).tolist()
        widths = [D_SAE * MEMBERS] if method == "expanded" else [D_SAE] * n
        assert found.select("member", "index").rows() == [(j, i) for j, width in enumerate(widths, start=1) for i in range(width)]
        assert set(found["layer"]) == {LAYER}
