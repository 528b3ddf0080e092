"""Token windows: packing, kept positions, and the text of every row."""

from __future__ import annotations

import shutil
import tempfile
from collections import namedtuple
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONTEXT_LENGTH, END_OF_TEXT, ListedCorpus, edit_config, write_tiny_model
from tokenizers import Tokenizer

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import tokens as tokens_module
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.tokens import TokenBatch, TokenStore, open_tokens, write_tokens

CORPUS = ListedCorpus(train=["abcdef", "ghi", "jklm"], test=["xyz"])


@pytest.fixture(scope="module")
def description(tmp_path_factory: pytest.TempPathFactory) -> LanguageModelDescription:
    return describe_language_model(str(write_tiny_model(tmp_path_factory.mktemp("models") / "model")))


def _settings(**changes: Any) -> dict[str, Any]:
    return {"context_length": 4, "packing": "document", "drop": [], "train_tokens": 5, "test_tokens": 2} | changes


def _read(store: TokenStore, split: Split = "train") -> TokenBatch:
    batches = list(store.batches(split, batch_windows=3))
    return TokenBatch(*(np.concatenate([batch[i].numpy() for batch in batches]) for i in range(4)))  # pyright: ignore[reportArgumentType]


def _encode(description, text: str) -> list[int]:
    return Tokenizer.from_file(str(description.path / "tokenizer.json")).encode(text).ids


def _count_rows(documents: list[list[int]], packing: str, drop: set[str], context_length: int, limit: int | None) -> int:
    texts = documents if packing == "document" else [[token for document in documents for token in document]]
    kept: list[int] = []
    for text in texts:
        windows = [text[start : start + context_length] for start in range(0, len(text) - 1, context_length)]
        kept += [token for window in _spread(windows, limit) for token in window["first" in drop :]]
    return sum(token != END_OF_TEXT for token in kept) if "special" in drop else len(kept)


def _spread(windows: list[list[int]], limit: int | None) -> list[list[int]]:
    if limit is None or len(windows) <= limit:
        return windows
    return windows[:1] if limit == 1 else [windows[round(Fraction(i * (len(windows) - 1), limit - 1))] for i in range(limit)]


def test_document_packing_cuts_each_document_into_windows_of_its_own(description, tmp_path):
    write_tokens(tmp_path / "t", CORPUS, description, **_settings(train_tokens=13))
    read = _read(open_tokens(tmp_path / "t"))
    a, b, c, d, e, f = _encode(description, "abcdef")
    assert read.tokens[:2].tolist() == [[a, b, c, d], [e, f, 0, 0]]
    assert read.document.tolist() == [[0, 0, 0, 0], [0, 0, -1, -1], [1, 1, 1, -1], [2, 2, 2, 2]]
    assert read.position.tolist() == [[0, 1, 2, 3], [4, 5, 0, 0], [0, 1, 2, 0], [0, 1, 2, 3]]
    assert read.kept.tolist() == [[True] * 4, [True, True, False, False], [True] * 3 + [False], [True] * 4]


def test_concatenate_packing_cuts_through_documents_that_follow_an_end_of_text_token(description, tmp_path):
    write_tokens(tmp_path / "t", CORPUS, description, **_settings(packing="concatenate", train_tokens=16))
    read = _read(open_tokens(tmp_path / "t"))
    stream = [
        END_OF_TEXT,
        *_encode(description, "abcdef"),
        END_OF_TEXT,
        *_encode(description, "ghi"),
        END_OF_TEXT,
        *_encode(description, "jklm"),
    ]
    assert read.tokens.flatten().tolist() == stream
    assert read.document.flatten().tolist() == [0] * 7 + [1] * 4 + [2] * 5
    assert read.position.flatten().tolist() == [*range(7), *range(4), *range(5)]


def test_remainders_shorter_than_two_tokens_are_left_out(description, tmp_path):
    statistics = write_tokens(tmp_path / "t", ListedCorpus(["abcde", "fg"], ["xyz"]), description, **_settings(train_tokens=6))
    assert _read(open_tokens(tmp_path / "t")).document.tolist() == [[0, 0, 0, 0], [1, 1, -1, -1]]
    assert (statistics.train.windows, statistics.train.tokens, statistics.train.documents) == (2, 6, 2)


