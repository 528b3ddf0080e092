"""`corpus: builtin/prose`: sentences of the installed packages, and nothing else."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import polars as pl
import pytest
from test_corpora import Shelf
from tiny_experiment import Laboratory

from saeens_pipeline.language_models import installed_prose
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.installed_prose import InstalledProse, prose_of
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.storage.names import Partition

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it rests for a while in the shade of a tree."
OTHER = "Nobody had expected that the river would rise so quickly after only two days of rain in the hills."


def _module(*docstrings: str) -> str:
    functions = "\n\n".join(f'def f{i}():\n    """{text}"""\n' for i, text in enumerate(docstrings))
    return f"import os\n\n{functions}"


@pytest.mark.parametrize(
    "paragraph",
    [
        ">>> first(1, 2, 3)\nThe doctest above prints a number that nobody needs to know about.",
        "| column | meaning of the column | unit of the column | default value of the column |",
        "Too short to be a sentence.",
        "x_1, x_2, x_3, x_4 = f(1.0, 2.0, 3.0, 4.0), g(5, 6, 7), h(8, 9, 10), 11, 12, 13, 14.",
        "a list of many words without an end that reads as a heading or as a row of names",
        "Parameters\n----------",
    ],
)
def test_what_is_no_sentence_is_left_out(paragraph: str):
    assert list(prose_of(f"{SENTENCE}\n\n{paragraph}\n\n{OTHER}")) == [SENTENCE, OTHER]


def test_lines_of_a_paragraph_are_joined():
    assert list(prose_of("\r\n".join(SENTENCE.split(", ")).replace("\r\n", ",\r\n   "))) == [SENTENCE]


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    monkeypatch.setattr(installed_prose, "PACKAGES", ("one",))
    return Shelf(tmp_path, monkeypatch)


def test_a_document_is_the_prose_of_one_file(shelf: Shelf):
    long = f"{SENTENCE}\n\n    {OTHER}\n\n    >>> 1 + 1\n    2"
    files = {
        "one/a.py": _module(long, "Too short.", long.replace("fox", "cat")),
        "one/guide.md": f"# Guide\n\n{OTHER}\n\n{SENTENCE}\n\n```\n{SENTENCE}\n```\n\n{OTHER.replace('rain', 'snow')}",
        "one/LICENSE.txt": f"{SENTENCE} {OTHER} {SENTENCE}",
        "one/broken.py": f'"""{SENTENCE} {OTHER} {SENTENCE}"""\ndef (',
        "one/latin.py": b'"""\xe9' + (SENTENCE * 3).encode() + b'"""',
        "one/data.json": f'"{SENTENCE} {OTHER} {SENTENCE}"',
    }
    shelf.install("one", files, readme=f"{OTHER}\n\n{SENTENCE}\n\n{OTHER.replace('two', 'three')}")
    found = {document.name: document for document in InstalledProse().package_documents("one")}
    assert {name: document.labels["kind"] for name, document in found.items()} == {
        "one/one/a.py": "docstrings", "one/one/guide.md": "text", "one/one.dist-info/METADATA": "description",
    }  # fmt: skip
    assert found["one/one/a.py"].text.split("\n\n") == [SENTENCE, OTHER, SENTENCE.replace("fox", "cat"), OTHER]
    assert found["one/one/guide.md"].text.split("\n\n") == [OTHER, SENTENCE, OTHER.replace("rain", "snow")]


def test_a_package_and_a_document_are_bounded(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installed_prose, "MAX_PACKAGE_CHARACTERS", 1000)
    monkeypatch.setattr(installed_prose, "MAX_DOCUMENT_CHARACTERS", 400)
    shelf.install(
        "one", {f"one/{i}.py": _module(f"{SENTENCE}\n\n    {OTHER}\n\n    {SENTENCE} {OTHER}\n\n    {OTHER} {i}.") for i in range(20)}
    )
    found = [document.text for document in InstalledProse().package_documents("one")]
    assert all(0 < len(text) <= 400 for text in found)
    assert sum(map(len, found)) - len(found[-1]) < 1000 <= sum(map(len, found))


# real packages


def test_the_project_installs_every_package_of_the_corpus():
    assert len(set(installed_prose.PACKAGES)) == len(installed_prose.PACKAGES)
    assert all(metadata.version(package) for package in installed_prose.PACKAGES)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> InstalledProse:
    monkeypatch.setattr(installed_prose, "PACKAGES", ("anyio", "click", "filelock", "humanfriendly", "packaging", "structlog", "uvicorn"))
    monkeypatch.setattr("saeens_pipeline.language_models.installed_packages.TEST_SHARE", 0.3)
    return InstalledProse()


def test_splits_share_no_document_and_hold_sentences(small: InstalledProse):
    train, test = (list(small.documents(split)) for split in ("train", "test"))
    assert len(train) > len(test) > 3
    assert not {document.name for document in train} & {document.name for document in test}
    for document in (*train, *test):
        assert 200 <= len(document.text) <= 24_000
        assert all(len(paragraph.split()) >= 8 and ">>>" not in paragraph[:3] for paragraph in document.text.split("\n\n"))


def test_texts_and_identity_are_kept_in_the_data_root(small: InstalledProse, tmp_path: Path):
    kept = PinnedPackages(tmp_path, InstalledProse)
    assert list(kept.documents("test")) == list(small.documents("test"))
    assert (tmp_path / "corpora" / "prose" / "documents.parquet").is_file()
    assert kept.identity["corpus"] == "builtin/prose"
    assert kept.identity["texts"]
    assert open_corpus("builtin/prose") == PinnedPackages(open_corpus("builtin/prose").root, InstalledProse)  # pyright: ignore[reportAttributeAccessIssue]


def test_a_source_of_prose_has_kinds_as_labels(small: InstalledProse, empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("saeens_pipeline.assets.sources.open_corpus", open_corpus)
    empty.declare({"corpus": "builtin/prose"})
    empty.run(select=["tokens"])
    tokens = empty.store.require(empty.declarations()["tiny/tokens"].address, Partition())
    assert tokens.recipe["settings"]["corpus"]["corpus"] == "builtin/prose"
    documents = pl.read_parquet(next(tokens.path.rglob("documents.parquet")))
    assert set(documents["kind"]) <= {"docstrings", "text", "description"}
