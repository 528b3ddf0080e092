"""The report's section on features without a partner in member 1: counts, lists and texts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import safetensors.numpy
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory, remake_reports, write_rows

from saeens_pipeline.assets.registry import table_frame
from saeens_pipeline.report.feature_browser import FeatureBrowser
from saeens_pipeline.report.new_features import Counts, NewFeatures, count, readable
from saeens_pipeline.report.results import Results
from saeens_pipeline.storage.names import Address, Partition

SUBJECT = {"experiment": "e", "layer": 0, "language_model": "trained", "n_members": 3, "sae_data_versions": "v"}


def _matches(member: int, cosine: float, others: dict[int, tuple[int, float]] | None = None) -> str:
    """The column `matches`: a cosine to member 1, and index and cosine in other members."""
    found = {each: (0, 0.1) for each in (1, 2, 3) if each != member} | {1: (7, cosine)} | (others or {})
    return json.dumps([[each, *of] for each, of in sorted(found.items()) if each != member])


def _feature(method: str, member: int, index: int, cosine: float, seed: int = 1, **values: Any) -> dict[str, Any]:
    others = values.pop("others", None)
    row = {"density": 0.1, "mean_activation": 1.0, "nearest_cosine": cosine, "nearest_other_seed_cosine": 0.5, "top_tokens": '["a"]'}
    matches = None if member == 1 and others is None else _matches(member, cosine, others)
    return SUBJECT | row | {"method": method, "member": member, "index": index, "seed": seed, "matches": matches} | values


def _results(rows: list[dict[str, Any]], **tables: pl.DataFrame) -> Results:
    return Results("e", 0, {"features": table_frame("features", rows), **tables})


def _section(rows: list[dict[str, Any]], contexts: pl.DataFrame | None = None, **tables: pl.DataFrame) -> NewFeatures:
    results = _results(rows, **tables)
    others = sorted(set(results.tables["features"]["seed"]) - {1})
    of_seed = results.tables["features"].filter(seed=1).sort("method", "member", "index")
    section = NewFeatures.read(results, None, FeatureBrowser("e", 0, 1, others, of_seed, contexts, None, ""))
    assert section
    return section


def _listed(section: NewFeatures, title: str) -> list[tuple[int, int]]:
    return [(each.member, each.index) for of in section.lists if of.title == title for each in of.features]


def test_features_without_a_partner_are_counted_without_dead_ones_and_without_member_1():
    rows = [_feature("bagging", 1, i, 0.1) for i in range(4)]
    rows += [_feature("bagging", 2, 0, 0.69), _feature("bagging", 2, 1, 0.7), _feature("bagging", 3, 0, 0.2, density=0.0)]
    rows += [_feature("bagging", 3, 1, -0.1), _feature("bagging", 3, 2, 0.99)]
    (counts,) = count(_results(rows))
    assert isinstance(counts, Counts)
    values = [counts.features.mean, counts.of_others.mean, counts.dead.mean, counts.alone.mean]
    assert values == [9, 5, 1, 2]
    assert counts.share and counts.share.mean == 2 / 4


def test_the_control_is_counted_alike_and_belongs_to_its_method():
    results = _results(rows := [_feature("bagging", 1, 0, 0.1), _feature("bagging", 2, 0, 0.1), _feature("boosting", 2, 0, 0.1)])
    untrained = _results([_feature("bagging", 2, i, cosine) for i, cosine in enumerate((0.9, 0.8, 0.1))])
    browser = FeatureBrowser("e", 0, 1, [], table_frame("features", rows), None, None, "")
    section = NewFeatures.read(results, untrained, browser)
    assert section and {name: each.alone.mean for name, each in section.of_control.items()} == {"bagging": 1}
    assert [each.alone.mean for each in section.counts] == [1, 1]


def test_the_reference_is_a_single_sae_of_another_seed_without_its_dead_features():
    rows = [_feature("bagging", 1, i, 0.1, seed=seed, density=0.0 if i == 3 else 0.1) for seed in (1, 2) for i in range(4)]
    rows += [_feature("bagging", 2, 0, 0.1)]
    found = {1: (0.9, 0.6, 0.1, 0.1), 2: (0.9, 0.8, 0.1, 0.1)}
    stability = [
        SUBJECT | {"method": "single", "member": 1, "index": i, "seed": seed, "n_runs": 2, "n_found": 0, "best_cosine": cosine}
        for seed, cosines in found.items() for i, cosine in enumerate(cosines)
    ]  # fmt: skip
    section = _section(rows, feature_stability=table_frame("feature_stability", stability))
    assert section.of_another_seed and section.of_another_seed.points == pytest.approx([2 / 3, 1 / 3])


def test_one_sae_has_no_section():
    assert list(count(_results([_feature("bagging", 1, 0, 0.1), _feature("bagging", 1, 1, 0.1)]))) == []


def test_the_most_stable_are_those_found_in_most_seeds_then_of_the_largest_cosine():
    rows = [_feature("bagging", 2, i, 0.3, nearest_other_seed_cosine=c) for i, c in enumerate((0.9, 0.95, 0.8))]
    rows += [_feature("bagging", 2, 3, 0.8, nearest_other_seed_cosine=1.0), _feature("bagging", 2, 0, 0.3, seed=2)]
    found = [
        SUBJECT | {"method": "bagging", "member": 2, "index": i, "seed": 1, "n_runs": 3, "n_found": n} for i, n in enumerate((1, 1, 2))
    ]
    section = _section(rows, feature_stability=table_frame("feature_stability", found))
    assert _listed(section, "The most stable") == [(2, 2), (2, 1), (2, 0)]
    assert section.lists[0].features[0].seeds == (2, 2)


def test_the_most_surprising_are_rounds_of_boosting_by_density_times_mean_activation():
    rows = [
        _feature("boosting", 2, 0, 0.1, density=0.5, mean_activation=1.0),
        _feature("boosting", 3, 1, 0.1, density=0.1, mean_activation=9),
    ]
    rows += [_feature("bagging", 2, 0, 0.1, density=0.9, mean_activation=9.0), _feature("boosting", 2, 2, 0.9, density=0.9)]
    assert _listed(_section(rows), "The most surprising") == [(3, 1), (2, 0)]


def test_the_most_different_have_all_their_contexts_and_no_partner_in_any_member():
    rows = [_feature("bagging", 2, 0, 0.2), _feature("bagging", 2, 1, 0.1), _feature("bagging", 3, 0, 0.3)]
    rows += [_feature("bagging", 3, 1, 0.1, nearest_cosine=0.8)]
    context = {"document": 0, "position": 3, "centre": 1, "tokens": ["a", " b"], "activations": [0, 1]}
    texts = [(2, 0, 2), (2, 1, 1), (3, 0, 2), (3, 1, 2)]
    contexts = table_frame(
        "contexts",
        [SUBJECT | {"method": "bagging", "member": m, "index": i, "seed": 1, "contexts": json.dumps([context] * n)} for m, i, n in texts],
    )
    assert _listed(_section(rows, contexts), "The most different") == [(2, 0), (3, 0)]


def test_near_duplicates_of_a_listed_feature_are_left_out():
    rows = [_feature("bagging", 2, 0, 0.1), _feature("bagging", 3, 4, 0.2, others={2: (0, 0.75)}), _feature("bagging", 3, 5, 0.3)]
    assert _listed(_section(rows), "The most different") == [(2, 0), (3, 5)]


@pytest.mark.parametrize(
    ("tokens", "centre", "expected"),
    [
        (["The", " cat", " sat"], 1, ["The ", "*cat", " sat"]),
        (["a", "\n\n   ", "b"], 2, ["a ↵ ", "*b"]),
        (["it", "<0xE2><0x80>", "<0x99>", "s"], 3, ["it\u2019", "*s"]),
        (["it", "<0xE2><0x80>", "<0x99>", "s"], 2, ["it", "*\u2019", "s"]),
        (["<0x99>", " cut"], 1, [" ", "*cut"]),
        (["a", "\u202e", "b"], 0, ["*a", "U+202Eb"]),
        (["x", "\n"], 1, ["x ", "*↵", " "]),
    ],
)
def test_contexts_read_as_prose_with_the_firing_token_marked(tokens: list[str], centre: int, expected: list[str]):
    assert [("*" if piece.fires else "") + piece.text for piece in readable(tokens, centre)] == expected


@pytest.fixture(scope="module")
def made(finished_laboratory: Laboratory, tmp_path_factory: pytest.TempPathFactory) -> Laboratory:
    """The tiny experiment with the tables that the section reads."""
    home = tmp_path_factory.mktemp("new_features")
    laboratory = Laboratory(finished_laboratory.model, home / "defs", home / "data")
    with pytest.MonkeyPatch.context() as monkeypatch:
        laboratory.activate(monkeypatch)
        laboratory.declare(evaluations=["features", "contexts", "feature_stability"], baselines=[])
        laboratory.run()
    return laboratory


def _page(laboratory: Laboratory) -> str:
    return (laboratory.root / "reports" / NAME / f"layer={LAYER}" / "index.html").read_text()


def test_counts_of_a_report_equal_those_of_the_decoders(made: Laboratory):
    rows = pl.read_parquet(made.root / Address(NAME, "eval", "features").path(Partition(LAYER)), hive_partitioning=False)
    expected = []
    for seed in SEEDS:
        folder = made.root / "experiments" / NAME / f"layer={LAYER}" / f"seed={seed}" / "bagging"
        decoders = [safetensors.numpy.load_file(folder / f"member_{j}" / "sae_weights.safetensors")["W_dec"] for j in range(1, MEMBERS + 1)]
        first, *others = [W / np.linalg.norm(W, axis=1, keepdims=True) for W in decoders]
        fires = rows.filter(pl.col("member") > 1, seed=seed, method="bagging").sort("member", "index")["density"].to_numpy() > 0
        alone = np.concatenate([(W @ first.T).max(1) for W in others]) < 0.7
        expected.append(int((alone & fires).sum()))
    assert min(expected) > 0
    (bagging, _) = count(Results.read(made.root, NAME, LAYER, SEEDS))
    assert list(bagging.alone.points) == expected
    section = re.search(r'<section id="new">.*?</section>', _page(made), re.DOTALL)
    assert section and f">{np.mean(expected):,.0f}<" in section[0]
    assert "Without a control" in section[0]


def test_a_listed_feature_links_to_its_page_and_shows_its_text(made: Laboratory):
    section = NewFeatures.read(
        results := Results.read(made.root, NAME, LAYER, SEEDS), None, FeatureBrowser.read(made.store, results, list(SEEDS))
    )
    assert section and section.has_contexts and section.lists
    page = _page(made)
    for of in section.lists:
        assert 0 < len(of.features) <= 20
        for each in of.features:
            assert each.partner[1] < 0.7 and each.member > 1 and each.density > 0
            assert f'href="features.html{each.address}"' in page
    assert "<mark>" in page


def test_text_of_a_context_stays_text(made: Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copied = Laboratory(made.model, made.folder, tmp_path / "data")
    shutil.copytree(made.root, copied.root)
    copied.activate(monkeypatch)
    hostile = '<script>alert("x")</script>'
    part = copied.root / Address(NAME, "eval", "contexts").path(Partition(LAYER, SEEDS[0]))
    rows = pl.read_parquet(part, hive_partitioning=False)
    texts = [json.dumps([each | {"tokens": [hostile] * len(each["tokens"])} for each in json.loads(text)]) for text in rows["contexts"]]
    write_rows(copied.store, part, rows.with_columns(pl.Series("contexts", texts)))
    remake_reports(copied)
    page = _page(copied)
    assert hostile not in page and "&lt;script&gt;alert" in page
