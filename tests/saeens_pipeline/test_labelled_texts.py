"""Labelled texts from the builtin corpus, local files and SAEBench's data sets; and errors of insufficient ones."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fake_hub import UNREACHABLE, FakeHub, reach
from pydantic import ValidationError
from tiny_models import ListedCorpus

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.documents import Document, Split
from saeens_pipeline.language_models.labelled_texts import embedded, packaged
from saeens_pipeline.language_models.labelled_texts.drawing import Labelled, TextCount, draw_concepts, draw_quadrants
from saeens_pipeline.language_models.labelled_texts.embedded import EmbeddedTasks, cut
from saeens_pipeline.language_models.labelled_texts.reading import identity, read_concepts, read_correlations
from saeens_pipeline.settings import labelled_data_sets
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.probing import (
    ConceptDataSet,
    ConceptDetectionSettings,
    CorrelationDataSet,
    SpuriousCorrelationSettings,
)

FEW = TextCount(8, 4)


def _frame(**numbers: int) -> pl.DataFrame:
    """So many texts of each label; `a__x` is label a with the other attribute x."""
    rows = [(f"{name} {i}", *name.split("__")) for name, n in numbers.items() for i in range(n)]
    return pl.DataFrame(rows, schema=["text", "label", "other"][: len(rows[0])], orient="row")


# drawing


def test_half_as_many_texts_as_a_probe_needs_are_drawn_per_label_and_splits_are_disjoint():
    data = Labelled("set", _frame(a=9, b=30))
    drawn = draw_concepts(data, [], FEW, balance=False, seed=1)
    for label in ("a", "b"):
        train, test = drawn.train[label], drawn.test[label]
        assert (len(train), len(test)) == (4, 2)
        assert len({*train, *test}) == 6
        assert all(text.startswith(label) for text in (*train, *test))
    shuffled = Labelled("set", data.train.reverse())
    assert draw_concepts(shuffled, [], FEW, balance=False, seed=1) == drawn
    assert draw_concepts(data, [], FEW, balance=False, seed=2) != drawn


def test_texts_of_a_label_are_balanced_by_the_other_attribute():
    test = _frame(a__x=2, a__y=9, b__x=2, b__y=2).with_columns(pl.col("text") + " test")
    data = Labelled("set", _frame(a__x=50, a__y=3, b__x=3, b__y=3), test)
    drawn = draw_concepts(data, ["a", "b"], FEW, balance=True, seed=1)
    for texts, each in ((drawn.train, 2), (drawn.test, 1)):
        assert [sum(text.startswith(f"a__{other}") for text in texts["a"]) for other in "xy"] == [each, each]


def test_a_text_that_was_drawn_for_training_is_no_test_text():
    both = _frame(a=6, b=6)
    drawn = draw_concepts(Labelled("set", both, both), [], FEW, balance=False, seed=1)
    assert not set(drawn.train["a"]) & set(drawn.test["a"])
    with pytest.raises(SaeensError, match=r"set: 2 test texts of 'a' are needed, and there is 1 different one: lower test_texts"):
        draw_concepts(Labelled("set", _frame(a=5, b=6), _frame(a=5, b=6)), [], FEW, balance=False, seed=1)


def test_repeated_and_empty_texts_are_not_counted():
    repeated = pl.DataFrame({"text": ["one", "one", " ", "two", "three"], "label": "a"}).vstack(_frame(b=9).select("text", "label"))
    with pytest.raises(SaeensError, match=r"set: 4 train texts of 'a' are needed, and there are 3 different ones"):
        draw_concepts(Labelled("set", repeated), [], FEW, balance=False, seed=1)


def test_quadrants_have_twice_as_many_texts_where_the_attributes_agree():
    sizes = {"python__doc": 7, "python__code": 4, "cpp__doc": 4, "cpp__code": 7}
    drawn = draw_quadrants(Labelled("set", _frame(**sizes)), "task", ("python", "cpp"), ("doc", "code"), FEW, seed=1)
    assert [len(texts) for texts in drawn.train] == [4, 2, 2, 4]
    assert [len(texts) for texts in drawn.test] == [2, 1, 1, 2]
    for texts, name in zip(drawn.train, sizes, strict=True):
        assert all(text.startswith(name) for text in texts)


def test_errors_of_labels_name_the_available_ones():
    with pytest.raises(SaeensError, match=r"set: the only label is 'a'; a probe needs texts of at least two"):
        draw_concepts(Labelled("set", _frame(a=9)), [], FEW, balance=False, seed=1)
    with pytest.raises(SaeensError, match=r"set: no text has a label; a probe needs texts of at least two"):
        draw_concepts(Labelled("set", _frame(a=1).clear()), [], FEW, balance=False, seed=1)
    with pytest.raises(SaeensError, match=r"set, train split: no text has the label 'c'; the labels are 'a', 'b'"):
        draw_concepts(Labelled("set", _frame(a=9, b=9)), ["a", "c"], FEW, balance=False, seed=1)
    with pytest.raises(SaeensError, match=r"set, test split: no text has the label 'z'; the labels are 'x', 'y'"):
        train, test = _frame(a__x=9, a__z=9, b__x=9, b__z=9), _frame(a__x=9, a__y=9, b__x=9, b__y=9)
        draw_quadrants(Labelled("set", train, test), "task", ("a", "b"), ("x", "z"), FEW, seed=1)


# the builtin corpus


class CodeCorpus(ListedCorpus):
    """Documents of four languages and prose, in which code and documentation can be told apart."""

    def documents(self, split: Split) -> Any:
        for i in range(8):
            words = " ".join(f"{split}{i}word{j}" for j in range(20))
            variables = "\n".join(f"    {split}_{i}_{j} = call({j})  " for j in range(12))
            yield Document(
                f"{split}/{i}.py", f'def f():\n    """Docstring {words}."""\n    # a remark\n{variables}\n', {"language": "python"}
            )
            statements = "\n".join(f"  int {split}_{i}_{j} = call({j}); // remark {j}" for j in range(12))
            yield Document(f"{split}/{i}.h", f"/**\n * Comment {words}\n */\nvoid f() {{\n{statements}\n}}\n", {"language": "cpp_header"})
            for language in ("typescript", "javascript", "prose"):
                yield Document(f"{split}/{i}.{language}", f"{language} {words}", {"language": language})


def test_embedded_tasks_have_labels_from_the_corpus_and_disjoint_train_and_test_documents():
    tasks = EmbeddedTasks(CodeCorpus([], []))
    language = draw_concepts(tasks.labelled("builtin/language"), [], FEW, balance=False, seed=1)
    assert sorted(language.train) == ["cpp_header", "javascript", "python", "typescript"]
    assert all(
        f"{split}0" not in text
        for split, texts in (("train", language.test), ("test", language.train))
        for each in texts.values()
        for text in each
    )
    assert all(text.startswith("javascript train") for text in language.train["javascript"])
    prose = draw_concepts(tasks.labelled("builtin/code_or_prose"), [], FEW, balance=False, seed=1)
    assert sorted(prose.test) == ["code", "prose"]
    assert all(text.startswith("prose test") for text in prose.test["prose"])
    docstrings = draw_concepts(tasks.labelled("builtin/docstring_or_code"), [], FEW, balance=False, seed=1)
    assert all(text.startswith("Docstring train") for text in docstrings.train["docstring"])
    assert all("call(" in text and "remark" not in text and '"""' not in text for text in docstrings.train["code"])


