"""Documents of a corpus, each in the train or the test split.

The corpus decides the split, so that the embedded language model and the SAEs have the same held-out documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Document:
    """One text with labels, by field, for probes and for members with their own documents.

    Every document of a corpus has the same fields, in the same order; the value of an unknown label is None.
    """

    name: str
    text: str
    labels: Mapping[str, str | None]


class Corpus(Protocol):
    """Documents of a source."""

    @property
    def identity(self) -> dict[str, object]:
        """Values for recipes, which change when the documents may have changed. Cheap to compute."""
        ...

    def require_readable(self) -> None:
        """Raise the errors of `documents` early, after reading as little as possible."""
        ...

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the documents of a split."""
        ...


def rank(name: str) -> float:
    """Return a hash of a name in [0, 1), for the order of documents and the choice of held-out ones."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
