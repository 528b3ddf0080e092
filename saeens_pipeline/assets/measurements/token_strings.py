"""Texts of single tokens."""

from __future__ import annotations

import json
import re
from functools import cache

import numpy as np
from tokenizers import Tokenizer
from torch import Tensor
from transformers.convert_slow_tokenizer import bytes_to_unicode

from saeens_pipeline.assets.registry import Making
from saeens_pipeline.assets.sources import language_model_of
from saeens_pipeline.language_models.tokens import TokenStore, load_tokenizer, open_tokens
from saeens_pipeline.storage.activations import ActivationStore

_REPLACEMENT = "\ufffd"  # decoded from bytes that are no character
_BYTE = re.compile("<0x[0-9A-F]{2}>")


def open_test_tokens(making: Making) -> TokenStore:
    """Open the tokens, with those test positions kept that have an activation row."""
    dropped = ActivationStore(making.require(making.subject.activations).path).dropped("test")
    return open_tokens(making.require(making.subject.tokens).path, {"test": dropped})


class TokenStrings:
    """Texts of test tokens, each decoded alone by the language model's tokenizer. Parts of a character are bytes such as `<0xE2>`."""

    def __init__(self, making: Making) -> None:
        self.store = open_test_tokens(making)
        self._tokenizer = load_tokenizer(language_model_of(making.require(making.subject.tokens)))
        self._literals: dict[int, str] = {}

    @property
    def vocab_size(self) -> int:
        """Return the number of the tokenizer's tokens; the language model's vocabulary may be larger."""
        return self._tokenizer.get_vocab_size()

    def literals(self, ids: np.ndarray) -> list[str]:
        """Return these token ids `[n]` as JSON strings."""
        return [self._literal(token) for token in ids.tolist()]

    def _literal(self, token: int) -> str:
        if token not in self._literals:
            self._literals[token] = json.dumps(token_text(self._tokenizer, token), ensure_ascii=False)
        return self._literals[token]

    def lists(self, rows: Tensor) -> list[str]:
        """Return for each feature a JSON list of the tokens of activation rows `[n_features, n]`; -1 is no row."""
        wanted, place = np.unique(rows.cpu().numpy(), return_inverse=True)
        ids = np.full(len(wanted), -1)
        ids[wanted >= 0] = self.store.token_ids("test", wanted[wanted >= 0])
        return [f"[{', '.join(self.literals(of_feature[of_feature >= 0]))}]" for of_feature in ids[place.reshape(tuple(rows.shape))]]


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """Return the text of a single token. Bytes of an incomplete UTF-8 character are written as `<0xE2>`, like SentencePiece's byte tokens.

    For tokenizers without byte tokens, the decoded text is returned unchanged.
    """
    text, name = tokenizer.decode([token], skip_special_tokens=False), tokenizer.id_to_token(token)
    if _REPLACEMENT not in text or name is None:
        return text
    if _BYTE.fullmatch(name):
        return name
    try:
        data = bytes(_bytes_of_characters()[character] for character in name)
    except KeyError:
        return text
    return re.sub("[\udc80-\udcff]", lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>", data.decode(errors="surrogateescape"))


@cache
def _bytes_of_characters() -> dict[str, int]:
    """Return the bytes by the characters that stand for them in names of byte-level tokens."""
    return {character: byte for byte, character in bytes_to_unicode().items()}
