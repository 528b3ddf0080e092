"""Activations of single texts: the counted tokens, for any batching."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import CONTEXT_LENGTH, END_OF_TEXT
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.models import describe_language_model
from saeens_pipeline.language_models.text_activations import TextActivations

TEXTS = ["def f(x): return x", "short", "a text of more than sixteen bytes", "ab", "<|endoftext|>in front"]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return load_language_model(describe_language_model(str(tiny_model)))


def _alone(model: LanguageModel, text: str, kept: slice) -> torch.Tensor:
    """The text's activations by itself: one token per byte, the first sixteen of them."""
    tokens = torch.tensor([Tokenizer.from_file(str(model.description.path / "tokenizer.json")).encode(text).ids[:CONTEXT_LENGTH]])
    return model.activations(tokens, "resid_post", [1])[1][0][kept]


@pytest.mark.parametrize(("drop", "first"), [((), 0), (("first",), 1), (("special",), 0)])
def test_a_text_has_the_activations_of_its_counted_tokens(model: LanguageModel, drop: tuple[str, ...], first: int):
    texts = TEXTS[:4]
    batches = TextActivations(model, "resid_post", 1, texts, context_length=128, drop=drop, batch_texts=3)  # pyright: ignore[reportArgumentType]
    found = [text for i in range(len(batches)) for text in batches[i].x.split(batches[i].lengths.tolist())]
    assert sorted(batches.order) == [0, 1, 2, 3]
    for number, x in zip(batches.order, found, strict=True):
        torch.testing.assert_close(x, _alone(model, texts[number], slice(first, None)))


def test_texts_get_the_token_that_the_source_puts_before_its_windows(model: LanguageModel):
    settings: dict[str, Any] = {"context_length": 6, "drop": (), "batch_texts": 3, "prepend_bos": True}
    batches = TextActivations(model, "resid_post", 1, ["a longer text", TEXTS[4]], **settings)
    assert batches[0].lengths.tolist() == [5, 5]
    expected = [_alone(model, text, slice(1, 6)) for text in ("<|endoftext|>a longer text", TEXTS[4])]  # the second has it already
    torch.testing.assert_close(batches[0].x, torch.cat([expected[number] for number in batches.order]))


def test_special_tokens_are_never_counted(model: LanguageModel):
    batches = TextActivations(model, "resid_post", 1, TEXTS[4:], context_length=6, drop=(), batch_texts=3)
    torch.testing.assert_close(batches[0].x, _alone(model, TEXTS[4], slice(1, 6)))


def test_special_tokens_of_the_tokenizer_are_part_of_the_context(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny_model.iterdir():
        (folder / file.name).symlink_to(file)
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", END_OF_TEXT)])
    (folder / "tokenizer.json").unlink()
    tokenizer.save(str(folder / "tokenizer.json"))
    model = load_language_model(describe_language_model(str(folder)))
    batches = TextActivations(model, "resid_post", 1, ["short"], context_length=4, drop=(), batch_texts=3)
    assert batches[0].lengths.tolist() == [3]
    torch.testing.assert_close(batches[0].x, _alone(model, "short", slice(1, 4)))


def test_a_text_without_counted_tokens_is_named(model: LanguageModel):
    with pytest.raises(SaeensError, match=r"the text 'x' has no token that counts"):
        TextActivations(model, "resid_post", 1, ["xy", "x"], context_length=6, drop=("first",), batch_texts=3)
