"""Documents of a corpus, each in the train or the test split.

The split is a property of the corpus: text that the embedded language model was not trained on is text that no SAE is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Document:
    """One text and what is known of it: `labels` say by field of what kind it is, for probes and for members that are trained on a part.

    Every document of a corpus has the same fields, in the same order; None is a document of which a field is not known.
    """

    name: str
    text: str
    labels: Mapping[str, str | None]


class Corpus(Protocol):
    """What a source reads.

    `identity` is for recipes: cheap, and another whenever the documents may have changed. `require_readable`
    finds out, before anything is spent, whether they can be read, and raises what `documents` would.
    """

    @property
    def identity(self) -> dict[str, object]: ...

    def require_readable(self) -> None: ...

    def documents(self, split: Split) -> Iterator[Document]: ...


def rank(name: str) -> float:
    """A number in [0, 1) that depends on the name alone: the order of documents, and which of them are held out."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