def test_the_embedded_correlation_has_comments_without_marks_and_code_without_comments():
    pieces = EmbeddedTasks(CodeCorpus([], [])).labelled("builtin/language_and_documentation")
    ((name, (target, spurious)),) = pieces.pairs.items()
    assert (target, spurious) == (("python", "cpp_header"), ("documentation", "code"))
    task = draw_quadrants(pieces, name, target, spurious, FEW, seed=1)
    python_documentation, python_code, cpp_documentation, cpp_code = task.train
    assert all(text.startswith("Docstring") for text in python_documentation)
    assert all("call(" in text and "remark" not in text for text in (*python_code, *cpp_code))
    assert all("Comment train" in text or "remark" in text for text in cpp_documentation)
    assert not any(mark in text for text in cpp_documentation for mark in ("*", "/", "call"))


def test_pieces_are_whole_lines():
    lines = [f"line {i} {'x' * (i % 50)}\n" for i in range(60)]
    pieces = list(cut("".join(lines)))
    assert "".join(lines).startswith("".join(pieces))
    assert all(embedded.MIN_PIECE_CHARACTERS <= len(piece) <= embedded.PIECE_CHARACTERS for piece in pieces)
    assert list(cut("too short")) == []


# local files


def _write(folder: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    file = folder / name
    if file.suffix == ".parquet":
        pl.DataFrame(rows).write_parquet(file)
    elif file.suffix == ".csv":
        pl.DataFrame(rows).write_csv(file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


ODD = [(None, "sport"), ("x", None), (" ", "news"), ("", "news"), ("both", "sport"), ("both", "news"), ("both", "sport")]
"""Text and label of rows that cannot be drawn: four lack one of them, and three are of a text with two labels."""


def _rows(**numbers: int) -> list[dict[str, Any]]:
    return [
        {"body": f"{name} {i}", "topic": i % 2 if name == "number" else name, "more": 1} for name, n in numbers.items() for i in range(n)
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_local_files_have_texts_and_labels_in_the_named_columns(tmp_path: Path, suffix: str):
    _write(tmp_path, f"a{suffix}", _rows(sport=6))
    _write(tmp_path, f"b{suffix}", _rows(news=6))
    data_set = ConceptDataSet(name="mine", train=str(tmp_path / f"*{suffix}"), text_field="body", label_field="topic")
    drawn = read_concepts(data_set, FEW, seed=1)
    assert sorted(drawn.train) == ["news", "sport"]
    assert len(drawn.train["news"]) == 4


def test_numbers_are_labels_and_rows_without_a_label_are_left_out(tmp_path: Path):
    rows = [*_rows(number=20), {"body": "nothing", "topic": None, "more": 2}]
    data_set = ConceptDataSet(
        name="mine", train=_write(tmp_path, "a.jsonl", rows), text_field="body", label_field="topic", labels=["1", "0"]
    )
    assert sorted(read_concepts(data_set, FEW, seed=1).test) == ["0", "1"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".ndjson"])
def test_labels_and_texts_are_strings_with_their_spelling(tmp_path: Path, suffix: str):
    labels = ["01", "1", "00241e5", "True", "1.0"]
    rows = [(f"0{i}" if label == "1" else f"{label} {i}", label) for i in range(10, 18) for label in labels]
    if suffix == ".csv":
        content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    else:
        content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    (tmp_path / f"a{suffix}").write_text(content)
    file = str(tmp_path / f"a{suffix}")
    drawn = read_concepts(ConceptDataSet(name="mine", train=file, labels=labels), FEW, seed=1)
    for label in labels:
        assert {*drawn.train[label], *drawn.test[label]} <= {text for text, other in rows if other == label}
    assert sorted(read_concepts(ConceptDataSet(name="mine", train=file), FEW, seed=1).train) == sorted(labels)


def test_a_type_that_the_first_rows_suggest_is_not_guessed(tmp_path: Path):
    rows = "".join(f"text {i},{i % 2}\n" for i in range(300)) + "".join(f"late {i},word\n" for i in range(8))
    (tmp_path / "a.csv").write_text("text,label\n" + rows)
    drawn = read_concepts(ConceptDataSet(name="mine", train=str(tmp_path / "a.csv")), FEW, seed=1)
    assert sorted(drawn.train) == ["0", "1", "word"]


def _with_labels(*rows: tuple[str, ...]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=["text", "label", "other"][: len(rows[0])], orient="row")


def _drawn_texts(*splits: Any) -> list[str]:
    return [text for split in splits for texts in (split.values() if isinstance(split, Mapping) else split) for text in texts]


@pytest.mark.parametrize("seed", range(5))
def test_a_text_with_two_labels_is_of_no_probe_and_in_no_split(seed: int):
    single = [(f"{label} {i}", label) for label in "ab" for i in range(6)]
    concepts = draw_concepts(Labelled("set", _with_labels(("both", "a"), ("both", "b"), *single)), [], FEW, balance=False, seed=seed)
    texts = _drawn_texts(concepts.train, concepts.test)
    assert "both" not in texts
    assert len(texts) == len(set(texts)) == 12
    single = [(f"{a}{b} {i}", a, b) for a in "pq" for b in "xy" for i in range(6)]
    frame = _with_labels(("both", "p", "x"), ("both", "p", "y"), ("two", "q", "x"), ("two", "p", "x"), *single)
    task = draw_quadrants(Labelled("set", frame), "t", ("p", "q"), ("x", "y"), FEW, seed=seed)
    balanced = draw_concepts(Labelled("set", frame), [], FEW, balance=True, seed=seed)
    for texts in (_drawn_texts(task.train, task.test), _drawn_texts(balanced.train, balanced.test)):
        assert not {"both", "two"} & set(texts)
        assert len(texts) == len(set(texts))


@pytest.mark.parametrize("seed", range(5))
def test_a_text_with_one_label_in_train_and_another_in_test_is_left_out(seed: int):
    train = _with_labels(("both", "a"), *((f"{label} {i}", label) for label in "ab" for i in range(4)))
    test = _with_labels(("both", "b"), *((f"{label} t{i}", label) for label in "ab" for i in range(2)))
    drawn = draw_concepts(Labelled("set", train, test), [], FEW, balance=False, seed=seed)
    assert "both" not in _drawn_texts(drawn.train, drawn.test)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_rows_that_cannot_be_drawn_are_counted_by_reason(tmp_path: Path, suffix: str):
    rows = [*_rows(sport=6, news=6), *({"body": body, "topic": topic, "more": 1} for body, topic in ODD)]
    fields: dict[str, Any] = {"name": "mine", "train": _write(tmp_path, f"a{suffix}", rows), "text_field": "body"}
    concepts = read_concepts(ConceptDataSet(**fields, label_field="topic"), FEW, seed=1)
    assert concepts.left_out == {"without a text or a label": 4, "with several labels": 3}
    fields["train"] = _write(tmp_path, f"b{suffix}", _rows(sport=6, news=6))
    plain = read_concepts(ConceptDataSet(**fields, label_field="topic"), FEW, seed=1)
    assert plain.left_out == {}
    pairs = [{"text": f"{a}{b} {i}", "label": a, "spurious": b} for a in "pq" for b in "xy" for i in range(7)]
    pairs += [{"text": "both", "label": "p", "spurious": b} for b in "xy"] + [{"text": "z", "label": "p", "spurious": None}]
    data_set = CorrelationDataSet(name="pairs", train=_write(tmp_path, f"c{suffix}", pairs), target=("p", "q"), spurious=("x", "y"))
    (task,) = read_correlations(data_set, FEW, seed=1)
    assert task.left_out == {"without a text or a label": 1, "with several labels": 2}


def test_a_file_in_both_splits_is_refused(tmp_path: Path):
    file = Path(_write(tmp_path, "a.jsonl", _rows(sport=6, news=6)))
    (tmp_path / "b.jsonl").hardlink_to(file)
    data_set = ConceptDataSet(name="mine", train=str(file), test=str(tmp_path / "b.jsonl"), text_field="body", label_field="topic")
    with pytest.raises(ConfigurationError, match=r"mine: .*a\.jsonl is among the files of train and of test"):
        read_concepts(data_set, FEW, seed=1)


def test_labelled_texts_may_be_compressed_nested_and_below_folders_of_any_name(tmp_path: Path):
    folder = tmp_path / "a[1]" / "b"
    folder.mkdir(parents=True)
    lines = "".join(json.dumps({"meta": {"text": f"{label} {i}", "label": label}}) + "\n" for label in "ab" for i in range(6))
    (folder / "x.JSONL.gz").write_bytes(gzip.compress(lines.encode()))
    fields = {"name": "mine", "train": "**/*.gz", "text_field": "meta.text", "label_field": "meta.label"}
    data_set = ConceptDataSet.model_validate(fields, context={FILE: tmp_path / "a[1]" / "defs.yaml"})
    assert sorted(read_concepts(data_set, FEW, seed=1).train) == ["a", "b"]


def test_local_files_with_two_attributes_give_quadrants(tmp_path: Path):
    rows = [{"text": f"{a}{b} {i}", "label": a, "spurious": b} for a in "pq" for b in "xy" for i in range(7)]
    data_set = CorrelationDataSet(name="mine", train=_write(tmp_path, "a.jsonl", rows), target=("p", "q"), spurious=("x", "y"))
    (task,) = read_correlations(data_set, FEW, seed=1)
    assert [texts[0][:2] for texts in task.train] == ["px", "py", "qx", "qy"]


def test_errors_of_files_name_the_file_and_its_columns(tmp_path: Path):
    file = _write(tmp_path, "a.jsonl", _rows(sport=6, news=6))
    with pytest.raises(SaeensError, match=rf"mine: {file}:1: there is no column 'text'; the columns are 'body', 'topic', 'more'"):
        read_concepts(ConceptDataSet(name="mine", train=file), FEW, seed=1)
    with pytest.raises(SaeensError, match=r"mine: there is no file .*b\.jsonl"):
        read_concepts(ConceptDataSet(name="mine", train=str(tmp_path / "b.jsonl")), FEW, seed=1)
    with pytest.raises(SaeensError, match=r"a\.txt is of a format that is not read; names end in \.jsonl, \.ndjson, \.csv, \.parquet"):
        (tmp_path / "a.txt").write_text("text")
        read_concepts(ConceptDataSet(name="mine", train=str(tmp_path / "a.txt")), FEW, seed=1)
    with pytest.raises(SaeensError, match=r"c\.parquet: cannot be read as a Parquet file"):
        (tmp_path / "c.parquet").write_text("no parquet")
        read_concepts(ConceptDataSet(name="mine", train=str(tmp_path / "c.parquet")), FEW, seed=1)


def test_the_identity_of_labelled_files_is_their_content(tmp_path: Path):
    data_set = ConceptDataSet(name="mine", train=_write(tmp_path, "a.jsonl", _rows(sport=6)))
    before = identity(data_set)
    _write(tmp_path, "a.jsonl", _rows(sport=7))
    after = identity(data_set)
    assert before != after
    _write(tmp_path, "a.jsonl", _rows(sport=6))
    assert identity(data_set) == before


# texts of the package sae-probes


@pytest.fixture
def sae_probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the data sets of a package with two attributes of the same 48 names; its code must not run."""
    folder = tmp_path / "packages" / "sae_probes" / "data" / "cleaned_data"
    folder.mkdir(parents=True)
    (folder.parents[1] / "__init__.py").write_text("raise AssertionError('imported')")
    information = tmp_path / "packages" / "sae_probes-0.4.2.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: sae-probes\nVersion: 0.4.2\n")
    record = []
    for name, of_name in (("5_hist_fig_ismale", lambda i: i % 2), ("7_hist_fig_ispolitician", lambda i: i // 2 % 2)):
        rows = pl.DataFrame([{"prompt": f"Name, number {i}", "prompt_len": 4, "target": of_name(i)} for i in range(48)])
        rows.write_csv(folder / f"{name}.csv.zst", compression="zstd")
        record.append(f"sae_probes/data/cleaned_data/{name}.csv.zst,,\n")
    (information / "RECORD").write_text("sae_probes/__init__.py,,\n" + "".join(record))
    monkeypatch.syspath_prepend(tmp_path / "packages")
    yield folder
    assert "sae_probes" not in sys.modules


def test_texts_of_sae_probes_are_read_from_its_files(sae_probes: Path):
    drawn = read_concepts(ConceptDataSet(name="sae_probes/5_hist_fig_ismale"), FEW, seed=1)
    assert sorted(drawn.train) == ["0", "1"]
    assert all(int(text.rsplit(" ", 1)[1]) % 2 == int(label) for label, texts in drawn.train.items() for text in texts)
    before = identity(ConceptDataSet(name="sae_probes/5_hist_fig_ismale"))
    shutil.copyfile(sae_probes / "7_hist_fig_ispolitician.csv.zst", sae_probes / "5_hist_fig_ismale.csv.zst")
    assert identity(ConceptDataSet(name="sae_probes/5_hist_fig_ismale")) != before


def test_two_data_sets_of_sae_probes_give_two_attributes_of_their_common_texts(sae_probes: Path):
    data_set = CorrelationDataSet(name="sae_probes/politician_and_sex")
    (task,) = read_correlations(data_set, TextCount(8, 8), seed=1)
    for texts, attributes in zip(task.test, [(1, 1), (1, 0), (0, 1), (0, 0)], strict=True):
        assert {(i // 2 % 2, i % 2) for i in (int(text.rsplit(" ", 1)[1]) for text in texts)} == {attributes}
    assert set(identity(data_set)["sha256"]) == {"5_hist_fig_ismale.csv.zst", "7_hist_fig_ispolitician.csv.zst"}


def test_texts_of_sae_probes_with_two_labels_are_left_out(sae_probes: Path):
    file = sae_probes / "7_hist_fig_ispolitician.csv.zst"
    rows = pl.read_csv(file, infer_schema=False)
    other = rows.filter(prompt="Name, number 2").with_columns(target=pl.lit("0"))
    pl.concat([rows, other]).write_csv(file, compression="zstd")
    assert "Name, number 2" not in packaged.packaged_texts("sae_probes/politician_and_sex").train["text"]
    drawn = read_concepts(ConceptDataSet(name="sae_probes/7_hist_fig_ispolitician"), TextCount(32, 12), seed=1)
    assert "Name, number 2" not in {text for texts in (*drawn.train.values(), *drawn.test.values()) for text in texts}


@pytest.mark.parametrize("name", labelled_data_sets.SAE_PROBES_CORRELATIONS)
def test_the_real_package_has_enough_texts_for_the_defaults(name: str):
    try:
        importlib.metadata.distribution("sae-probes")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("sae-probes is not installed (make probes)")
    (task,) = read_correlations(CorrelationDataSet(name=name), None, seed=42)
    assert min(map(len, task.test)) >= 20


def test_an_unknown_data_set_of_sae_probes_is_refused_with_those_that_exist(sae_probes: Path):
    with pytest.raises(
        ConfigurationError, match=r"has no data set '6_x'; of its 2, similar names are 5_hist_fig_ismale, 7_hist_fig_ispolitician"
    ):
        read_concepts(ConceptDataSet(name="sae_probes/6_x"), FEW, seed=1)
    with pytest.raises(ValidationError, match=r"'sae_probes/x' is not known; known are .*sae_probes/politician_and_sex"):
        CorrelationDataSet(name="sae_probes/x")
    with pytest.raises(ValidationError, match="is read from the package sae-probes: leave path out"):
        ConceptDataSet(name="sae_probes/6_x", path="x")


def test_the_command_that_installs_sae_probes_is_named(monkeypatch: pytest.MonkeyPatch):
    def none(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packaged.metadata, "files", none)
    with pytest.raises(ConfigurationError, match=r"sae_probes/92_glue_sst2: needs the package sae-probes: .*`make probes`"):
        identity(ConceptDataSet(name="sae_probes/92_glue_sst2"))
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert re.search(r"^probes:(?:.*\n)+?\t.*--no-deps sae-probes==", makefile, re.MULTILINE)


# settings


def test_a_data_set_can_be_given_by_its_name_alone():
    settings = ConceptDetectionSettings.model_validate({"datasets": ["builtin/language", {"name": "fancyzhx/ag_news", "path": "/copy"}]})
    assert [each.name for each in settings.datasets] == ["builtin/language", "fancyzhx/ag_news"]
    assert [each.name for each in ConceptDetectionSettings().datasets] == list(labelled_data_sets.EMBEDDED_CONCEPTS)
    assert [each.name for each in SpuriousCorrelationSettings().datasets] == list(labelled_data_sets.EMBEDDED_CORRELATIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"datasets": ["fancyzhx/agnews"]},
            "'fancyzhx/agnews' is not known; known are builtin/language, .*fancyzhx/ag_news.*; for local files give train",
        ),
        (
            {"datasets": [{"name": "fancyzhx/ag_news", "train": "x.jsonl", "label_field": "topic"}]},
            "is a known data set of the hub; choose another name for local files: leave train, label_field out",
        ),
        ({"datasets": [{"name": "builtin/language", "path": "x"}]}, "is read from the installed packages: leave path out"),
        ({"datasets": [{"name": "mine", "train": "x.jsonl", "revision": "v1"}]}, "is read from local files: leave revision out"),
        ({"datasets": [{"name": "mine", "train": "x.jsonl", "labels": ["a"]}]}, "a probe needs texts of at least two different labels"),
        ({"datasets": []}, "at least 1 item"),
        ({"train_texts": 100}, "give both train_texts and test_texts"),
        ({"train_texts": 10, "test_texts": 8}, "multiple of 4"),
    ],
)
def test_wrong_data_set_settings_are_refused_with_the_allowed_values(settings: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ConceptDetectionSettings.model_validate(settings)


def test_local_files_with_two_attributes_need_their_values():
    with pytest.raises(ValidationError, match="for local files give target and spurious, two values each"):
        SpuriousCorrelationSettings.model_validate({"datasets": [{"name": "mine", "train": "x.jsonl"}]})
    same = {"name": "mine", "train": "x.jsonl", "target": ["a", "b"], "spurious": ["c", "c"]}
    with pytest.raises(ValidationError, match="an attribute needs two different values, not 'c' twice"):
        SpuriousCorrelationSettings.model_validate({"datasets": [same]})
    with pytest.raises(ValidationError, match=r"'LabHC/bias_in_bios' is a known data set of the hub.*: leave target, spurious out"):
        SpuriousCorrelationSettings.model_validate({"datasets": [same | {"name": "LabHC/bias_in_bios", "train": None}]})


# the hub's data sets, from local copies of the same columns


@pytest.fixture
def datasets_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package datasets, if it is installed, with a cache that is thrown away."""
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def _bios(numbers: range) -> list[dict[str, Any]]:
    return [{"hard_text": f"{p} {g} {i}", "profession": p, "gender": g} for p in range(28) for g in (0, 1) for i in numbers]


def _copy(folder: Path, **splits: Sequence[dict[str, Any]]) -> str:
    folder.mkdir()
    for split, rows in splits.items():
        pl.DataFrame(rows).write_parquet(folder / f"{split}.parquet")
    return str(folder)


@pytest.mark.usefixtures("datasets_package")
def test_bias_in_bios_gives_balanced_professions_by_name(tmp_path: Path):
    path = _copy(tmp_path / "bios", train=_bios(range(5)), test=_bios(range(5, 8)))
    drawn = read_concepts(ConceptDataSet(name="LabHC/bias_in_bios_class_set2", path=path), FEW, seed=1)
    assert list(drawn.train) == ["journalist", "nurse", "painter", "photographer", "physician"]
    assert sorted(text[:4] for text in drawn.train["nurse"]) == ["13 0", "13 0", "13 1", "13 1"]
    tasks = read_correlations(CorrelationDataSet(name="LabHC/bias_in_bios", path=path), FEW, seed=1)
    assert [task.target for task in tasks] == [
        ("professor", "nurse"), ("architect", "journalist"), ("surgeon", "psychologist"), ("attorney", "teacher"),
    ]  # fmt: skip
    assert [texts[0][:4] for texts in tasks[0].train] == ["21 0", "21 1", "13 0", "13 1"]  # male professors and female nurses agree


@pytest.mark.usefixtures("datasets_package")
def test_amazon_reviews_give_categories_and_ratings(tmp_path: Path):
    rows = [{"text": f"{c} {r} {i}", "category": c, "rating": r} for c in range(34) for r in (1.0, 5.0) for i in range(5)]
    path = _copy(tmp_path / "amazon", train=rows, test=[row | {"text": f"test {row['text']}"} for row in rows])
    name = "canrager/amazon_reviews_mcauley_1and5"
    drawn = read_concepts(ConceptDataSet(name=name, path=path), FEW, seed=1)
    assert {label: text[0].split()[0] for label, text in drawn.train.items()} == {
        "Toys_and_Games": "1", "Cell_Phones_and_Accessories": "2", "Industrial_and_Scientific": "3", "Musical_Instruments": "5",
        "Electronics": "6",
    }  # fmt: skip
    sentiment = read_concepts(ConceptDataSet(name=f"{name}_sentiment", path=path), FEW, seed=1)
    assert {label: {text.split()[1] for text in texts} for label, texts in sentiment.train.items()} == {"1.0": {"1.0"}, "5.0": {"5.0"}}
    tasks = read_correlations(CorrelationDataSet(name=name, path=path), FEW, seed=1)
    assert tasks[0].target == ("Books", "CDs_and_Vinyl")
    assert [texts[0][:6] for texts in tasks[0].train] == ["24 1.0", "24 5.0", "26 1.0", "26 5.0"]


@pytest.mark.usefixtures("datasets_package")
def test_ag_news_github_code_and_europarl_have_topics_languages_and_no_duplicates(tmp_path: Path):
    news = [{"text": f"{label} {i}", "label": label} for label in range(4) for i in range(9)]
    path = _copy(tmp_path / "news", train=news, test=[row | {"text": f"test {row['text']}"} for row in news])
    drawn = read_concepts(ConceptDataSet(name="fancyzhx/ag_news", path=path), FEW, seed=1)
    assert {label: texts[0][0] for label, texts in drawn.train.items()} == {"World": "0", "Sports": "1", "Business": "2", "Sci/Tech": "3"}

    suffixes = {"c": "C", "py": "Python", "htm": "HTML", "java": "Java", "php": "PHP", "rs": None}
    code = [{"content": "#" * 150 + f"{suffix} {i} " + "x" * 400, "path": f"src/{i}.{suffix}"} for i in range(20) for suffix in suffixes]
    code += [{"content": "too short", "path": "src/a.py"}]
    path = _copy(tmp_path / "code", train=code)
    drawn = read_concepts(ConceptDataSet(name="codeparrot/github-code", path=path), FEW, seed=1)
    assert {label: texts[0].split()[0] for label, texts in drawn.train.items()} == {suffixes[s]: s for s in suffixes if suffixes[s]}

    folder, pairs = tmp_path / "europarl", {"en": "en-fr", "fr": "fr-it", "de": "de-en", "es": "es-fr", "nl": "nl-pt"}
    folder.mkdir()
    configs = "".join(f"- config_name: {pair}\n  data_files: {pair}.jsonl\n" for pair in pairs.values())
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    for language, pair in pairs.items():
        other = pair.replace(language, "").strip("-")
        translations = [{language: f"{language} {i // 3}", other: f"other {i}"} for i in range(27)]  # each sentence comes three times
        _write(folder, f"{pair}.jsonl", [{"translation": each} for each in translations])
    drawn = read_concepts(ConceptDataSet(name="Helsinki-NLP/europarl", path=str(folder)), FEW, seed=1)
    assert {label: texts[0][:2] for label, texts in drawn.train.items()} == {
        language: language for language in ("en", "fr", "de", "es", "nl")
    }


def test_a_broken_line_of_a_file_is_named(tmp_path: Path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a", "label": "x"}\n\nnot json\n')
    with pytest.raises(SaeensError, match=r".*texts\.jsonl:3: not valid JSON"):
        read_concepts(ConceptDataSet(name="mine", train=str(tmp_path / "texts.jsonl")), FEW, seed=1)


def test_labels_in_the_settings_can_be_numbers(tmp_path: Path):
    rows = [{"text": f"{label} {i}", "label": label} for label in (0, 1, 2) for i in range(20)]
    pl.DataFrame(rows).write_parquet(tmp_path / "texts.parquet")
    drawn = read_concepts(
        ConceptDataSet.model_validate({"name": "mine", "train": str(tmp_path / "texts.parquet"), "labels": [0, 2]}), FEW, 1
    )
    assert list(drawn.train) == ["0", "2"]
    with pytest.raises(ValidationError, match="put it in quotes"):
        ConceptDataSet.model_validate({"name": "mine", "train": "texts.parquet", "labels": [True, False]})


@pytest.mark.usefixtures("datasets_package")
def test_the_identity_of_a_hub_data_set_is_its_commit_and_of_a_local_copy_its_bytes(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake_hub.repositories["datasets/LabHC/bias_in_bios"] = tmp_path
    reach(monkeypatch, fake_hub.url)
    commit = fake_hub.commit("datasets/LabHC/bias_in_bios")
    assert identity(ConceptDataSet(name="LabHC/bias_in_bios_class_set1"))["revision"] == commit
    assert identity(CorrelationDataSet(name="LabHC/bias_in_bios"))["revision"] == commit
    with pytest.raises(ConfigurationError, match=r"data set 'LabHC/bias_in_bios' has no revision 'v9' on the hub"):
        identity(ConceptDataSet(name="LabHC/bias_in_bios_class_set1", revision="v9"))
    reach(monkeypatch, UNREACHABLE)
    assert identity(ConceptDataSet(name="LabHC/bias_in_bios_class_set1"))["revision"] == commit

    copied = ConceptDataSet(name="fancyzhx/ag_news", path=_copy(tmp_path / "news", train=[{"text": "a", "label": 1}]))
    before = identity(copied)
    assert list(before["sha256"]) == ["train.parquet"]
    pl.DataFrame([{"text": "b", "label": 1}]).write_parquet(tmp_path / "news" / "train.parquet")
    assert identity(copied)["sha256"] != before["sha256"]
    with pytest.raises(SaeensError, match=r"fancyzhx/ag_news: there is no file below .*nothing_here"):
        identity(ConceptDataSet(name="fancyzhx/ag_news", path=str(tmp_path / "nothing_here")))


@pytest.mark.usefixtures("datasets_package")
def test_errors_of_hub_data_sets_name_the_columns_or_a_remedy(tmp_path: Path):
    path = _copy(tmp_path / "news", train=[{"body": "a", "label": 1}], test=[{"body": "a", "label": 1}])
    with pytest.raises(SaeensError, match=r"fancyzhx/ag_news, train split, has no column 'text'; its columns are 'body', 'label'"):
        read_concepts(ConceptDataSet(name="fancyzhx/ag_news", path=path), FEW, seed=1)
    with pytest.raises(SaeensError, match=r"codeparrot/github-code has no column 'code' or 'content'; its columns are 'body', 'label'"):
        read_concepts(ConceptDataSet(name="codeparrot/github-code", path=path), FEW, seed=1)
    with pytest.raises(SaeensError, match=r"fancyzhx/ag_news: there is no file below .*nothing_here"):
        read_concepts(ConceptDataSet(name="fancyzhx/ag_news", path=str(tmp_path / "nothing_here")), FEW, seed=1)


def test_without_the_package_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ConfigurationError, match=r"fancyzhx/ag_news is read with the package datasets: pip install 'saeens\[hub\]'"):
        read_concepts(ConceptDataSet(name="fancyzhx/ag_news"), None, seed=1)
