"""Corpora of local files: formats, documents, held-out documents, and errors of wrong files."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from tiny_experiment import Laboratory

from saeens_pipeline.assets import sources
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import caching, corpora, records
from saeens_pipeline.language_models.documents import Document, Split
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.text_files import TextFileCorpus
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.settings.corpora import TextFiles
from saeens_pipeline.settings.from_file import FILE

RECORDS = [{"text": f"Text number {i}, \u00fc.", "meta": {"set": "code" if i % 3 else "prose"}, "url": None} for i in range(40)]
SPLITS: tuple[Split, ...] = ("train", "test")


def _lines(records: Sequence[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _zstd(content: bytes) -> bytes:
    half = len(content) // 2  # in two frames, as parallel compressors write them
    codec = pa.Codec("zstd")
    return bytes(codec.compress(content[:half], asbytes=True)) + bytes(codec.compress(content[half:], asbytes=True))


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(_lines(RECORDS)),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(_lines(RECORDS))),
    "a.jsonl.zst": lambda path: path.write_bytes(_zstd(_lines(RECORDS))),
    "a.parquet": lambda path: parquet.write_table(pa.Table.from_pylist(RECORDS), path, row_group_size=7),
}


def _corpus(folder: Path, **fields: Any) -> TextFileCorpus:
    return TextFileCorpus(TextFiles.model_validate(fields, context={FILE: folder / "defs.yaml"}))


def _texts(corpus: TextFileCorpus) -> list[str]:
    return [document.text for split in SPLITS for document in corpus.documents(split)]


@pytest.mark.parametrize("file", WRITERS)
def test_every_record_of_every_format_is_a_document_of_one_split(tmp_path: Path, file: str):
    WRITERS[file](tmp_path / file)
    corpus = _corpus(tmp_path, files="*", label_fields=["meta.set", "url"], test_share=0.3)
    corpus.require_readable()
    documents = {split: list(corpus.documents(split)) for split in SPLITS}
    by_name = {document.name: document for split in SPLITS for document in documents[split]}
    assert len(by_name) == len(documents["train"]) + len(documents["test"]) == len(RECORDS)
    for number, record in enumerate(RECORDS, start=1):
        document = by_name[f"{file}:{number}"]
        assert document.text == record["text"]
        assert document.labels == {"meta.set": record["meta"]["set"], "url": None}
    assert 4 < len(documents["test"]) < 20


@pytest.mark.parametrize("file", ["b.txt", "b.md", "b.txt.gz", "b.txt.zst"])
def test_a_plain_text_file_is_one_document_with_its_folder_as_label(tmp_path: Path, file: str):
    (tmp_path / "letters").mkdir()
    content = "Dear \u00fc,\n\nthree lines.\n".encode()
    compressed = {"gz": gzip.compress, "zst": _zstd}.get(file.rsplit(".", 1)[-1], bytes)(content)
    (tmp_path / "letters" / file).write_bytes(compressed)
    (tmp_path / "other.txt").write_text("Another.")
    corpus = _corpus(tmp_path, files="**/*.*", label_fields=["kind"])
    documents = {document.name: document for split in SPLITS for document in corpus.documents(split)}
    assert documents[f"letters/{file}"].text == content.decode()
    assert documents[f"letters/{file}"].labels == {"kind": "letters"}


def test_a_field_whose_name_has_a_dot_is_found_first(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": "x", "meta.set": "outer", "meta": {"set": "inner"}}]))
    (document,) = _corpus(tmp_path, files="a.jsonl", label_fields=["meta.set"], test_share=1e-9).documents("train")
    assert document.labels == {"meta.set": "outer"}


def test_empty_texts_and_blank_lines_are_no_documents(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": ""}, {"text": "kept"}]) + b"\n  \n")
    assert _texts(_corpus(tmp_path, files="a.jsonl")) == ["kept"]


def test_only_test_files_are_in_the_test_split(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(_lines(RECORDS[:30]))
    (tmp_path / "held_out.jsonl").write_bytes(_lines(RECORDS[30:]))
    corpus = _corpus(tmp_path, files="train.jsonl", test_files="held_out.jsonl")
    assert [d.text for d in corpus.documents("train")] == [record["text"] for record in RECORDS[:30]]
    assert [d.text for d in corpus.documents("test")] == [record["text"] for record in RECORDS[30:]]


def test_a_file_in_both_splits_is_refused(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines(RECORDS))
    with pytest.raises(ConfigurationError, match=r"a.jsonl is among files and among test_files"):
        _corpus(tmp_path, files="*.jsonl", test_files=["a.jsonl"]).require_readable()


@given(st.sets(st.integers(0, 10_000), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_held_out_documents_depend_on_the_name_alone_and_are_never_trained_on(numbers: set[int], share: float):
    documents = [Document(f"a.jsonl:{number}", "x", {}) for number in numbers]
    corpus = TextFileCorpus(TextFiles.model_validate({"files": "a.jsonl", "test_share": share}))
    train, test = ({d.name for d in corpus.held_out(iter(documents), split)} for split in SPLITS)
    assert train | test == {d.name for d in documents}
    assert not train & test
    for document in documents:
        assert [d.name for d in corpus.held_out(iter([document]), "test")] == [document.name] * (document.name in test)


def test_files_are_read_only_as_far_as_documents_are_requested(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines(RECORDS) + b"this is not JSON\n")
    documents = _corpus(tmp_path, files="a.jsonl", test_share=1e-9).documents("train")
    assert [next(documents).text for _ in RECORDS] == [record["text"] for record in RECORDS]  # what is wrong comes after
    with pytest.raises(SaeensError, match="not valid JSON"):
        next(documents)


def test_relative_paths_start_from_the_experiment_file(empty: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = empty.declare({"corpus": {"files": "texts/*.jsonl"}})
    (file.parent / "texts").mkdir()
    (file.parent / "texts" / "a.jsonl").write_bytes(_lines(RECORDS))
    monkeypatch.chdir(tmp_path)
    corpus = empty.catalogue.sources["tiny"].corpus
    assert isinstance(corpus, TextFiles)
    assert len(_texts(TextFileCorpus(corpus))) == len(RECORDS)


def test_a_language_model_beside_the_experiment_file_is_found_from_any_folder(
    empty: Laboratory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    (empty.folder / "model").symlink_to(empty.model)
    (empty.folder / "tiny" / "owner").mkdir(parents=True)
    (empty.folder / "tiny" / "owner" / "model").symlink_to(empty.model)
    monkeypatch.chdir(tmp_path)
    for name in ("../model", "./../model", "owner/model", str(empty.model)):
        empty.declare({"language_model": name})
        found = empty.catalogue.sources["tiny"].language_model
        assert describe_language_model(str(found)).d_model == describe_language_model(str(empty.model)).d_model
    for name in ("owner/other", "builtin/reference", "transformer_lens:gelu-1l"):
        empty.declare({"language_model": name})
        assert empty.catalogue.sources["tiny"].language_model == name
    empty.declare({"language_model": "./missing"})
    with pytest.raises(ConfigurationError, match=r"defs/tiny/missing': there is no such folder"):
        describe_language_model(str(empty.catalogue.sources["tiny"].language_model))


# files with several names


def test_a_file_of_many_names_is_read_once_and_is_in_one_split(tmp_path: Path):
    texts = tmp_path / "texts"
    (texts / "a").mkdir(parents=True)
    for i in range(400):
        (texts / "a" / f"{i:03}.txt").write_text(f"Text {i}")
    (texts / "link").symlink_to("a")
    (texts / "a" / "loop").symlink_to("..")
    (texts / "a" / "second_loop").symlink_to("../..")
    (texts / "same.txt").symlink_to("a/000.txt")
    (texts / "hard.txt").hardlink_to(texts / "a" / "001.txt")
    corpus = _corpus(tmp_path, files=["texts/**/*.txt", "texts/a/../a/*.txt", "texts/link/*.txt", str(texts / "a" / "*.txt")])
    train, test = ([document.text for document in corpus.documents(split)] for split in SPLITS)
    assert sorted([*train, *test]) == sorted(f"Text {i}" for i in range(400))
    assert not set(train) & set(test)
    with pytest.raises(ConfigurationError, match=r"\d\d\d.txt is among files and among test_files"):
        _corpus(tmp_path, files="texts/a/*.txt", test_files="texts/link/*.txt").require_readable()
    with pytest.raises(ConfigurationError, match=r"is among files and among test_files"):
        _corpus(tmp_path, files="texts/a/001.txt", test_files="texts/hard.txt").require_readable()


@pytest.mark.parametrize("folder", ["a[1]", "a*b", "a?b", "a{b,c}", "a#b%20c", "a b", "~", "a\\b", "\u00fc:\u65e5"])
def test_a_folder_and_a_file_may_have_any_name(tmp_path: Path, folder: str):
    (tmp_path / folder / folder).mkdir(parents=True)
    (tmp_path / folder / folder / f"{folder}.txt").write_text("kept")
    (tmp_path / folder / "1.txt").write_text("not this")
    for pattern in (f"./{folder}/{folder}.txt", str(tmp_path / folder / folder / f"{folder}.txt")):
        assert _texts(_corpus(tmp_path / folder, files=pattern)) == ["kept"]
    assert _texts(_corpus(tmp_path / folder / folder, files="*.txt")) == ["kept"]


def test_a_name_that_is_not_utf8_is_read_and_can_be_printed_and_stored(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")).write_bytes(_lines([{"text": "x"}]) + b"wrong\n")
    documents = _corpus(tmp_path, files="*.jsonl", test_share=1e-9).documents("train")
    assert next(documents).name.encode() == b"caf\\xe9.jsonl:1"
    with pytest.raises(SaeensError, match=r"caf\\xe9.jsonl:2: not valid JSON") as caught:
        next(documents)
    str(caught.value).encode()


# what texts may hold


def _only(folder: Path, content: bytes, file: str = "a.jsonl", **fields: Any) -> list[str]:
    (folder / file).write_bytes(content)
    return [document.text for document in _corpus(folder, files=file, test_share=1e-9, **fields).documents("train")]


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path):
    (text,) = _only(tmp_path, rb'{"text": "a \ud83d b \ud83d\ude00 c"}')
    assert text == "a \ufffd b \U0001f600 c"


def test_later_records_without_a_text_are_skipped_and_counted(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(_lines([{"text": "one"}, {"text": None}, {"url": "x"}, {"text": ""}, {"text": "two"}]))
    corpus = _corpus(tmp_path, files="a.jsonl", test_share=1e-9)
    assert _texts(corpus) == ["one", "two"]
    assert corpus.skipped == {"train": 3}


@pytest.mark.parametrize("file", ["a.jsonl", "a.csv", "a.txt"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, file: str):
    content = {"a.jsonl": b'{"text": "x"}\n', "a.csv": b"text,label\nx,1\n", "a.txt": b"x"}[file]
    assert _only(tmp_path, b"\xef\xbb\xbf" + content, file) == ["x"]


@pytest.mark.parametrize("file", ["a.ndjson", "A.JSONL", "a.Ndjson.GZ", "a.TXT", "a.MD", "a.CSV"])
def test_formats_are_known_by_other_names(tmp_path: Path, file: str):
    content = b"text\nx\n" if "CSV" in file else b'{"text": "x"}\n' if "json" in file.lower() else b"x"
    assert _only(tmp_path, gzip.compress(content) if "GZ" in file else content, file) == ["x"]


def test_numbers_keep_their_spelling_and_booleans_are_words(tmp_path: Path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": 1.50, "kind": 1e5}\n{"text": true, "kind": false}\n')
    documents = list(_corpus(tmp_path, files="a.jsonl", label_fields=["kind"], test_share=1e-9).documents("train"))
    assert [(each.text, each.labels["kind"]) for each in documents] == [("1.50", "1e5"), ("true", "false")]


def test_a_window_too_large_for_memory_is_named(tmp_path: Path):
    frame = bytes([0x28, 0xB5, 0x2F, 0xFD, 0, (31 - 10) << 3, *(1 | 5 << 3).to_bytes(3, "little")]) + b"12345"  # as zstd --long=31
    with pytest.raises(SaeensError, match=r"a.jsonl.zst:1: cannot be read further .*: compress it without --long"):
        _only(tmp_path, frame, "a.jsonl.zst")


@pytest.mark.parametrize("file", ["a.jsonl.gz", "a.txt.gz"])
def test_a_line_or_text_that_is_too_long_is_named(tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "MAX_BYTES", 1000)
    with pytest.raises(SaeensError, match=rf"{file}(:2)?: a (line|text) of more than 1,000 bytes"):
        _only(tmp_path, gzip.compress(b'{"text": "x"}\n' + b" " * 10**7), file)


def test_columns_of_parquet_may_have_dots(tmp_path: Path):
    rows = [{"my.text": "x", "meta.set": "outer", "meta": {"set": "inner", "kind": "y"}}]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    fields = {"text_field": "my.text", "label_fields": ["meta.set", "meta.kind"]}
    (document,) = _corpus(tmp_path, files="a.parquet", test_share=1e-9, **fields).documents("train")
    assert (document.text, document.labels) == ("x", {"meta.set": "outer", "meta.kind": "y"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,label\nx\n", r"a.csv:2: 1 fields, and the first line has 2"),
        (b'text,label\n"a\nb",1\n"x"y,2\n', r"a.csv:4: not valid CSV"),
        (b"text,label\nx,caf\xe9\n", r"a.csv:2: not UTF-8"),
        (b"text,label,text\nx,y,z\n", r"a.csv: 2 columns are called 'text': rename all but the one to read"),
    ],
)
def test_a_wrong_row_of_a_csv_file_is_named_by_its_line(tmp_path: Path, content: bytes, message: str):
    with pytest.raises(SaeensError, match=message):
        _only(tmp_path, content, "a.csv")


def test_columns_of_equal_names_that_are_not_read_do_no_harm(tmp_path: Path):
    assert _only(tmp_path, b"note,text,note\n1,x,2\n", "a.csv") == ["x"]


def test_columns_of_a_parquet_file_with_equal_names_are_refused(tmp_path: Path):
    table = pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SaeensError, match=r"a.parquet: 2 columns are called 'text'"):
        list(_corpus(tmp_path, files="a.parquet").documents("train"))


# what identifies it


def _identity(folder: Path, **fields: Any) -> dict[str, object]:
    return _corpus(folder, files="*.jsonl", **fields).identity


def test_identity_depends_on_bytes_names_and_settings_alone(tmp_path: Path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(_lines(RECORDS))
    before = _identity(tmp_path)
    file.touch()
    assert _identity(tmp_path) == before
    assert _identity(tmp_path, test_share=0.1) != before
    assert _identity(tmp_path, text_field="url") != before
    assert _identity(tmp_path, label_fields=["url"]) != before
    moved = Path(tmp_path.rename(tmp_path.with_name("moved")))
    assert _identity(moved) == before
    (moved / "a.jsonl").write_bytes(_lines([{"text": "x"}, *RECORDS[1:]]))
    assert _identity(moved) != before
    (moved / "a.jsonl").write_bytes(_lines(RECORDS))
    (moved / "a.jsonl").rename(moved / "b.jsonl")
    assert _identity(moved) != before


def test_the_identity_of_large_files_depends_on_their_size_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from saeens_pipeline.language_models import text_files

    monkeypatch.setattr(text_files, "_HASHED_BYTES", 0)
    monkeypatch.setattr(text_files, "_LEAST_HASHED_BYTES", 1024)
    file = tmp_path / "a.jsonl"
    file.write_bytes(_lines(RECORDS * 50))
    before = _identity(tmp_path)
    assert str(before["files"]).count("sampled-") == 1
    file.write_bytes(_lines([{"text": "y" * 2000}, *RECORDS * 50]))
    assert _identity(tmp_path) != before


# what is refused


RECORD_ERRORS: dict[str, tuple[bytes, str]] = {
    "no JSON": (_lines(RECORDS[:2]) + b"{'text': 1}\n", r"a.jsonl:3: not valid JSON"),
    "no UTF-8": (_lines(RECORDS[:1]) + b'{"text": "caf\xe9"}\n', r"a.jsonl:2: not UTF-8"),
    "no such field": (_lines([{"body": "x", "id": 1}]), r"a.jsonl:1: there is no field 'text'; there are: body, id"),
    "no field inside": (_lines([{"text": "x", "meta": {"kind": 1}}]), r"a.jsonl:1: there is no field 'set' inside 'meta'; there are: kind"),
    "no text": (_lines([{"text": ["x"], "meta": {"set": 1}}]), r"a.jsonl:1: field 'text' is of type list, and it has to be a text"),
    "deep JSON": (_lines(RECORDS[:1]) + b'{"text": ' + b"[" * 100_000, r"a.jsonl:2: the JSON has too many levels"),
    "no object": (b'["x"]\n', r"a.jsonl:1: a record has to be an object with fields, and this is of type list"),
}


@pytest.mark.parametrize("case", RECORD_ERRORS)
def test_a_wrong_record_is_named_by_file_and_line(tmp_path: Path, case: str):
    content, message = RECORD_ERRORS[case]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(SaeensError, match=message):
        _texts(_corpus(tmp_path, files="a.jsonl", label_fields=["meta.set"]))


@pytest.mark.parametrize("file", ["a.jsonl.gz", "a.jsonl.zst"])
def test_a_truncated_file_is_named_with_its_last_line(tmp_path: Path, file: str):
    WRITERS[file](tmp_path / file)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: len(whole) - 30])
    with pytest.raises(SaeensError, match=rf"{file}:\d+: cannot be read further .*: check that the file is complete"):
        _texts(_corpus(tmp_path, files=file))


def test_a_missing_column_and_a_file_that_is_no_parquet_are_named(tmp_path: Path):
    WRITERS["a.parquet"](tmp_path / "a.parquet")
    with pytest.raises(SaeensError, match=r"a.parquet: there is no column 'body'; there are: text, meta, url"):
        _corpus(tmp_path, files="a.parquet", text_field="body").require_readable()
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(SaeensError, match=r"b.parquet: cannot be read as a Parquet file"):
        _corpus(tmp_path, files="b.parquet").require_readable()


def test_missing_files_and_unknown_formats_are_refused(tmp_path: Path):
    with pytest.raises(ConfigurationError, match=rf"there is no file texts/\*.jsonl in {tmp_path}"):
        _corpus(tmp_path, files="texts/*.jsonl").require_readable()
    for name in ("a.json", "a.parquet.zst", "a.tsv.gz"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(
            ConfigurationError, match=rf"{name} is of a format that is not read; names end in .jsonl, .ndjson, .csv, .parquet, .txt, .md"
        ):
            _corpus(tmp_path, files=name).require_readable()


FILE_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": (
        {"files": "a", "tekst": "x"},
        r"corpus.tekst: unknown key; one of: text_field, .*test_share, files",
    ),
    "unknown key of a data set": (
        {"name": "a/b", "splt": "x"},
        r"corpus.splt: unknown key; .*subset, split, test_split",
    ),
    "a column's name": (
        {"files": "a", "label_fields": ["name"]},
        r"corpus.label_fields: 'name' is the name of another column",
    ),
    "a share": ({"files": "a", "test_share": 1.5}, r"attributes.corpus.test_share: .*less than 1"),
    "no file": ({"files": []}, r"attributes.corpus.files: expected at least one file"),
    "one split": ({"name": "a/b", "test_split": "train"}, r"attributes.corpus: split and test_split are both train"),
    "no name": ({"name": "../b"}, r"attributes.corpus.name: not a valid name of a data set on the hub"),
    "neither": ({"split": "train"}, r"attributes.corpus.name: required"),
}


@pytest.mark.parametrize("case", FILE_ERRORS)
def test_a_wrong_corpus_is_named_by_file_line_and_field(empty: Laboratory, case: str):
    corpus, message = FILE_ERRORS[case]
    file = empty.declare({"corpus": corpus})
    (complaint,) = empty.catalogue.broken.values()
    assert str(file) in complaint
    with pytest.raises(ConfigurationError, match=message):
        raise ConfigurationError(complaint)


# from files to tables


def test_an_experiment_runs_on_files_keeps_their_labels_and_notices_changes(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    file = empty.declare({"corpus": {"files": "a.jsonl.zst", "label_fields": ["meta.set"], "test_share": 0.4}})
    (file.parent / "a.jsonl.zst").write_bytes(_zstd(_lines(RECORDS * 4)))
    empty.run(select=["bagging_ensemble"])
    documents = open_tokens(empty.artefact("tokens", layer=None).path).documents("train")
    assert documents.columns == ["document", "name", "meta.set"]
    assert set(documents["meta.set"]) == {"code", "prose"}
    assert json.loads((empty.artefact("bagging/member_1", 1).path / "cfg.json").read_text())["metadata"]["dataset_path"] == "files"
    assert "nothing to do" in empty.run(select=["bagging_ensemble"])
    (file.parent / "a.jsonl.zst").write_bytes(_zstd(_lines(RECORDS * 5)))
    assert "nothing to do" not in empty.run(select=["bagging_ensemble"])


def test_wrong_files_are_refused_before_anything_is_computed(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    file = empty.declare({"corpus": {"files": "a.jsonl", "text_field": "body"}})
    (file.parent / "a.jsonl").write_bytes(_lines(RECORDS))
    with pytest.raises(SaeensError, match=r"a.jsonl:1: there is no field 'body'; there are: meta, text, url"):
        empty.run()
    assert not list(empty.root.rglob("recipe.json"))


def test_too_few_documents_are_counted_before_activations_are_computed(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "open_corpus", corpora.open_corpus)
    monkeypatch.setattr(caching, "cache_activations", lambda *_, **__: pytest.fail("activations were computed"))
    file = empty.declare({"corpus": {"files": "a.jsonl", "test_share": 0.4}})
    (file.parent / "a.jsonl").write_bytes(_lines(RECORDS[:10]))
    with pytest.raises(SaeensError, match=r"train split has \d+ activation rows in \d documents .* but 600 were asked for"):
        empty.run()
