"""Documents of a corpus, each in the train or the test split.

The corpus decides the split, so that the embedded language model and the SAEs have the same held-out documents.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.chat_templates import ChatTemplate
from saeens_pipeline.language_models.records import as_text, field_value, kind
from saeens_pipeline.settings.corpora import RecordSettings

READER_VERSION = 2  # increased with every change of the documents of given records
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
    has_special_tokens: bool = False
    """True if the text has its special tokens, such as that of the beginning: the tokenizer adds none."""


class Corpus(Protocol):
    """Documents of a source."""

    @property
    def identity(self) -> dict[str, object]:
        """Values that identify the documents in recipes. They differ if the documents may have changed. Cheap to compute."""
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
    """Base of corpora of records.

    A record with an empty text, a null, or no text is skipped and counted; the first one has to have the fields that the settings name.
    """

    settings: _Settings
    skipped: Counter[Split] = field(default_factory=Counter, compare=False)
    """Numbers of records without a text, of those that have been read."""
    template: ChatTemplate | None = field(default=None, compare=False)
    """For documents with `messages_field`; `identity` does not need it."""

    @property
    def settings_that_decide(self) -> dict[str, object]:
        """Settings of the corpus that are part of recipes."""
        return self.settings.model_dump(include=set(RecordSettings.model_fields))

    @property
    def fields(self) -> list[str]:
        """The fields of a record that are read."""
        return [self.settings.messages_field or self.settings.text_field, *self.settings.label_fields]

    def documents_of(self, numbered: Iterable[tuple[int, object]], name: str, place: str) -> Iterator[Document]:
        """Yield the documents of records, `NAME:NUMBER`. Raises as `document`, with `place` and the number."""
        for i, (number, record) in enumerate(numbered):
            yield self.document(f"{name}:{number}", record, f"{place}{number}", is_first=i == 0)

    def document(self, name: str, record: object, place: str, *, is_first: bool = True) -> Document:
        """Return the document of a record; its text is empty for a null, and where a later record has no text.

        Raises SaeensError, with `place`, for a record and a text of another type, for fields that the first record does not have, and for
        every conversation that is missing, empty or refused by the chat template.
        """
        if not isinstance(record, Mapping):
            raise SaeensError(f"{place}: a record has to be an object with fields, and this is {kind(record)}")
        values = {}
        for each in self.fields:
            try:
                values[each] = field_value(record, each)
            except KeyError as error:
                if is_first or each == self.settings.messages_field:
                    raise SaeensError(_missing(place, record, each, *error.args)) from None
                values[each] = None
        found = {each: as_text(values[each]) for each in self.settings.label_fields}
        labels = {each: None if value is None else str(value) for each, value in found.items()}
        if self.settings.messages_field is not None:
            return Document(name, self._written(values[self.settings.messages_field], place), labels, has_special_tokens=True)
        text = as_text(values[self.settings.text_field])
        text = "" if text is None else text
        if not isinstance(text, str):
            raise SaeensError(f"{place}: field {self.settings.text_field!r} is {kind(text)}, and it has to be a text")
        return Document(name, text, labels)

    def _written(self, messages: object, place: str) -> str:
        assert self.template is not None, "open_corpus() was given no chat template"
        try:
            return self.template.write(messages)
        except ValueError as error:
            raise SaeensError(f"{place}: field {self.settings.messages_field!r} {error}") from error

    def with_text(self, documents: Iterator[Document], split: Split) -> Iterator[Document]:
        """Yield the documents that have a text, and count the others."""
        for document in documents:
            if document.text:
                yield document
            else:
                self.skipped[split] += 1

    def held_out(self, documents: Iterator[Document], split: Split) -> Iterator[Document]:
        """Return the documents of one split, training or test. A hash of a document's name decides its split."""
        return (document for document in documents if (rank(document.name) < self.settings.test_share) == (split == "test"))


def _missing(place: str, record: object, field_name: str, part: str, inside: object) -> str:
    there = sorted(map(str, inside)) if isinstance(inside, Mapping) else []
    where = "" if inside is record else f" inside {field_name.rsplit(f'.{part}', 1)[0]!r}"
    names = ", ".join(there[:_SHOWN_FIELDS]) + (", ..." if len(there) > _SHOWN_FIELDS else "")
    return f"{place}: there is no field {part!r}{where}; there are: {names or 'none'}"