@pytest.mark.parametrize(
    ("limit", "starts"),
    [
        (None, [0, 4, 8, 12, 16]),
        (1, [0]),
        (2, [0, 16]),
        (3, [0, 8, 16]),
        (4, [0, 4, 12, 16]),
        (5, [0, 4, 8, 12, 16]),
        (6, [0, 4, 8, 12, 16]),
    ],
)
def test_windows_per_document_are_spread_evenly_over_each_document(description, tmp_path, limit, starts):
    texts = ["abcdefghijklmnopqr", "stu", "vw" * 9]  # five windows, the last of two tokens; one; five
    rows = 2 * sum(min(4, 18 - start) for start in starts) + 3
    write_tokens(tmp_path / "t", ListedCorpus(texts, ["xyz"]), description, **_settings(train_tokens=rows, windows_per_document=limit))
    read = _read(open_tokens(tmp_path / "t"))
    assert read.kept.sum() == rows
    for document, expected in ((0, starts), (1, [0]), (2, starts)):
        windows = read.document[:, 0] == document
        assert read.position[windows, 0].tolist() == expected
        text = texts[document]
        shown = "".join(text[start : start + 4] for start in expected)
        assert read.tokens[windows][read.kept[windows]].tolist() == _encode(description, shown)


def test_fewer_windows_per_document_spread_the_rows_over_more_documents(description, tmp_path):
    corpus = ListedCorpus(train=["abcdefghijklmnop"] * 10, test=["xyz"])
    used = {
        limit: write_tokens(tmp_path / f"{limit}", corpus, description, **_settings(train_tokens=32, windows_per_document=limit)).train
        for limit in (None, 2, 1)
    }
    assert {limit: (each.rows, each.documents) for limit, each in used.items()} == {None: (32, 2), 2: (32, 4), 1: (32, 8)}


@pytest.mark.parametrize(("drop", "kept"), [(["first"], "bcdfhi"), (["padding"], "abcdefghi"), (["special", "first"], "bcdfhi")])
def test_dropped_positions_have_no_rows(description, tmp_path, drop, kept):
    write_tokens(tmp_path / "t", CORPUS, description, **_settings(drop=drop, train_tokens=len(kept)))
    read = _read(open_tokens(tmp_path / "t"))
    assert read.tokens[read.kept].tolist() == _encode(description, kept)


def test_special_tokens_are_dropped_at_every_position(description, tmp_path):
    asked = _settings(packing="concatenate", drop=["special"], train_tokens=13)
    write_tokens(tmp_path / "t", CORPUS, description, **asked)
    read = _read(open_tokens(tmp_path / "t"))
    assert read.tokens[read.kept].tolist() == _encode(description, "abcdefghijklm")
    assert END_OF_TEXT in read.tokens[read.document >= 0]


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abcdefg é", min_size=0, max_size=30), min_size=1, max_size=8),
    asked=st.fixed_dictionaries(
        {
            "packing": st.sampled_from(["document", "concatenate"]),
            "windows_per_document": st.none() | st.integers(1, 4),
            "drop": st.sets(st.sampled_from(["special", "padding", "first"])),
            "context_length": st.integers(2, CONTEXT_LENGTH),
            "train_tokens": st.integers(1, 60),
            "test_tokens": st.just(1),
        }
    ),
)
def test_exactly_the_requested_rows_are_kept_and_each_maps_to_its_text(description, texts, asked):
    corpus = ListedCorpus(train=texts, test=["test text"])
    packing, drop, context_length, wanted = (asked[key] for key in ("packing", "drop", "context_length", "train_tokens"))
    if packing == "concatenate":
        asked["windows_per_document"] = None
    separator = [END_OF_TEXT] if packing == "concatenate" else []
    documents = [separator + _encode(description, text) for text in texts]
    with tempfile.TemporaryDirectory() as folder:
        available = _count_rows(documents, packing, drop, context_length, asked["windows_per_document"])
        if available < wanted:
            with pytest.raises(SaeensError, match=f"train split has {available} activation rows"):
                write_tokens(Path(folder) / "t", corpus, description, **asked)
            return
        write_tokens(Path(folder) / "t", corpus, description, **asked)
        store = open_tokens(Path(folder) / "t")
        assert store.n_rows("train") == wanted
        read = _read(store)
    assert read.tokens.shape[1] == context_length
    assert read.kept.sum() == wanted
    present = read.document >= 0
    expected = [documents[d][p] for d, p in zip(read.document[present], read.position[present], strict=True)]
    assert read.tokens[present].tolist() == expected
    column = np.broadcast_to(np.arange(context_length), present.shape)
    may_be_kept = present & ~(("first" in drop) & (column == 0)) & ~(("special" in drop) & (read.tokens == END_OF_TEXT))
    assert np.array_equal(read.kept, may_be_kept)
    seen = list(zip(read.document[present].tolist(), read.position[present].tolist(), strict=True))
    assert seen == sorted(set(seen))


def test_documents_are_listed_with_name_and_language(description, tmp_path):
    write_tokens(tmp_path / "t", CORPUS, description, **_settings(train_tokens=7))
    store = open_tokens(tmp_path / "t")
    expected = {"document": [0, 1], "name": ["train-0", "train-1"], "language": ["prose", "python"]}
    assert store.documents("train").equals(pl.DataFrame(expected, schema_overrides={"document": pl.Int32}))
    assert store.documents("test")["name"].to_list() == ["test-0"]


