"""The table of features: one row per feature of every ensemble, against codes, cosines and text computed from stored artefacts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
import torch
import zarr
from sklearn.metrics.pairwise import cosine_similarity
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of
from tiny_models import D_MODEL
from tokenizers import Tokenizer, decoders, models

import saeens_models as sm
from saeens_pipeline.assets.measurements.features import TOP_TOKENS
from saeens_pipeline.assets.measurements.token_strings import token_text

D_SAE = 2 * D_MODEL
REFERENCE_MODEL = Path(__file__).parents[2] / "data" / "reference_model"
METHODS = {"bagging": MEMBERS, "boosting": MEMBERS, "expanded": 1, "expanded_l0_matched": 1}  # and how many SAEs they have


@pytest.fixture(scope="module")
def laboratory(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory):
    """The tiny experiment with this table and nothing else made."""
    home = tmp_path_factory.mktemp("features")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(evaluations=["features"])
        laboratory.run()
    return laboratory


def _table(laboratory: Laboratory) -> pl.DataFrame:
    return pl.read_parquet(laboratory.artefact("eval/features").path, hive_partitioning=False)


def _saes(laboratory: Laboratory, method: str, seed: int) -> list[sm.SAE]:
    prefix = {"bagging": "bagging/member", "boosting": "boosting/round"}.get(method)
    keys = [f"{prefix}_{j}" for j in range(1, MEMBERS + 1)] if prefix else [f"baseline/{method}"]
    return [sm.load_sae(laboratory.artefact(key, seed).path) for key in keys]


def test_every_feature_of_every_seed_has_a_row(laboratory: Laboratory):
    table = _table(laboratory)
    widths = {"bagging": D_SAE, "boosting": D_SAE, "expanded": MEMBERS * D_SAE, "expanded_l0_matched": MEMBERS * D_SAE}
    expected = [
        (seed, method, member, index)
        for method, n_saes in METHODS.items()
        for seed in SEEDS
        for member in range(1, n_saes + 1)
        for index in range(widths[method])
    ]
    assert table.select("seed", "method", "member", "index").rows() == expected
    assert set(table["n_members"]) == {MEMBERS}
    key = {"bagging": "bagging/member_2", "boosting": "boosting/round_2"}
    for (seed, method), rows in table.filter(member=2).group_by("seed", "method"):
        assert set(rows["sae_data_versions"]) == {laboratory.artefact(key[method], seed).data_version}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("method", METHODS)
def test_activity_and_top_tokens_are_computed_on_the_test_split(laboratory: Laboratory, method: str, seed: int):
    group: Any = zarr.open_group(laboratory.artefact("activations").path, mode="r")
    x = np.asarray(group["test/activations"][:], np.float32)
    tokens: Any = zarr.open_group(laboratory.artefact("tokens", layer=None).path, mode="r")["test"]
    ids = tokens["tokens"][:][tokens["kept"][:]]
    tokenizer = Tokenizer.from_file(str(laboratory.model / "tokenizer.json"))
    saes = _saes(laboratory, method, seed)
    ensemble = sm.Boosting(saes) if method == "boosting" else sm.Bagging(saes)
    z = ensemble.encode(torch.from_numpy(x), scaled=False).detach().double().numpy()
    rows = _table(laboratory).filter(method=method, seed=seed)
    fires = (z != 0).sum(axis=0)
    np.testing.assert_allclose(rows["density"], fires / len(x))
    assert rows["mean_activation"].is_null().to_list() == (fires == 0).tolist()
    np.testing.assert_allclose(rows["mean_activation"].fill_null(0), z.sum(axis=0) / np.maximum(fires, 1), rtol=1e-5)
    for i, text in enumerate(rows["top_tokens"]):
        most_active = np.argsort(-z[:, i], kind="stable")[: min(TOP_TOKENS, fires[i])]
        assert json.loads(text) == [tokenizer.decode([ids[row]]) for row in most_active]


@pytest.mark.parametrize("text", ["plain text\n", "an em—dash", "│ ═══╗ of boxes", "é, 日本語, \U0001f389, and \ufffd"])
def test_only_parts_of_characters_are_written_as_bytes(text: str):
    tokenizer = Tokenizer.from_file(str(REFERENCE_MODEL / "tokenizer.json"))
    found = [token_text(tokenizer, token) for token in tokenizer.encode(text).ids]
    whole = re.compile("<0x([0-9A-F]{2})>")
    data = b"".join(bytes.fromhex(part) if i % 2 else part.encode() for each in found for i, part in enumerate(whole.split(each)))
    assert data.decode() == text
    assert all(int(byte, 16) > 127 for each in found for byte in whole.findall(each))
    assert ("\ufffd" in "".join(found)) <= ("\ufffd" in text)
    if text.startswith("│"):
        assert any(whole.search(each) for each in found)


def test_bytes_of_sentencepiece_keep_their_names():
    tokenizer = Tokenizer(models.BPE({"<0xE2>": 0, "▁a": 1}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert (token_text(tokenizer, 0), token_text(tokenizer, 1)) == ("<0xE2>", "▁a")


@pytest.mark.parametrize("method", METHODS)
def test_nearest_features_equal_those_of_scikit_learn(laboratory: Laboratory, method: str):
    here, there = ([sae.W_dec.detach().numpy() for sae in _saes(laboratory, method, seed)] for seed in SEEDS)
    rows = _table(laboratory).filter(method=method, seed=SEEDS[0])
    other_seed = cosine_similarity(np.concatenate(here), np.concatenate(there))
    np.testing.assert_allclose(rows["nearest_other_seed_cosine"], other_seed.max(axis=1), atol=1e-5)
    assert set(rows["nearest_other_seed"]) == {SEEDS[1]}
    width = len(there[0])
    assert ((rows["nearest_other_seed_member"] - 1) * width + rows["nearest_other_seed_index"]).to_list() == other_seed.argmax(1).tolist()
    if METHODS[method] == 1:
        assert rows["nearest_member"].null_count() == rows["nearest_cosine"].null_count() == rows["matches"].null_count() == len(rows)
        return
    for j in range(MEMBERS):
        of_others = {i + 1: cosine_similarity(here[j], other) for i, other in enumerate(here) if i != j}
        of_member = rows.filter(member=j + 1)
        np.testing.assert_allclose(of_member["nearest_cosine"], np.max([each.max(1) for each in of_others.values()], axis=0), atol=1e-5)
        for feature, (text, nearest) in enumerate(of_member.select("matches", "nearest_member").iter_rows()):
            found = json.loads(text)
            assert [[member, index] for member, index, _ in found] == [[i, each[feature].argmax()] for i, each in of_others.items()]
            assert [cosine for _, _, cosine in found] == pytest.approx([each[feature].max() for each in of_others.values()], abs=1e-4)
            assert nearest == max(of_others, key=lambda i: of_others[i][feature].max())


def test_the_table_of_features_depends_on_the_saes_of_all_seeds(laboratory: Laboratory):
    inputs = laboratory.artefact("eval/features").recipe["inputs"]
    saes = ["bagging_ensemble", "boosting_ensemble", "expanded", "expanded_l0_matched"]
    assert set(inputs) == {f"{name}, seed {seed}" for name in saes for seed in SEEDS}


def test_the_table_of_features_is_partitioned_by_layer_and_off_by_default(empty: Laboratory):
    assert "tiny/eval/features" not in empty.declarations()
    empty.declare(evaluations=["features"])
    (spec,) = [s for s in empty.catalogue.definitions().resolve_all_asset_specs() if s.key == dg.AssetKey([NAME, "eval", "features"])]
    assert spec.partitions_def is not None
    assert not isinstance(spec.partitions_def, dg.MultiPartitionsDefinition)
    assert {dep.asset_key.path[-1] for dep in spec.deps} == {"bagging_ensemble", "boosting_ensemble", "expanded", "expanded_l0_matched"}


def test_changed_test_tokens_rebuild_the_table_of_features(empty: Laboratory):
    empty.declare(evaluations=["features"], ensemble={"members": 1, "seeds": [1]}, baselines=[])
    empty.run()
    before = empty.artefact("eval/features").data_version
    empty.declare({"test_tokens": 150}, evaluations=["features"], ensemble={"members": 1, "seeds": [1]}, baselines=[])
    (stale,) = [status for status in status_of(NAME) if status.declaration.address.name == "features"]
    assert stale.state == "stale"
    empty.run()
    assert empty.artefact("eval/features").data_version != before


def test_with_one_seed_and_one_member_nearest_features_are_null(empty: Laboratory):
    empty.declare(evaluations=["features"], ensemble={"members": 1, "seeds": [1]})
    empty.run()
    assert {status.state for status in status_of(NAME)} == {"fresh"}
    table = _table(empty)
    assert set(table["layer"]) == {LAYER}
    for column in table.columns[table.columns.index("nearest_member") : table.columns.index("top_tokens")]:
        assert table[column].null_count() == len(table)
