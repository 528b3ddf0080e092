"""The corpus of installed packages: split by document, without duplicates across the split, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from tiny_experiment import Laboratory, status_of

from saeens_pipeline.assets import sources
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models import installed_packages as corpora
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.documents import Document, Split
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.language_models.pinned_packages import PinnedPackages
from saeens_pipeline.settings.corpora import Corpus

SMALL = ("click", "filelock", "humanfriendly", "mako", "packaging", "tqdm", "uvicorn")
SPLITS: tuple[Split, ...] = ("train", "test")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> InstalledPackages:
    """A few small packages, and a larger share of them held out."""
    monkeypatch.setattr(corpora, "PACKAGES", SMALL)
    monkeypatch.setattr(corpora, "TEST_SHARE", 0.3)
    return InstalledPackages()


def _distinctive_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 24}


def test_the_project_installs_every_package_of_the_corpus():
    assert len(set(corpora.PACKAGES)) == len(corpora.PACKAGES)
    assert all(metadata.version(package) for package in corpora.PACKAGES)


# real packages


def test_splits_are_disjoint_and_neither_is_empty(small: InstalledPackages):
    names = {split: [document.name for document in small.documents(split)] for split in SPLITS}
    assert all(len(set(of_split)) == len(of_split) > 3 for of_split in names.values())
    assert not set(names["train"]) & set(names["test"])
    assert {name.split("/")[0] for name in names["train"]} == set(SMALL)


def test_order_and_text_are_the_same_at_every_reading(small: InstalledPackages):
    for split in SPLITS:
        assert list(small.documents(split)) == list(small.documents(split)) == list(InstalledPackages().documents(split))


def test_order_and_text_are_the_same_in_every_process(small: InstalledPackages):
    script = f"""