def test_no_more_documents_are_tokenised_than_needed(description, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "_BATCH_CHARACTERS", 10)
    corpus = ListedCorpus(train=["abcd"] * 100, test=["abcd"] * 100)
    write_tokens(tmp_path / "t", corpus, description, **_settings(train_tokens=10))
    assert corpus.read == {"train": 3, "test": 3}


def test_chunks_and_batches_do_not_change_the_tokens(description, tmp_path, monkeypatch):
    corpus = ListedCorpus(train=["the quick brown fox jumps over the lazy dog"] * 5, test=["abc"])
    asked = _settings(train_tokens=200, packing="concatenate")
    write_tokens(tmp_path / "one_chunk", corpus, description, **asked)
    monkeypatch.setattr(tokens_module, "_CHUNK_TOKENS", 28)
    write_tokens(tmp_path / "many_chunks", corpus, description, **asked)
    one, many = (_read(open_tokens(tmp_path / name)) for name in ("one_chunk", "many_chunks"))
    for a, b in zip(one, many, strict=True):
        assert np.array_equal(a, b)


def test_progress_ends_at_all_rows(description, tmp_path):
    seen: list[tuple[int, int]] = []
    write_tokens(tmp_path / "t", CORPUS, description, **_settings(), report=lambda *progress: seen.append(progress))
    assert seen[-1] == (7, 7)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(("split", "has"), [("train", 13), ("test", 3)])
def test_a_corpus_too_short_names_split_rows_and_field(description, tmp_path, split, has):
    with pytest.raises(
        SaeensError, match=rf"{split} split has {has} .* 1,000 were asked for: lower `{split}_tokens` to at most {has}"
    ) as error:
        write_tokens(tmp_path / "t", CORPUS, description, **_settings(**{f"{split}_tokens": 1000}))
    assert error.value.exit_code == 1


def test_a_corpus_too_short_names_the_limit_per_document_if_set(description, tmp_path):
    with pytest.raises(
        SaeensError, match=r"has 11 .* packing: document, windows_per_document: 1 and .* at most 11, or raise `windows_per_document`"
    ):
        write_tokens(tmp_path / "t", CORPUS, description, **_settings(train_tokens=1000, windows_per_document=1))


def test_free_disk_is_compared_with_the_required_bytes_before_writing(description, tmp_path, monkeypatch):
    needed = (5 + 2) * (2 + 1 + 4 + 4)  # rows; token, kept, document and position of each
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**6, 0, free))
    with pytest.raises(SaeensError, match=f"writing tokens needs {needed} bytes in .*, where {free} bytes are free"):
        write_tokens(tmp_path / "t", CORPUS, description, **_settings())
    assert not (tmp_path / "t").exists()
    free = needed
    assert write_tokens(tmp_path / "t", CORPUS, description, **_settings()).train.rows == 5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_tokens": 0}, "train_tokens: 0"),
        ({"test_tokens": -3}, "test_tokens: -3"),
        ({"context_length": 17}, "context_length: 17 .*takes 2 to 16"),
        ({"context_length": 1}, "context_length: 1 "),
        ({"packing": "dense"}, "packing: 'dense' .*document, concatenate"),
        ({"drop": ["last"]}, "drop: 'last' .*special, padding, first"),
        ({"windows_per_document": 0}, "windows_per_document: 0 .*at least 1"),
        ({"windows_per_document": 2, "packing": "concatenate"}, "windows_per_document: 2 is for packing: document"),
    ],
)
def test_invalid_token_settings_are_refused_before_anything_is_written(description, tmp_path, changed, message):
    with pytest.raises(ConfigurationError, match=message):
        write_tokens(tmp_path / "t", CORPUS, description, **_settings(**changed))
    assert not (tmp_path / "t").exists()


def test_concatenate_needs_an_end_of_text_token(tmp_path):
    path = write_tiny_model(tmp_path / "model")
    edit_config(path, eos_token_id=None)
    with pytest.raises(ConfigurationError, match="eos_token_id"):
        write_tokens(tmp_path / "t", CORPUS, describe_language_model(str(path)), **_settings(packing="concatenate"))


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    path = write_tiny_model(tmp_path / "model")
    edit_config(path, vocab_size=60)
    with pytest.raises(ConfigurationError, match="not of one model"):
        write_tokens(tmp_path / "t", CORPUS, describe_language_model(str(path)), **_settings())


def test_a_broken_tokenizer_is_named(tmp_path):
    path = write_tiny_model(tmp_path / "model")
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigurationError, match=r"tokenizer\.json is not a tokenizer"):
        write_tokens(tmp_path / "t", CORPUS, describe_language_model(str(path)), **_settings())


def test_missing_tokens_cannot_be_opened(tmp_path):
    with pytest.raises(SaeensError, match="holds no tokens"):
        open_tokens(tmp_path / "nothing")
