"""What corpora of records share: which field is the text, which are labels, and which documents are held out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.corpora import Document, Split, rank

READER_VERSION = 1  # raised whenever the documents that records give would change
_COLUMNS_OF_DOCUMENTS = ("split", "document", "name")  # of documents.parquet, where labels are columns beside them
_SHOWN_FIELDS = 12


def _label_names(fields: list[str]) -> list[str]:
    taken = sorted(set(fields) & set(_COLUMNS_OF_DOCUMENTS))
    if taken or len(set(fields)) < len(fields):
        raise ValueError(f"{taken[0]!r} is what another column is called" if taken else f"{fields} names something twice")
    return fields


class RecordCorpus(BaseModel):
    """Fields of a corpus whose documents are records. A field inside another is written with a dot: `meta.pile_set_name`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text_field: str = Field("text", min_length=1, description="the text of a record")
    label_fields: Annotated[list[str], AfterValidator(_label_names)] = Field([], description="what is kept of a record, to choose by")
    test_share: float = Field(0.05, gt=0, lt=1, description="of documents, held out by a hash of their names where no test split is given")

    @property
    def settings_that_decide(self) -> dict[str, object]:
        """Those of its settings that recipes hold."""
        return {name: getattr(self, name) for name in RecordCorpus.model_fields}

    @property
    def columns(self) -> list[str]:
        """The outermost fields that are read."""
        return list(dict.fromkeys(field.split(".", 1)[0] for field in (self.text_field, *self.label_fields)))

    def document(self, name: str, record: object, place: str) -> Document:
        """Make a document of a record. Raises SaeensError, with the place, for a field that is not there and a text that is none."""
        if not isinstance(record, Mapping):
            raise SaeensError(f"{place}: a record has to be an object with fields, and this is {_kind(record)}")
        text = _value(record, self.text_field, place)
        if not isinstance(text, str):
            raise SaeensError(f"{place}: field {self.text_field!r} is {_kind(text)}, and it has to be a text")
        labels = {field: _value(record, field, place) for field in self.label_fields}
        return Document(name, text, {field: None if value is None else str(value) for field, value in labels.items()})

    def held_out(self, documents: Iterator[Document], split: Split) -> Iterator[Document]:
        """Those of the documents that a hash of the name puts into the split."""
        return (document for document in documents if (rank(document.name) < self.test_share) == (split == "test"))


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
