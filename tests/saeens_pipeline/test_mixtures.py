"""Corpora that mix several: shares, documents, recipes and records, and errors of settings and of corpora that are too short."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from tiny_experiment import Laboratory, status_of
from tiny_models import ListedCorpus, write_tiny_model

from saeens_pipeline.assets import sources
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import caching, corpora
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.mixtures import MixedCorpus, Part
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import open_tokens, write_tokens
from saeens_pipeline.settings.corpora import Corpus, corpus_name, parts_of, shares_of
from saeens_pipeline.storage.names import Partition

SPLITS: tuple[Split, ...] = ("train", "test")
WINDOW = 8


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> LanguageModelDescription:
    return describe_language_model(str(write_tiny_model(tmp_path_factory.mktemp("models") / "model")))


def _mixed(weights: Sequence[float], texts: Sequence[tuple[Sequence[str], Sequence[str]]]) -> MixedCorpus:
    parts = [Part(f"c{i}", w / sum(weights), ListedCorpus(*t)) for i, (w, t) in enumerate(zip(weights, texts, strict=True))]
    return MixedCorpus("mixed", parts)


def _write(path: Path, corpus: MixedCorpus, description: LanguageModelDescription, **changes: Any) -> pl.DataFrame:
    """Write tokens; return the split and the corpus of each activation row, in order."""
    given = {"context_length": WINDOW, "packing": "document", "drop": [], "train_tokens": 60, "test_tokens": 30} | changes
    write_tokens(path, corpus, description, **given)
    store, rows = open_tokens(path), []
    for split in SPLITS:
        names = store.documents(split)["corpus"]
        rows += [(split, names[int(i)]) for batch in store.batches(split, 100) for i in batch.document[batch.kept]]
    return pl.DataFrame(rows, ["split", "corpus"], orient="row")


def _texts(corpus: int, lengths: Sequence[int]) -> tuple[list[str], list[str]]:
    """Different texts of these lengths, enough of them for any share."""
    n = 220  # one window of at least one row each is enough
    train, test = (
        [f"{corpus}{split}{i:04}"[:9].ljust(lengths[i % len(lengths)], chr(97 + corpus)) for i in range(n)] for split in ("a", "b")
    )
    return train, test


# shares


WINDOWS = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(["document", "concatenate"]),
        "drop": st.lists(st.sampled_from(["first", "special"]), unique=True),
        "prepend_bos": st.booleans(),
        "windows_per_document": st.sampled_from([None, 1, 2]),
    }
).map(lambda given: given | ({} if given["packing"] == "document" else {"windows_per_document": None}))


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.sampled_from([0.1, 0.5, 1, 2, 3, 7.5]), min_size=2, max_size=4),
    lengths=st.lists(st.lists(st.integers(9, 70), min_size=1, max_size=4), min_size=4, max_size=4),
    windows=WINDOWS,
)
def test_no_corpus_exceeds_its_share_by_more_than_a_window(description, weights, lengths, windows):
    wanted = {"train": 200, "test": 90}
    corpus = _mixed(weights, [_texts(i, lengths[i]) for i in range(len(weights))])
    with tempfile.TemporaryDirectory() as folder:
        rows = _write(Path(folder) / "t", corpus, description, **windows, train_tokens=wanted["train"], test_tokens=wanted["test"])
    for split, n in wanted.items():
        counted = Counter(rows.filter(pl.col("split") == split)["corpus"])
        assert sum(counted.values()) == n
        for i, weight in enumerate(weights):
            share = n * weight / sum(weights)
            assert share - WINDOW * (len(weights) - 1) <= counted[f"c{i}"] <= share + WINDOW
        recorded = corpus.composition()[split]
        assert {name: each["rows"] for name, each in recorded.items()} == {f"c{i}": counted[f"c{i}"] for i in range(len(weights))}


def test_one_long_document_does_not_take_the_share_of_others(description: LanguageModelDescription, tmp_path: Path):
    long, short = ["x" * 5000], [f"short text {i}" for i in range(40)]
    rows = _write(tmp_path / "t", _mixed([1, 3], [(long, ["y" * 5000]), (short, [f"held out {i}" for i in range(40)])]), description)
    counted = Counter(rows.filter(pl.col("split") == "train")["corpus"])
    assert abs(counted["c0"] - 15) <= WINDOW


@pytest.mark.parametrize("packing", ["document", "concatenate"])
def test_windows_hold_documents_of_one_corpus_in_the_order_of_the_corpus(description, tmp_path: Path, packing: str):
    corpus = _mixed([2, 1], [_texts(0, [5, 11]), _texts(1, [20])])
    _write(tmp_path / "t", corpus, description, packing=packing)
    store = open_tokens(tmp_path / "t")
    documents = store.documents("train")
    for batch in store.batches("train", 1):
        (window,) = batch.document
        assert documents["corpus"].gather(window[window >= 0].tolist()).n_unique() == 1
    for name in ("c0", "c1"):
        numbers = [int(each.split("-")[1]) for each in documents.filter(pl.col("corpus") == name)["name"]]
        assert numbers == list(range(len(numbers)))


def test_the_same_settings_give_the_same_bytes(description: LanguageModelDescription, tmp_path: Path):
    stored = []
    for run in ("a", "b"):
        _write(tmp_path / run, _mixed([1, 2.5], [_texts(0, [30, 9]), _texts(1, [17])]), description)
        stored.append({f.relative_to(tmp_path / run): f.read_bytes() for f in sorted((tmp_path / run).rglob("*")) if f.is_file()})
    assert stored[0] == stored[1]


def test_labels_of_all_corpora_are_columns_and_null_where_a_corpus_has_none(tmp_path: Path, description: LanguageModelDescription):
    for name, field in (("a", "kind"), ("b", "topic")):
        lines = [json.dumps({"text": f"{name} number {i}", field: f"{field} {i % 2}"}) + "\n" for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    entries = [{"corpus": f"{tmp_path}/{n}.jsonl", "label_fields": [f], "test_share": 0.4} for n, f in (("a", "kind"), ("b", "topic"))]
    corpus = corpora.open_corpus(TypeAdapter(Corpus).validate_python(entries))
    assert isinstance(corpus, MixedCorpus)
    _write(tmp_path / "t", corpus, description)
    documents = open_tokens(tmp_path / "t").documents("train")
    assert documents.columns == ["document", "name", "corpus", "kind", "topic"]
    of_a = documents["corpus"] == f"{tmp_path}/a.jsonl"
    assert (documents["kind"].is_null() == ~of_a).all()
    assert (documents["topic"].is_null() == of_a).all()
    chosen = open_tokens(tmp_path / "t").documents_with("train", {"corpus": [f"{tmp_path}/b.jsonl"]})
    np.testing.assert_array_equal(chosen, documents.filter(~of_a)["document"])


def test_a_text_is_in_one_corpus_and_one_split(description: LanguageModelDescription, tmp_path: Path):
    own = [[f"own text {i} of {corpus}" for i in range(20)] for corpus in (0, 1)]
    both = [f"text {i} that both have" for i in range(10)]
    corpus = _mixed([1, 1], [([*both, *own[0]], [f"held out {i}" for i in range(20)]), ([*both, *own[1]], [*both, *own[0], *own[1]])])
    with pytest.raises(SaeensError, match=r"c1 ends before its share of the test split .* without [\d,]+ texts that were read before"):
        _write(tmp_path / "t", corpus, description, train_tokens=400)
    corpus = _mixed([1, 1], [([*both, *own[0]], [*both, *(f"held out {i}" for i in range(20))]), ([*both, *own[1]], own[0] + ["new"] * 30)])
    _write(tmp_path / "u", corpus, description, train_tokens=400, test_tokens=4)
    documents = pl.concat([open_tokens(tmp_path / "u").documents(split).with_columns(split=pl.lit(split)) for split in SPLITS])
    read = {(f"c{i}", split): getattr(part.corpus, split) for i, part in enumerate(corpus.parts) for split in SPLITS}
    texts = [read[row["corpus"], row["split"]][int(row["name"].split("-")[1])] for row in documents.iter_rows(named=True)]
    assert len(set(texts)) == len(texts)
    assert set(both) <= set(texts)
    assert sum(each.get("repeated_texts", 0) for each in corpus.composition()["train"].values()) == len(both)


# too short


@pytest.mark.parametrize("split", SPLITS)
def test_a_corpus_that_ends_is_named_with_its_rows_and_what_helps(description: LanguageModelDescription, tmp_path: Path, split: Split):
    def corpus() -> MixedCorpus:
        short = [f"text {i:02}" for i in range(4)]  # 28 rows
        long = [f"a much longer text {i:03}" for i in range(40)]
        other = [f"and another one {i:03}" for i in range(40)]
        return _mixed([1, 3], [(short, other) if split == "train" else (other, short), (long, [each + "!" for each in long])])

    message = (
        rf"^corpus: c0 ends before its share of the {split} split is reached: it has 28 activation rows, and 0\.25 of 200 rows are 50: "
        rf"lower `{split}_tokens` to at most 112, lower its weight, or give it more texts$"
    )
    with pytest.raises(SaeensError, match=message):
        _write(tmp_path / "t", corpus(), description, **{f"{split}_tokens": 200})
    _write(tmp_path / "u", corpus(), description, **{f"{split}_tokens": 112})
    with pytest.raises(SaeensError, match="c0 ends before its share"):
        _write(tmp_path / "v", corpus(), description, **{f"{split}_tokens": 113 + 4 * WINDOW})


def test_an_empty_corpus_is_named(description: LanguageModelDescription, tmp_path: Path):
    with pytest.raises(SaeensError, match=r"corpus: c1 ends .*: it has 0 activation rows, and 0\.5 of 60 rows are 30: lower its"):
        _write(tmp_path / "t", _mixed([1, 1], [_texts(0, [20]), ([], [])]), description)


# settings

SPELLINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a file": ({"corpus": "data/my.jsonl", "text_field": "body"}, {"files": "data/my.jsonl", "text_field": "body", "weight": 1}),
    "a compressed file": ({"corpus": "my.jsonl.zst"}, {"files": "my.jsonl.zst"}),
    "a pattern": ({"corpus": "texts/**/*", "weight": 2}, {"files": "texts/**/*", "weight": 2}),
    "a path": ({"corpus": "./texts"}, {"files": "./texts"}),
    "a data set": ({"corpus": "some-lab/pile", "revision": "v2"}, {"name": "some-lab/pile", "revision": "v2"}),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_corpus_by_its_name_or_path_is_the_same_as_by_its_own_fields(case: str):
    found, expected = (TypeAdapter(Corpus).validate_python([{"corpus": "builtin/prose"}, each]) for each in SPELLINGS[case])
    assert found == expected


def test_names_and_shares_of_corpora():
    entries = [
        {"corpus": "builtin/prose", "weight": 3},
        {"corpus": "a/b", "split": "x", "weight": 0.5},
        {"corpus": "a/b", "split": "y", "weight": 0.5},
    ]
    found = TypeAdapter(Corpus).validate_python(entries)
    assert shares_of(parts_of(found)) == {"builtin/prose": 0.75, "a/b": 0.125, "a/b (2)": 0.125}
    assert corpus_name(found) == "0.75 builtin/prose + 0.125 a/b + 0.125 a/b (2)"


WRONG: dict[str, tuple[Any, str, str]] = {
    "one corpus": ([{"corpus": "builtin/prose"}], r"attributes\.corpus: expected entries, at least 2", "corpus:"),
    "an unknown key": (
        [{"corpus": "builtin/prose"}, {"corpus": "a.jsonl", "tekst": "x"}],
        r"corpus\.1\.tekst: unknown key; one of: text_field, messages_field, .*, corpus, test_files, weight",
        "tekst: x",
    ),
    "a field of files": (
        [{"corpus": "builtin/prose", "text_field": "x"}, {"corpus": "a.jsonl"}],
        r"corpus\.0\.text_field: unknown key; one of: corpus, weight",
        "text_field: x",
    ),
    "no weight": (
        [{"corpus": "builtin/prose"}, {"corpus": "a.jsonl", "weight": 0}],
        r"corpus\.1\.weight: has to be greater than 0",
        "weight: 0",
    ),
    "an unknown corpus": (
        [{"corpus": "builtin/poems"}, {"corpus": "a.jsonl"}],
        r"corpus\.0\.corpus: corpus 'builtin/poems' is not known",
        "- corpus: builtin/poems",
    ),
    "a corpus in a corpus": (
        [{"corpus": {"files": "a"}}, {"corpus": "b.txt"}],
        r"corpus\.0: write the fields of this corpus beside",
        "- corpus:",
    ),
    "a text": (
        ["builtin/prose", {"corpus": "b.txt"}],
        r"corpus\.0: an entry of a list has fields: write {corpus: builtin/prose, weight: 1}",
        "- builtin/prose",
    ),
    "twice": (
        [{"corpus": "a.jsonl"}, {"files": "a.jsonl", "weight": 2}],
        r"attributes\.corpus: a\.jsonl is given twice: give it once",
        "corpus:",
    ),
    "a taken label": (
        [{"corpus": "builtin/prose"}, {"corpus": "a.jsonl", "label_fields": ["corpus"]}],
        r"attributes\.corpus: label_fields of a\.jsonl: 'corpus' is the name of another column",
        "corpus:",
    ),
    "one split": (
        [{"corpus": "builtin/prose"}, {"corpus": "a/b", "test_split": "train"}],
        r"corpus\.1: split and test_split are both train",
        "- corpus: a/b",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_named_by_file_line_and_field(empty: Laboratory, case: str):
    corpus, message, line = WRONG[case]
    file = empty.declare({"corpus": corpus})
    (complaint,) = empty.catalogue.broken.values()
    lines = [each.strip() for each in file.read_text().splitlines()]
    number = next(i for i, each in enumerate(lines, start=1) if each in (line, f"- {line}"))
    with pytest.raises(ConfigurationError, match=rf"^{file}:{number}: .*{message}"):
        raise ConfigurationError(complaint)


# from files to tables


def _mix(laboratory: Laboratory, **of_first: Any) -> Path:
    first = {"corpus": "a.jsonl", "test_share": 0.4, "weight": 3, **of_first}
    entries = [first, {"files": "b.jsonl", "text_field": "body", "test_share": 0.4}]
    file = laboratory.declare({"corpus": entries})
    for name, field in (("a", "text"), ("b", "body")):
        lines = [json.dumps({field: f"{name}: text number {i}, which is about {i * 7 % 13}."}) + "\n" for i in range(120)]
        (file.parent / f"{name}.jsonl").write_text("".join(lines))
    return file


def test_an_experiment_on_several_corpora_records_what_it_took_from_each(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    file = _mix(empty)
    assert not empty.catalogue.broken
    event = empty.materialise(["tiny/tokens"], Partition())["tiny/tokens"]
    tokens = empty.artefact("tokens", layer=None)
    recipe = tokens.recipe["settings"]["corpus"]
    assert recipe["corpus"] == "0.75 a.jsonl + 0.25 b.jsonl"
    assert [(each["name"], each["share"], each["identity"]["text_field"]) for each in recipe["parts"]] == [
        ("a.jsonl", 0.75, "text"),
        ("b.jsonl", 0.25, "body"),
    ]
    documents = open_tokens(tokens.path)
    for split in SPLITS:
        found = tokens.provenance["composition"][split]
        of_split = documents.documents(split)["corpus"]
        assert {name: each["documents"] for name, each in found.items()} == dict(of_split.value_counts().iter_rows())
        assert abs(found["a.jsonl"]["rows"] - 0.75 * {"train": 600, "test": 200}[split]) <= 16
        assert len({each["hash"] for each in found.values()}) == 2
    shown = {key: each.value for key, each in event.metadata.items()}
    assert shown["train rows of a.jsonl"] == f"{tokens.provenance['composition']['train']['a.jsonl']['rows']:,} of " + (
        f"{tokens.provenance['composition']['train']['a.jsonl']['documents']:,} documents"
    )
    states = {each.declaration.address.name: each.state for each in status_of()}
    assert states["tokens"] == "fresh"
    (file.parent / "b.jsonl").write_text((file.parent / "b.jsonl").read_text() + '{"body": "more"}\n')
    assert {each.state for each in status_of() if each.declaration.address.name == "tokens"} == {"stale"}


def test_a_corpus_that_ends_does_so_before_activations_are_computed(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    monkeypatch.setattr(caching, "cache_activations", lambda *_, **__: pytest.fail("activations were computed"))
    file = _mix(empty)
    (file.parent / "b.jsonl").write_text("".join(json.dumps({"body": f"short {i}"}) + "\n" for i in range(10)))
    with pytest.raises(SaeensError, match=r"corpus: b\.jsonl ends before its share of the train split is reached"):
        empty.run(select=["activations"])


def test_a_wrong_file_is_named_with_the_line_of_its_entry(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    file = _mix(empty)
    (file.parent / "b.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=rf"corpus: there is no file b\.jsonl in {file.parent}"):
        empty.run()
    _mix(empty, text_field="nothing")
    with pytest.raises(SaeensError, match=r"a\.jsonl:1: there is no field 'nothing'; there are: text"):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))
