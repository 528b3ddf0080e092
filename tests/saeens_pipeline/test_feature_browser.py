"""The feature browser: its files have the tables' values, no text becomes script, and missing tables are left out or named."""

from __future__ import annotations

import base64
import gzip
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory, remake_reports
from tiny_models import D_MODEL

from saeens_pipeline.assets.registry import fills, table_frame
from saeens_pipeline.language_models.autointerp.endpoint import URL_VARIABLE
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.report.pages import what_makes_contexts
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Recipe

D_SAE = 2 * D_MODEL
N = 2 * MEMBERS * D_SAE
HOSTILE = '</script><script>alert("x")</script>");alert("y");//'


@pytest.fixture(scope="module")
def made(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment with both tables of single features."""
    home = tmp_path_factory.mktemp("feature_browser")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(evaluations=["features", "contexts"], baselines=["expanded"])
        laboratory.run()
    return laboratory


@pytest.fixture
def laboratory(made: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laboratory:
    """A copy whose tables may be changed."""
    copied = Laboratory(made.model, made.folder, tmp_path / "data")
    shutil.copytree(made.root, copied.root)
    copied.activate(monkeypatch)
    return copied


def _report(laboratory: Laboratory) -> Path:
    return laboratory.root / "reports" / NAME / f"layer={LAYER}"


def _rows(laboratory: Laboratory, seed: int = SEEDS[0]) -> pl.DataFrame:
    rows = pl.read_parquet(_part(laboratory, "features"), hive_partitioning=False)
    return rows.filter(pl.col("method").is_in(["bagging", "boosting"]), seed=seed).sort("method", "member", "index")


def _part(laboratory: Laboratory, table: str, seed: int | None = None) -> Path:
    return laboratory.root / Address(NAME, "eval", table).path(Partition(LAYER, seed))


def _unpacked(file: Path) -> Any:
    found = re.fullmatch(r'saeensFeatures\("([a-z0-9]+)","([A-Za-z0-9+/=]*)"\);\n', file.read_text())
    assert found and found[1] == file.stem
    return json.loads(gzip.decompress(base64.b64decode(found[2])))


def _list(laboratory: Laboratory) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    header = _unpacked(_report(laboratory) / "features" / "list.js")
    columns = header.pop("columns")
    assert {len(column) for column in columns.values()} == {sum(count for _, _, count in header["groups"])}
    return header, columns


def _details(laboratory: Laboratory) -> list[dict[str, Any]]:
    """Return the details of every feature, with tokens as text."""
    found: list[dict[str, Any]] = []
    for number in range(len(list((_report(laboratory) / "features").glob("[0-9]*.js")))):
        shard = _unpacked(_report(laboratory) / "features" / f"{number}.js")
        for each in shard["features"]:
            for context in each.get("contexts", ()):
                context["tokens"] = [shard["tokens"][token] for token in context["tokens"]]
            for name in ("promoted", "suppressed"):
                for pair in each.get(name, ()):
                    pair[0] = shard["tokens"][pair[0]]
            found.append(each)
    return found


def _change(part: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    """Change the lists in a column of JSON."""
    rows = pl.read_parquet(part, hive_partitioning=False)
    texts = [json.dumps(change(json.loads(text))) for text in rows[column]]
    rows.with_columns(pl.Series(column, texts)).write_parquet(part)


def test_the_feature_list_has_the_numbers_of_the_table(made: Laboratory):
    header, columns = _list(made)
    rows = _rows(made)
    assert (header["experiment"], header["layer"], header["seed"], header["otherSeeds"]) == (NAME, LAYER, SEEDS[0], list(SEEDS[1:]))
    assert header["groups"] == [[method, j, D_SAE] for method in ("bagging", "boosting") for j in range(1, MEMBERS + 1)]
    assert len(rows) == N
    for name, column in {
        "member": "member",
        "index": "index",
        "density": "density",
        "mean": "mean_activation",
        "near": "nearest_cosine",
        "nearMember": "nearest_member",
        "seed": "nearest_other_seed_cosine",
        "otherSeed": "nearest_other_seed",
        "seedMember": "nearest_other_seed_member",
        "seedIndex": "nearest_other_seed_index",
    }.items():
        assert [value is None for value in columns[name]] == rows[column].is_null().to_list()
        np.testing.assert_allclose(np.array(columns[name], float), rows[column].to_numpy(), rtol=1e-6, err_msg=name)
    matches = [{member: index for member, index, _ in json.loads(text)} for text in rows["matches"]]
    assert columns["nearIndex"] == [of[member] for of, member in zip(matches, rows["nearest_member"], strict=True)]
    assert [[header["vocabulary"][i] for i in of] for of in columns["tokens"]] == [json.loads(text) for text in rows["top_tokens"]]


def test_with_contexts_no_note_reports_them_missing(made: Laboratory):
    assert _list(made)[0]["missingContexts"] == ""
    assert 'id="contexts"' not in (_report(made) / "features.html").read_text()


def test_feature_details_equal_those_of_the_tables(made: Laboratory):
    contexts = pl.read_parquet(_part(made, "contexts", SEEDS[0]), hive_partitioning=False)
    rows = _rows(made).join(contexts, on=["method", "member", "index"], how="left", maintain_order="left")
    found = _details(made)
    assert len(found) == len(rows) == N
    for each, row in zip(found, rows.iter_rows(named=True), strict=True):
        assert each["matches"] == json.loads(row["matches"])
        assert (each["histogram"], each["binWidth"]) == (json.loads(row["histogram"]), row["bin_width"])
        assert each["max"] == (row["max_activation"] and pytest.approx(row["max_activation"], rel=5e-3))
        expected = json.loads(row["contexts"])
        assert [{**c, "activations": None} for c in each["contexts"]] == [{**c, "activations": None} for c in expected]
        for context, other in zip(each["contexts"], expected, strict=True):
            assert [value is None for value in context["activations"]] == [value is None for value in other["activations"]]
            np.testing.assert_allclose(np.array(context["activations"], float), np.array(other["activations"], float), rtol=5e-3)
        for name in ("promoted", "suppressed"):
            logits = json.loads(row[f"{name}_tokens"])
            assert [token for token, _ in each[name]] == [token for token, _ in logits]
            assert [logit for _, logit in each[name]] == pytest.approx([logit for _, logit in logits], rel=5e-3)


def test_shards_have_the_requested_size(laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    before = _details(laboratory)
    monkeypatch.setattr("saeens_pipeline.report.feature_browser.SHARD_FEATURES", 50)
    remake_reports(laboratory)
    assert _list(laboratory)[0]["shardFeatures"] == 50
    assert len(list((_report(laboratory) / "features").glob("[0-9]*.js"))) == -(-N // 50)
    assert _details(laboratory) == before


def test_the_report_links_to_the_feature_browser_and_no_resource_is_external(made: Laboratory):
    index = (_report(made) / "index.html").read_text()
    assert index.count('href="features.html"') == 3  # in the bar, at the top, and in its section
    assert f"All {N:,} features of both ensembles, seed {SEEDS[0]}" in index
    page = (_report(made) / "features.html").read_text()
    loaded = re.findall(r'(?:src|rel="stylesheet" href)="([^"]*)"', page)
    assert "static/features.js" in loaded
    assert all((_report(made) / each).is_file() for each in loaded)
    assert "plotly" not in page and "://" not in page
    assert "innerHTML" not in (_report(made) / "static" / "features.js").read_text()


def test_token_text_cannot_become_script(laboratory: Laboratory):
    _change(_part(laboratory, "features"), "top_tokens", lambda tokens: [HOSTILE, *tokens[1:]])
    contexts = _part(laboratory, "contexts", SEEDS[0])
    _change(contexts, "contexts", lambda found: [each | {"tokens": [HOSTILE, *each["tokens"][1:]]} for each in found])
    _change(contexts, "promoted_tokens", lambda tokens: [[HOSTILE, 1.0], *tokens])
    remake_reports(laboratory)
    header, _ = _list(laboratory)  # which checks what the files consist of
    assert HOSTILE in header["vocabulary"]
    assert any(HOSTILE in context["tokens"] for each in _details(laboratory) for context in each["contexts"])
    assert any(HOSTILE in [token for token, _ in each["promoted"]] for each in _details(laboratory))
    assert "alert" not in (_report(laboratory) / "features.html").read_text()
    assert "<script>alert" not in (_report(laboratory) / "index.html").read_text()  # where contexts are escaped


def test_without_contexts_the_list_names_the_command_that_computes_them(laboratory: Laboratory):
    shutil.rmtree(laboratory.root / "tables" / NAME / "contexts")
    remake_reports(laboratory)
    header, columns = _list(laboratory)
    said = f"Contexts are missing: `saeens run {NAME}` computes them."
    assert header["missingContexts"] == said
    assert said.replace(f"`saeens run {NAME}`", f"<code>saeens run {NAME}</code>") in (_report(laboratory) / "features.html").read_text()
    assert len(columns["density"]) == N
    assert all(each.keys() == {"matches"} for each in _details(laboratory))


def test_without_the_table_of_features_there_is_no_feature_browser(laboratory: Laboratory):
    shutil.rmtree(laboratory.root / "tables" / NAME / "features")
    remake_reports(laboratory)
    assert not (_report(laboratory) / "features.html").exists() and not (_report(laboratory) / "features").exists()
    index = (_report(laboratory) / "index.html").read_text()
    assert "features.html" not in index
    assert "<li><code>features</code>" in index


def test_a_table_of_an_earlier_version_is_named(laboratory: Laboratory):
    part = _part(laboratory, "features")
    pl.read_parquet(part, hive_partitioning=False).drop("matches").write_parquet(part)
    remake_reports(laboratory)
    assert not (_report(laboratory) / "features.html").exists()
    assert "is of an earlier version: <code>saeens run tiny</code> computes it again." in (_report(laboratory) / "index.html").read_text()


def test_the_first_declared_seed_with_rows_is_shown(laboratory: Laboratory):
    part = _part(laboratory, "features")
    pl.read_parquet(part, hive_partitioning=False).filter(seed=SEEDS[1]).write_parquet(part)
    remake_reports(laboratory)
    header, columns = _list(laboratory)
    assert (header["seed"], header["otherSeeds"]) == (SEEDS[1], [])
    np.testing.assert_allclose(columns["density"], _rows(laboratory, SEEDS[1])["density"], rtol=1e-6)
    assert f"under seed {SEEDS[1]}" in (_report(laboratory) / "features.html").read_text()


def test_the_experiment_with_contexts_of_the_same_saes_is_named():
    catalogue = Catalogue.load()
    quickstart, full, other = map(catalogue.experiment, ("quickstart", "quickstart_full", "quickstart_random"))
    assert [fills(each, "contexts") for each in (quickstart, full, other)] == [False, True, False]
    assert "`saeens run quickstart_full` computes them for the same SAEs and more; or add" in what_makes_contexts(quickstart, catalogue)
    assert what_makes_contexts(full, catalogue) == "Contexts are missing: `saeens run quickstart_full` computes them."
    assert "same SAEs" not in what_makes_contexts(other, catalogue)


def _with_explanations(laboratory: Laboratory) -> None:
    """Write a table of explanations of the first seed: of two features of boosting's second round, one of them without."""
    part = _part(laboratory, "autointerp", SEEDS[0])
    part.parent.mkdir(parents=True)
    columns: dict[str, Any] = {
        "experiment": NAME,
        "layer": LAYER,
        "seed": SEEDS[0],
        "method": "boosting",
        "n_members": MEMBERS,
        "member": 2,
        "model": "fake",
    }
    scored = {"index": 3, "explanation": HOSTILE, "detection_score": 0.75, "control_score": 0.5, "status": "scored"}
    rows = [columns | scored, columns | {"index": 5, "status": "malformed answer"}]
    table_frame("autointerp", rows).write_parquet(part)


def test_available_explanations_are_shown(laboratory: Laboratory):
    page = _report(laboratory) / "features.html"
    remake_reports(laboratory)
    assert "why" not in _list(laboratory)[0] and "explanation" not in _list(laboratory)[1]
    assert not [text for text in ('data-sort="score"', 'name="explained"', "Explanations.") if text in page.read_text()]
    _with_explanations(laboratory)
    remake_reports(laboratory)
    header, found = _list(laboratory)
    places = {(row["method"], row["member"], row["index"]): i for i, row in enumerate(_rows(laboratory).iter_rows(named=True))}
    at, failed = places["boosting", 2, 3], places["boosting", 2, 5]
    assert [i for i, text in enumerate(found["explanation"]) if text is not None] == [at]
    assert found["explanation"][at] == HOSTILE
    assert (found["score"][at], found["control"][at]) == (0.75, 0.5)
    assert found["score"].count(None) == found["control"].count(None) == N - 1
    assert (found["status"][at], found["status"][failed]) == ("scored", "malformed answer") and found["status"].count(None) == N - 2
    assert header["why"]["malformed answer"] == "no answer that could be read"
    html = page.read_text()
    assert 'data-sort="score"' in html and '<option value="malformed answer">' in html
    assert "Of 2 features that were drawn, fake was asked about 2; 1 is scored. Not scored: 1 (malformed answer" in html


def test_an_empty_table_of_explanations_shows_how_to_configure_an_endpoint(laboratory: Laboratory):
    page = _report(laboratory) / "features.html"
    declaration = Address(NAME, "eval", "autointerp")
    recipe, provenance = Recipe("table", 1, {}, {}), {"autointerp": {"status": "not configured"}}
    laboratory.store.write_table(declaration, Partition(LAYER, SEEDS[0]), recipe, provenance, table_frame("autointerp", []))
    remake_reports(laboratory)
    advice = f"No endpoint was configured. Set <code>{URL_VARIABLE}</code> to the address of a language model"
    assert advice in page.read_text()
    downstream = page.with_name("index.html").read_text().split('<section id="downstream">')[1].split("</section>")[0]
    assert advice in downstream
    assert "explanation" not in _list(laboratory)[1] and 'name="explained"' not in page.read_text()
