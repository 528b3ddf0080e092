"""The table of contexts, against dense codes of stored activations, the tokenizer's decoding, and logits of the model's head."""

from __future__ import annotations

import json
import re
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
import torch
import zarr
from tiny_experiment import CORPUS, LAYER, MEMBERS, NAME, SEEDS, Laboratory, status_of
from tiny_models import CONTEXT_LENGTH, D_MODEL, VOCAB_SIZE, edit_config
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

import saeens_models as sm
from saeens_pipeline.assets.measurements.contexts import OUTPUT_TOKENS
from saeens_pipeline.assets.tables.contexts import CONTEXTS, RADIUS
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.orchestration.metadata import column_lineage

D_SAE = 2 * D_MODEL
SMALL: dict[str, Any] = {"evaluations": ["contexts"], "ensemble": {"members": 1, "seeds": [1]}, "baselines": []}


@pytest.fixture(scope="module")
def laboratory(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory):
    """The tiny experiment with this table and nothing else made."""
    home = tmp_path_factory.mktemp("contexts")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(evaluations=["contexts"], baselines=[])
        laboratory.run()
    return laboratory


def _table(laboratory: Laboratory, seed: int) -> pl.DataFrame:
    return pl.read_parquet(laboratory.artefact("eval/contexts", seed).path, hive_partitioning=False)


