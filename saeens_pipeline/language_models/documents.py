"""Documents of a corpus, each in the train or the test split.

The corpus decides the split, so that the embedded language model and the SAEs have the same held-out documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.settings.corpora import RecordSettings

READER_VERSION = 1  # increased with every change of the documents of given records
Split = Literal["train", "test"]
_SHOWN_FIELDS = 12
_Settings = TypeVar("_Settings", bound=RecordSettings)


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


@dataclass(frozen=True)
class RecordCorpus(Generic[_Settings]):
    """Base of corpora of records."""

    settings: _Settings

    @property
    def settings_that_decide(self) -> dict[str, object]:
        """Settings of the corpus that are part of recipes."""
        return {name: getattr(self.settings, name) for name in RecordSettings.model_fields}

    @property
    def columns(self) -> list[str]:
        """The top-level fields of a record that are read."""
        return list(dict.fromkeys(field.split(".", 1)[0] for field in (self.settings.text_field, *self.settings.label_fields)))

    def document(self, name: str, record: object, place: str) -> Document:
        """Return the document of a record. Raises SaeensError, with `place`, for a missing field and for a text that is not a string."""
        if not isinstance(record, Mapping):
            raise SaeensError(f"{place}: a record has to be an object with fields, and this is {_kind(record)}")
        text = _value(record, self.settings.text_field, place)
        if not isinstance(text, str):
            raise SaeensError(f"{place}: field {self.settings.text_field!r} is {_kind(text)}, and it has to be a text")
        labels = {field: _value(record, field, place) for field in self.settings.label_fields}
        return Document(name, text, {field: None if value is None else str(value) for field, value in labels.items()})

    def held_out(self, documents: Iterator[Document], split: Split) -> Iterator[Document]:
        """Return the documents of one split, training or test. A hash of a document's name decides its split."""
        return (document for document in documents if (rank(document.name) < self.settings.test_share) == (split == "test"))


def _value(record: Mapping[str, Any], field: str, place: str) -> Any:
    if field in record:
        return record[field]
    found: Any = record
    for part in field.split("."):
        if not isinstance(found, Mapping) or part not in found:
            there = sorted(map(str, found)) if isinstance(found, Mapping) else []
            inside = "" if found is record else f" inside {field.rsplit(f'.{part}', 1)[0]!r}"
            names = ", ".join(there[:_SHOWN_FIELDS]) + (", ..." if len(there) > _SHOWN_FIELDS else "")
            raise SaeensError(f"{place}: there is no field {part!r}{inside}; there are: {names or 'none'}")
        found = found[part]
    return found


def _kind(value: object) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