import json
from saeens_pipeline.language_models import installed_packages as corpora
corpora.PACKAGES, corpora.TEST_SHARE = {SMALL}, 0.3
print(json.dumps(corpora.InstalledPackages().summary()))
"""
    environment = os.environ | {"PYTHONHASHSEED": "123"}
    there = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env=environment)
    assert json.loads(there.stdout) == small.summary()


def test_documents_of_one_package_are_spread_over_the_corpus(small: InstalledPackages):
    packages = [document.name.split("/")[0] for document in small.documents("train")]
    first_half = packages[: len(packages) // 2]
    assert all(0.2 < first_half.count(package) / packages.count(package) < 0.8 for package in ("click", "mako"))


def test_no_text_comes_twice(small: InstalledPackages):
    texts = ["".join(document.text.split()) for split in SPLITS for document in small.documents(split)]
    assert len(set(texts)) == len(texts)


def test_test_documents_share_few_lines_with_training_documents(small: InstalledPackages):
    known = {line for document in small.documents("train") for line in _distinctive_lines(document.text)}
    for document in small.documents("test"):
        lines = _distinctive_lines(document.text)
        assert len(lines & known) <= 0.2 * len(lines), document.name


def test_documents_are_bounded_and_hold_text(small: InstalledPackages):
    for split in SPLITS:
        for document in small.documents(split):
            assert 200 <= len(document.text) <= 24_000, document.name
            assert document.labels["language"]
            assert "\r" not in document.text


def test_which_split_a_document_is_in_does_not_depend_on_the_other_packages(small: InstalledPackages, monkeypatch: pytest.MonkeyPatch):
    names = {split: {document.name for document in small.documents(split)} for split in SPLITS}
    monkeypatch.setattr(corpora, "PACKAGES", SMALL[:2])
    fewer = InstalledPackages()
    for split, other in (SPLITS, SPLITS[::-1]):
        assert not {document.name for document in fewer.documents(split)} & names[other]


def test_the_summary_counts_documents_and_bytes(small: InstalledPackages):
    for split in SPLITS:
        documents = list(small.documents(split))
        summary = small.summary()[split]
        assert isinstance(summary, dict)
        assert summary["documents"] == len(documents)
        assert summary["bytes"] == sum(len(document.text.encode()) for document in documents) == sum(summary["bytes_by_language"].values())


def test_identity_changes_with_the_version_of_a_package(small: InstalledPackages, monkeypatch: pytest.MonkeyPatch):
    before = small.identity
    assert before == InstalledPackages().identity
    assert before["packages"] == {package: metadata.version(package) for package in SMALL}
    version = metadata.version
    monkeypatch.setattr(corpora.metadata, "version", lambda package: "99" if package == "mako" else version(package))
    assert small.identity != before


def test_identity_changes_with_the_reader(small: InstalledPackages, monkeypatch: pytest.MonkeyPatch):
    before = small.identity
    monkeypatch.setattr(corpora, "READER_VERSION", corpora.READER_VERSION + 1)
    assert small.identity != before


def test_texts_are_kept_at_their_first_use_and_an_upgrade_changes_nothing(
    small: InstalledPackages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pinned = PinnedPackages(tmp_path)
    assert pinned.identity == small.identity
    expected = {split: list(small.documents(split)) for split in SPLITS}
    assert {split: list(pinned.documents(split)) for split in SPLITS} == expected
    (file,) = tmp_path.rglob("documents.parquet")
    assert pinned.identity == {**small.identity, "texts": hashlib.sha256(file.read_bytes()).hexdigest()}
    before, version = pinned.identity, metadata.version
    monkeypatch.setattr(corpora.metadata, "version", lambda package: "99" if package == "mako" else version(package))
    monkeypatch.setattr(InstalledPackages, "package_documents", lambda self, package: pytest.fail("the packages were read again"))
    assert InstalledPackages().identity != before
    assert pinned.summary() == small.summary()
    again = PinnedPackages(tmp_path)
    assert again.identity == before
    assert {split: list(again.documents(split)) for split in SPLITS} == expected
    assert PinnedPackages(tmp_path / "new").identity != before


def test_the_hash_of_the_kept_texts_is_in_the_first_recipe_of_the_tokens(
    small: InstalledPackages, empty: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sources, "open_corpus", open_corpus)
    empty.declare()
    empty.run(select=["tokens"])
    (file,) = (empty.root / "corpora").rglob("documents.parquet")
    corpus = empty.artefact("tokens", layer=None).recipe["settings"]["corpus"]
    assert corpus["texts"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "nothing to do" in empty.run(select=["tokens"])
    shutil.rmtree(file.parent)  # the next use keeps other texts of packages with the same versions
    PinnedPackages(empty.root).require_readable()
    assert "nothing to do" in empty.run(select=["tokens"])
    documents = InstalledPackages.package_documents

    def fewer(self: InstalledPackages, package: str) -> list[Document]:
        return [each for each in documents(self, package) if "license" not in each.name]

    monkeypatch.setattr(InstalledPackages, "package_documents", fewer)
    shutil.rmtree(file.parent)
    PinnedPackages(empty.root).require_readable()
    (tokens,) = [each for each in status_of() if each.declaration.address.name == "tokens"]
    assert tokens.state == "stale"
    assert "corpus.texts" in tokens.reason


def test_kept_texts_that_were_changed_are_named_with_the_way_out(small: InstalledPackages, tmp_path: Path):
    list(PinnedPackages(tmp_path).documents("test"))
    (file,) = tmp_path.rglob("documents.parquet")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(SaeensError, match=r"documents.parquet has been changed .*: restore it, or delete .*corpora/installed_packages"):
        next(PinnedPackages(tmp_path).documents("train"))
    shutil.rmtree(file.parent)
    assert list(PinnedPackages(tmp_path).documents("train")) == list(small.documents("train"))


def test_texts_of_a_root_that_cannot_be_written_are_read_from_the_packages(small: InstalledPackages, tmp_path: Path):
    (tmp_path / "corpora").write_text("no folder")
    assert list(PinnedPackages(tmp_path).documents("test")) == list(small.documents("test"))


def test_an_unknown_corpus_is_refused_with_the_known_ones():
    assert isinstance(open_corpus("builtin/installed_packages"), PinnedPackages)
    with pytest.raises(ValueError, match=r"'wikipedia' is not known; it can be builtin/installed_packages, builtin/prose, \{name: DATASET"):
        TypeAdapter(Corpus).validate_python("wikipedia")


# packages made for a purpose


class Shelf:
    """Installed packages of given files."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._packages: list[str] = []
        monkeypatch.setattr(corpora.metadata, "distribution", lambda name: metadata.PathDistribution(folder / f"{name}.dist-info"))

    def install(self, package: str, files: Mapping[str, str | bytes], readme: str = "", extra_records: str = "") -> None:
        info = self.folder / f"{package}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1\n\n{readme}")
        for name, content in files.items():
            file = self.folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        records = "".join(f"{name},,\n" for name in (*files, f"{info.name}/METADATA"))
        (info / "RECORD").write_text(records + extra_records)
        self._packages.append(package)
        self._monkeypatch.setattr(corpora, "PACKAGES", tuple(self._packages))

    def documents(self, split: Split = "train") -> dict[str, Document]:
        return {document.name: document for document in InstalledPackages().documents(split)}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Nothing is held out."""
    monkeypatch.setattr(corpora, "TEST_SHARE", 0)
    return Shelf(tmp_path, monkeypatch)


def _code(topic: str, lines: int = 12) -> str:
    """Some lines that no other topic has."""
    return "\n".join(f"def {topic}_{i}(first_{topic}, second):\n    return first_{topic} + {i}" for i in range(lines))


def test_languages_follow_from_suffixes_and_other_files_are_left_out(shelf: Shelf):
    files = {f"p/{name}": _code(name.replace(".", "_")) for name in ("a.py", "b.pyi", "c.js", "d.h", "e.md", "f.txt", "g.so", "h.json")}
    shelf.install("p", files, readme=_code("readme"))
    languages = {name: document.labels["language"] for name, document in shelf.documents().items()}
    assert languages == {
        "p/p/a.py": "python", "p/p/b.pyi": "python", "p/p/c.js": "javascript", "p/p/d.h": "cpp_header", "p/p/e.md": "prose",
        "p/p.dist-info/METADATA": "prose",
    }  # fmt: skip
    assert shelf.documents()["p/p.dist-info/METADATA"].text == _code("readme")


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("p/a.py", "# Copyright 2024 The Authors.\n# Licensed under the Apache License.\n\n"),
        ("p/a.py", "#!/usr/bin/env python\n# SPDX-License-Identifier: MIT\n"),
        ("p/a.js", "/*! The MIT License\n * Copyright someone\n */\n"),
        ("p/a.h", "// Copyright someone.\n// All rights reserved.\n\n"),
    ],
)
def test_licence_headers_are_removed(shelf: Shelf, name: str, header: str):
    shelf.install("p", {name: header + _code("a")})
    assert shelf.documents()[f"p/{name}"].text == _code("a")


def test_first_comments_without_a_licence_are_kept(shelf: Shelf):
    text = "# What this module is about.\n" + _code("a")
    shelf.install("p", {"p/a.py": text})
    assert shelf.documents()["p/p/a.py"].text == text


def test_files_that_differ_by_platform_are_left_out(shelf: Shelf):
    of_p = ["p/version.py", "p/_version.py", "p/__config__.py", "p/_distributor_init.py", "p/generated_version.py", "p/__pycache__/x.py"]
    include = "torch/include"
    of_torch = [f"{include}/mkl/mkl.h", f"{include}/c10/cuda/stream.h", f"{include}/ATen/core/CUDABlas.h", f"{include}/sleef.h"]
    kept = ["p/conversion.py", "p/configure.py", f"{include}/c10/core/device.h", f"{include}/ATen/core/tensor.h", "torch/nn.py"]
    files = {name: _code(f"f{i}") for i, name in enumerate([*of_p, *of_torch, *kept])}
    shelf.install("p", {name: text for name, text in files.items() if name.startswith("p/")})
    shelf.install("torch", {name: text for name, text in files.items() if name.startswith("torch/")})
    assert {name.split("/", 1)[1] for name in shelf.documents()} == set(kept)


def test_minified_numeric_undecodable_and_short_files_are_left_out(shelf: Shelf):
    unreadable = {
        "p/minified.js": "var a=1;" * 400,
        "p/table.py": "\n".join("0.125, 0.25, 0.5, 0.75, 1.0, 2.0, 4.0," for _ in range(40)),
        "p/latin.py": _code("latin").encode() + b"\n# caf\xe9",
        "p/short.py": "x = 1",
    }
    shelf.install("p", {**unreadable, "p/a.py": _code("a")}, extra_records="p/removed.py,,\n../../bin/tool,,\n")
    assert list(shelf.documents()) == ["p/p/a.py"]


def test_long_documents_end_with_a_whole_line(shelf: Shelf):
    text = _code("a", lines=1000)
    shelf.install("p", {"p/a.py": text})
    found = shelf.documents()["p/p/a.py"].text
    assert 23_000 < len(found) <= 24_000
    assert text.startswith(found)
    assert found.endswith("\n")


def test_line_endings_do_not_change_a_document(shelf: Shelf):
    shelf.install("p", {"p/a.py": _code("a"), "p/b.py": _code("a").replace("\n", "\r\n"), "p/c.py": _code("a").replace("    ", "\t")})
    (document,) = shelf.documents().values()
    assert "\r" not in document.text


def test_sources_in_source_maps_are_documents(shelf: Shelf):
    sources = {"src/app.tsx": _code("app"), "src/style.css": _code("style"), "src/none.ts": None}
    content = json.dumps({"version": 3, "sources": list(sources), "sourcesContent": list(sources.values())})
    shelf.install("p", {"p/bundle.js.map": content, "p/empty.js.map": '{"version": 3, "sources": ["a.ts"]}'})
    assert {name: document.labels["language"] for name, document in shelf.documents().items()} == {"p/src/app.tsx": "typescript"}


def test_no_package_dominates_a_language(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    files = {f"p/f{i}.py": _code(f"f{i}") for i in range(20)} | {"p/readme.md": _code("readme")}
    monkeypatch.setattr(corpora, "MAX_PACKAGE_BYTES", 5 * len(_code("f0")))
    shelf.install("p", files)
    languages = [document.labels["language"] for document in shelf.documents().values()]
    assert 4 <= languages.count("python") <= 6
    assert languages.count("prose") == 1


def test_held_out_documents_that_repeat_training_documents_are_left_out(shelf: Shelf, monkeypatch: pytest.MonkeyPatch):
    fresh, shared = [f"p/fresh_{i}.py" for i in range(40)], [f"p/shared_{i}.py" for i in range(40)]
    base = _code("base")
    files = {name: _code(Path(name).stem) for name in fresh}
    files |= {name: f"{base}\n{_code(Path(name).stem, lines=4)}" for name in shared}  # three quarters are the same
    shelf.install("p", files)
    monkeypatch.setattr(corpora, "TEST_SHARE", 0.3)
    train, test = shelf.documents("train"), shelf.documents("test")
    assert any("shared" in name for name in train)
    assert any("fresh" in name for name in test)
    assert not any("shared" in name for name in test)
    assert len(train) + len(test) < len(files)