def _saes(laboratory: Laboratory, method: str, seed: int) -> list[sm.SAE]:
    prefix = {"bagging": "bagging/member", "boosting": "boosting/round"}[method]
    return [sm.load_sae(laboratory.artefact(f"{prefix}_{j}", seed).path) for j in range(1, MEMBERS + 1)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_feature_of_both_ensembles_has_a_row(laboratory: Laboratory, seed: int):
    table = _table(laboratory, seed)
    expected = [(method, j, index) for method in ("bagging", "boosting") for j in range(1, MEMBERS + 1) for index in range(D_SAE)]
    assert table.select("method", "member", "index").rows() == expected
    assert set(table.select("experiment", "layer", "seed", "n_members").rows()) == {(NAME, LAYER, seed, MEMBERS)}
    versions = set(table.filter(method="boosting", member=2)["sae_data_versions"])
    assert versions == {laboratory.artefact("boosting/round_2", seed).data_version}


@pytest.mark.parametrize("method", ["bagging", "boosting"])
def test_contexts_are_windows_around_the_largest_activations(laboratory: Laboratory, method: str):
    seed = SEEDS[0]
    group: Any = zarr.open_group(laboratory.artefact("activations").path, mode="r")
    x = torch.from_numpy(np.asarray(group["test/activations"][:], np.float32))
    stored: Any = zarr.open_group(laboratory.artefact("tokens", layer=None).path, mode="r")["test"]
    tokens, kept, document, position = (stored[name][:] for name in ("tokens", "kept", "document", "position"))
    tokenizer = Tokenizer.from_file(str(laboratory.model / "tokenizer.json"))
    saes = _saes(laboratory, method, seed)
    z = (sm.Boosting(saes) if method == "boosting" else sm.Bagging(saes)).encode(x, scaled=False).detach().double().numpy()
    rows = _table(laboratory, seed).filter(method=method)
    of_windows = np.zeros((*kept.shape, z.shape[1]))
    of_windows[kept] = z
    inputs = np.full((*kept.shape, x.shape[1]), np.nan, np.float32)
    inputs[kept] = x.numpy()
    shown = 0
    for i, row in enumerate(rows.iter_rows(named=True)):
        peaks = of_windows[:, :, i].max(axis=1)
        order = [window for window in np.argsort(-peaks, kind="stable")[:CONTEXTS] if peaks[window] > 0]
        contexts = json.loads(row["contexts"])
        assert len(contexts) == len(order)
        fired = z[:, i][z[:, i] > 0]
        if not order:
            assert (row["max_activation"], row["bin_width"], sum(json.loads(row["histogram"]))) == (None, None, 0)
            continue
        assert row["max_activation"] == pytest.approx(fired.max(), rel=1e-5)
        assert sum(json.loads(row["histogram"])) == len(fired)
        assert len({(context["document"], context["position"]) for context in contexts}) == len(contexts)
        for context, in_order in zip(contexts, order, strict=True):
            (window,) = np.flatnonzero(((document == context["document"]) & (position == context["position"])).any(axis=1))
            at = int(of_windows[window, :, i].argmax())
            if window != in_order:  # only a token with the same activations may take the place of another
                np.testing.assert_array_equal(inputs[window, at], inputs[in_order, of_windows[in_order, :, i].argmax()])
            around = [p for p in range(max(0, at - RADIUS), min(CONTEXT_LENGTH, at + RADIUS + 1)) if document[window, p] >= 0]
            assert context["tokens"] == [tokenizer.decode([tokens[window, p]]) for p in around]
            assert context["centre"] == around.index(at)
            assert (context["document"], context["position"]) == (document[window, at], position[window, at])
            expected = [of_windows[window, p, i] if kept[window, p] else None for p in around]
            assert [value is None for value in context["activations"]] == [value is None for value in expected]
            np.testing.assert_allclose(np.array(context["activations"], float), np.array(expected, float), rtol=1e-3)
            shown += 1
    assert shown > 100


def test_output_tokens_have_the_largest_logits_of_the_decoder_direction(laboratory: Laboratory):
    head: Any = AutoModelForCausalLM.from_pretrained(laboratory.model, dtype=torch.float32).get_output_embeddings()
    tokenizer = Tokenizer.from_file(str(laboratory.model / "tokenizer.json"))
    characters = [
        chr(code) for code in [*range(0x80, 0x800), *range(0x800, 0xD800, 64), *range(0xE000, 0x10000, 64), *range(0x10000, 0x110000, 4096)]
    ]
    of_byte = {token: byte for each in characters for token, byte in zip(tokenizer.encode(each).ids, each.encode(), strict=True)}
    seed = SEEDS[1]
    directions = torch.cat([sae.W_dec for sae in _saes(laboratory, "boosting", seed)])
    with torch.no_grad():
        logits = head(directions).double().numpy()
    for row, of_feature in zip(_table(laboratory, seed).filter(method="boosting").iter_rows(named=True), logits, strict=True):
        order = np.argsort(of_feature)
        for column, ids in (("promoted_tokens", order[::-1][:OUTPUT_TOKENS]), ("suppressed_tokens", order[:OUTPUT_TOKENS])):
            found = json.loads(row[column])
            assert [value for _, value in found] == pytest.approx(of_feature[ids], abs=1e-3)
            for (text, _), token in zip(found, ids.tolist(), strict=True):
                alone = tokenizer.decode([token], skip_special_tokens=False)
                if alone == "\ufffd":  # a byte above 127, of which tokens of one byte have those that UTF-8 never has, too
                    assert text == f"<0x{of_byte[token]:02X}>" if token in of_byte else re.fullmatch("<0x(C0|C1|F[5-9A-F])>", text), text
                else:
                    assert text == alone


def test_a_model_without_a_head_has_no_output_tokens(empty: Laboratory, tmp_path):
    folder = tmp_path / "headless"
    model: Any = AutoModelForCausalLM.from_pretrained(empty.model)
    model.base_model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((empty.model / "tokenizer.json").read_bytes())
    edit_config(folder, architectures=["GPTNeoXModel"])
    empty.declare({"language_model": str(folder)}, **SMALL)
    empty.run()
    table = _table(empty, 1)
    assert set(table["promoted_tokens"]) == set(table["suppressed_tokens"]) == {"[]"}
    assert table["max_activation"].null_count() < len(table)


def test_a_hook_outside_the_residual_stream_has_no_output_tokens(empty: Laboratory):
    empty.declare({"hook": "gpt_neox.layers.{layer}.attention.dense"}, **SMALL)
    empty.run()
    assert set(_table(empty, 1)["promoted_tokens"]) == {"[]"}


def test_hostile_text_and_whitespace_are_stored_unchanged(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    text = '<script>"\\\n\t </script>&amp;'
    monkeypatch.setattr(CORPUS, "test", [text] * 12)
    empty.declare(**SMALL)
    empty.run()
    contexts = [context for row in _table(empty, 1)["contexts"] for context in json.loads(row)]
    assert contexts
    assert all("".join(context["tokens"]) in text for context in contexts)
    assert {"<", '"', "\\", "\n", "\t", "&"} <= {token for context in contexts for token in context["tokens"]}


def test_contexts_are_partitioned_by_layer_and_seed_and_off_by_default(empty: Laboratory):
    assert "tiny/eval/contexts" not in empty.declarations()
    empty.declare(evaluations=["contexts"])
    (spec,) = [s for s in empty.catalogue.definitions().resolve_all_asset_specs() if s.key == dg.AssetKey([NAME, "eval", "contexts"])]
    assert isinstance(spec.partitions_def, dg.MultiPartitionsDefinition)
    assert {dep.asset_key.path[-1] for dep in spec.deps} == {"tokens", "activations", "bagging_ensemble", "boosting_ensemble"}


def test_column_lineage_of_contexts_points_to_text_and_language_model(empty: Laboratory):
    empty.declare(evaluations=["contexts"])
    found = column_lineage(empty.declarations()["tiny/eval/contexts"]).deps_by_column
    sources = {
        column: {(dep.asset_key.path[-1], dep.column_name) for dep in deps if dep.asset_key.path[0] == NAME}
        for column, deps in found.items()
    }
    assert {("tokens", "test/tokens"), ("activations", "test/activations")} <= sources["contexts"]
    assert ("activations", "language_model") in sources["promoted_tokens"]
    assert ("tokens", "test/tokens") not in sources["promoted_tokens"]


def test_contexts_of_another_seed_are_computed_separately(empty: Laboratory):
    empty.declare(**SMALL)
    empty.run()
    before = empty.artefact("eval/contexts", 1).data_version
    empty.declare(**SMALL | {"ensemble": {"members": 1, "seeds": [1, 2]}})
    states = {status.partition.seed: status.state for status in status_of(NAME) if status.declaration.address.name == "contexts"}
    assert states == {1: "fresh", 2: "missing"}
    empty.run()
    assert empty.artefact("eval/contexts", 1).data_version == before


@pytest.mark.parametrize("n_rows", [7, 64, 1000])
def test_places_map_rows_to_their_tokens(laboratory: Laboratory, n_rows: int):
    path = laboratory.artefact("tokens", layer=None).path
    stored: Any = zarr.open_group(path, mode="r")["test"]
    places = list(open_tokens(path).places("test", n_rows))
    assert {len(part) for part in places[:-1]} <= {n_rows}
    kept = stored["kept"][:]
    assert np.concatenate(places).tolist() == np.flatnonzero(kept).tolist()
    around = open_tokens(path).around("test", np.concatenate(places), 2)
    assert around.tokens[:, 2].tolist() == stored["tokens"][:][kept].tolist()
    assert around.tokens.max() < VOCAB_SIZE
