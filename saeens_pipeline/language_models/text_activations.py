"""Activations of single texts, for probes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch

from saeens_models.probing import TextBatch
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.tokens import Drop, load_tokenizer, special_ids

_TOKENISED_AT_ONCE = 1000


class EncodedText(NamedTuple):
    """Token ids of a text, and a mask of the kept tokens."""

    tokens: list[int]
    kept: list[bool]


def encode_texts(
    description: LanguageModelDescription, texts: Sequence[str], *, context_length: int, drop: Collection[Drop]
) -> list[EncodedText]:
    """Return the tokens of texts, cut to `context_length`. Raises SaeensError for a text without a kept token."""
    tokenizer = load_tokenizer(description)
    tokenizer.enable_truncation(min(context_length, description.context_length))
    never = set(special_ids(tokenizer, description).tolist())
    encoded: list[EncodedText] = []
    for first in range(0, len(texts), _TOKENISED_AT_ONCE):
        for encoding in tokenizer.encode_batch_fast(list(texts[first : first + _TOKENISED_AT_ONCE])):
            kept = [token not in never and not (place == 0 and "first" in drop) for place, token in enumerate(encoding.ids)]
            encoded.append(EncodedText(encoding.ids, kept))
    empty = next((text for text, each in zip(texts, encoded, strict=True) if not any(each.kept)), None)
    if empty is not None:
        raise SaeensError(f"the text {empty[:60]!r} has no token that counts for {description.name}: leave such short texts out")
    return encoded


class TextActivations:
    """Batches of texts with the activations of their kept tokens at `hook` of one layer.

    A text is cut to its first `context_length` tokens, including the special tokens that the tokenizer adds. Special tokens, padding and
    the positions that the source of the SAEs drops are not kept. Tokens with a norm above `norm_limit` are not kept either, unless a text
    has no others. Batches have texts of similar length, to limit padding: `order` holds the indices of the texts, batch after batch.
    Memory: token ids of all texts, and one batch in the model. `report` gets the number of texts of each batch. Raises SaeensError for a
    text without a kept token.
    """

    def __init__(
        self,
        model: LanguageModel,
        hook: str,
        layer: int,
        texts: Sequence[str],
        *,
        context_length: int,
        drop: Collection[Drop],
        batch_texts: int,
        norm_limit: float | None = None,
        report: Callable[[int], object] = lambda n_texts: None,
    ) -> None:
        self._model, self._hook, self._layer, self._norm_limit, self._report = model, hook, layer, norm_limit, report
        encoded = encode_texts(model.description, texts, context_length=context_length, drop=drop)
        self.order = sorted(range(len(texts)), key=lambda number: len(encoded[number].tokens))
        in_order = [encoded[number] for number in self.order]
        self._batches = [in_order[first : first + batch_texts] for first in range(0, len(in_order), batch_texts)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> TextBatch:
        batch = self._batches[index]
        shape = len(batch), max(len(each.tokens) for each in batch)
        tokens, kept = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for row, each in enumerate(batch):
            tokens[row, : len(each.tokens)] = torch.tensor(each.tokens)
            kept[row, : len(each.kept)] = torch.tensor(each.kept)
        activations = self._model.activations(tokens, self._hook, [self._layer])[self._layer]
        kept = kept.to(activations.device)
        if self._norm_limit is not None:
            within = kept & (torch.linalg.vector_norm(activations.float(), dim=-1) <= self._norm_limit)
            kept = torch.where(within.any(1, keepdim=True), within, kept)
        self._report(len(batch))
        return TextBatch(activations[kept].float(), kept.sum(1).cpu())
