"""Corpora of records: text field, labels and held-out documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.documents import Document, Split, rank
from saeens_pipeline.settings.corpora import RecordSettings

READER_VERSION = 1  # increased with every change of the documents of given records
_SHOWN_FIELDS = 12


class RecordCorpus:
    """Base of corpora of records."""

    def __init__(self, settings: RecordSettings) -> None:
        self._record = settings

    @property
    def settings_that_decide(self) -> dict[str, object]:
        """The settings that recipes hold."""
        return {name: getattr(self._record, name) for name in RecordSettings.model_fields}

    @property
    def columns(self) -> list[str]:
        """The top-level fields of a record that are read."""
        return list(dict.fromkeys(field.split(".", 1)[0] for field in (self._record.text_field, *self._record.label_fields)))

    def document(self, name: str, record: object, place: str) -> Document:
        """Return the document of a record. Raises SaeensError, with `place`, for a missing field and for a text that is not a string."""
        if not isinstance(record, Mapping):
            raise SaeensError(f"{place}: a record has to be an object with fields, and this is {_kind(record)}")
        text = _value(record, self._record.text_field, place)
        if not isinstance(text, str):
            raise SaeensError(f"{place}: field {self._record.text_field!r} is {_kind(text)}, and it has to be a text")
        labels = {field: _value(record, field, place) for field in self._record.label_fields}
        return Document(name, text, {field: None if value is None else str(value) for field, value in labels.items()})

    def held_out(self, documents: Iterator[Document], split: Split) -> Iterator[Document]:
        """Return the documents of a split, which a hash of their names decides."""
        return (document for document in documents if (rank(document.name) < self._record.test_share) == (split == "test"))


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
