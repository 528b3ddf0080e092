"""The activations of texts that are looked at one by one, as probes need them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.tokens import Drop, load_tokenizer, special_ids

if TYPE_CHECKING:
    from saeens_models.probing import TextBatch
    from saeens_pipeline.language_models.descriptions import LanguageModelDescription
    from saeens_pipeline.language_models.language_model import LanguageModel


_TOKENISED_AT_ONCE = 1000


class EncodedText(NamedTuple):
    """The tokens of a text, and which of them count."""

    tokens: list[int]
    kept: list[bool]


def encode_texts(
    description: LanguageModelDescription, texts: Sequence[str], *, context_length: int, drop: Collection[Drop]
) -> list[EncodedText]:
    """The tokens of texts, as `TextActivations` takes them. Raises SaeensError for a text of which nothing counts."""
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
    """Batches of texts, each by its activations at `hook` of one layer, at the tokens that count.

    A text is cut to its first `context_length` tokens, the special ones that the tokenizer adds included. Left out are special
    tokens, padding, and the positions that the source of the SAEs drops. Batches have texts of like length, so that little is padding:
    `order` holds the numbers of the texts, batch after batch. Memory: token ids of all texts, and one batch in the model.
    `report` is told how many texts each batch had. Raises SaeensError for a text of which nothing counts.
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
        report: Callable[[int], object] = lambda n_texts: None,
    ) -> None:
        self._model, self._hook, self._layer, self._report = model, hook, layer, report
        encoded = encode_texts(model.description, texts, context_length=context_length, drop=drop)
        self.order = sorted(range(len(texts)), key=lambda number: len(encoded[number].tokens))
        in_order = [encoded[number] for number in self.order]
        self._batches = [in_order[first : first + batch_texts] for first in range(0, len(in_order), batch_texts)]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> TextBatch:
        import torch

        from saeens_models.probing import TextBatch

        batch = self._batches[index]
        shape = len(batch), max(len(each.tokens) for each in batch)
        tokens, kept = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for row, each in enumerate(batch):
            tokens[row, : len(each.tokens)] = torch.tensor(each.tokens)
            kept[row, : len(each.kept)] = torch.tensor(each.kept)
        activations = self._model.activations(tokens, self._hook, [self._layer])[self._layer]
        self._report(len(batch))
        return TextBatch(activations[kept.to(activations.device)].float(), kept.sum(1))
