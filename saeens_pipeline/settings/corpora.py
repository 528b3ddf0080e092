"""Settings of `corpus`, the texts of a source. `language_models` reads the texts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    field_validator,
    model_serializer,
    model_validator,
)

from saeens_pipeline.settings.from_file import Distinct, FromFile, Section

BUILTIN_CORPUS, BUILTIN_PROSE = BUILTIN_CORPORA = "builtin/installed_packages", "builtin/prose"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = re.compile(r"[*?\[]|^[./~]|\.(jsonl|ndjson|csv|parquet|txt|md)(\.gz|\.zst)?$", re.I)  # what names of data sets do not have
_COLUMNS_OF_DOCUMENTS = ("split", "document", "name")  # of documents.parquet, which has a column for each label as well
CORPUS_LABEL = "corpus"
"""Column of documents.parquet with the corpus of each document of a mixed corpus."""


def is_hub_name(name: str) -> bool:
    """Return whether the Hugging Face hub can have a model or data set of this name."""
    return _HUB_NAME.fullmatch(name) is not None


def _label_names(fields: list[str]) -> list[str]:
    for taken in sorted(set(fields) & set(_COLUMNS_OF_DOCUMENTS)):
        raise ValueError(f"{taken!r} is the name of another column")
    return fields


class RecordSettings(Section):
    """Fields of a corpus of records. A dot selects a nested field: `meta.pile_set_name`."""

    text_field: str = Field("text", min_length=1, description="record field of the text")
    messages_field: str | None = Field(
        None,
        min_length=1,
        description="record field of a conversation, instead of text_field: a list of messages with role and content, as the chat template "
        "of the language model's tokenizer writes them",
    )
    label_fields: Annotated[list[str], AfterValidator(_label_names), Distinct] = Field([], description="record fields of the labels")
    test_share: float = Field(
        0.05, gt=0, lt=1, description="share of documents held out by a hash of their names, if there is no test split"
    )

    @model_validator(mode="after")
    def _one_field(self) -> RecordSettings:
        if self.messages_field is not None and "text_field" in self.model_fields_set:
            raise ValueError("text_field and messages_field exclude each other: a document is a text or a conversation; remove one of them")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_fields(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `messages_field` unless it is used, so that older recipes stay valid, and then the text's field."""
        return {
            key: value for key, value in dump(self).items() if key != ("messages_field" if self.messages_field is None else "text_field")
        }


class TextFiles(RecordSettings, FromFile):
    """A corpus of local files."""

    files: str | list[str] = Field(description="paths or patterns with * and ** of the training files")
    test_files: str | list[str] | None = Field(
        None, description="paths or patterns of the test files; default: test_share of the documents"
    )

    @field_validator("files", "test_files")
    @classmethod
    def _some_path(cls, files: str | list[str] | None) -> str | list[str] | None:
        if files is not None and not (files and all([files] if isinstance(files, str) else files)):
            raise ValueError("expected at least one file")
        return files

    def __str__(self) -> str:
        return self.files if isinstance(self.files, str) else ", ".join(self.files)


class HubDataset(RecordSettings):
    """A corpus from a data set of the Hugging Face hub."""

    name: str = Field(description="name of the data set: owner/name")
    subset: str | None = Field(None, description="configuration of the data set; default: its only one")
    split: str = Field("train", min_length=1, description="split of the training documents, or name of their files")
    test_split: str | None = Field(None, min_length=1, description="split of the test documents; default: test_share of the documents")
    revision: str = Field("main", min_length=1, description="branch, tag or commit")

    @field_validator("name")
    @classmethod
    def _can_be(cls, name: str) -> str:
        if not is_hub_name(name):
            raise ValueError("not a valid name of a data set on the hub, such as monology/pile-uncopyrighted")
        return name

    @model_validator(mode="after")
    def _disjoint(self) -> HubDataset:
        if self.test_split == self.split:
            raise ValueError(f"split and test_split are both {self.split}: no document may be in both; remove test_split")
        return self

    def __str__(self) -> str:
        return self.name if self.subset is None else f"{self.name}, {self.subset}"


def _builtin(name: str) -> str:
    if name not in BUILTIN_CORPORA:
        raise ValueError(
            f"corpus {name!r} is not known; it can be {BUILTIN_CORPUS}, {BUILTIN_PROSE}, {{name: DATASET, split: train}} of the hub, "
            "{files: PATTERN}, or a list of corpora with weights"
        )
    return name


class WeightedCorpus(Section):
    """A builtin corpus in a mixed one."""

    corpus: Annotated[str, AfterValidator(_builtin)] = Field(
        description="a builtin corpus; in an entry for files, their path or pattern (instead of files:); for a data set, its name "
        "(instead of name:)"
    )
    weight: float = Field(1.0, gt=0, description="share of the activation rows, relative to the other weights, of both splits")

    def __str__(self) -> str:
        return self.corpus


class WeightedFiles(TextFiles):
    """Local files in a mixed corpus."""

    weight: float = Field(1.0, gt=0, description="as of WeightedCorpus")


class WeightedDataset(HubDataset):
    """A data set of the hub in a mixed corpus."""

    weight: float = Field(1.0, gt=0, description="as of WeightedCorpus")


def _spelled_out(entry: Any) -> Any:
    """Return an entry of a mixed corpus with `corpus: data/my.jsonl` as `files`, and `corpus: owner/name` as `name`."""
    if isinstance(entry, str):
        raise ValueError(f"an entry of a list has fields: write {{corpus: {entry}, weight: 1}}")
    if isinstance(entry, dict) and not entry.keys() & {"corpus", "files", "name"}:
        raise ValueError("it names no corpus: add corpus: with a builtin corpus, a file or pattern, or a data set of the hub")
    key = _key_of_corpus(entry)
    return entry if key == "corpus" else {key: entry["corpus"]} | {name: value for name, value in entry.items() if name != "corpus"}


def _key_of_corpus(entry: Any) -> str:
    """Return the field that the value of `corpus` in an entry of a mixed corpus belongs to."""
    corpus = entry.get("corpus") if isinstance(entry, dict) and not entry.keys() & {"files", "name"} else None
    if isinstance(corpus, dict):
        raise ValueError("write the fields of this corpus beside weight, without corpus:")
    if not isinstance(corpus, str) or corpus.startswith("builtin/"):
        return "corpus"
    return "files" if _FILES.search(corpus) else "name"


def _kind_of_corpus(corpus: Any) -> str:
    if isinstance(corpus, list):
        return "mixture"
    if isinstance(corpus, dict):
        return "files" if "files" in corpus else "dataset"
    return next((kind for kind, model in _SINGLE.items() if isinstance(corpus, model)), "builtin")


def _kind_of_entry(entry: Any) -> str:
    if isinstance(entry, dict):
        return "builtin" if "corpus" in entry and not entry.keys() & {"files", "name"} else _kind_of_corpus(entry)
    return "builtin" if isinstance(entry, WeightedCorpus) else _kind_of_corpus(entry)


_SINGLE: dict[str, type[Section]] = {"files": TextFiles, "dataset": HubDataset}
_IN_MIXTURE: dict[str, type[Section]] = {"files": WeightedFiles, "dataset": WeightedDataset, "builtin": WeightedCorpus}


def allowed_corpus_keys(corpus: dict[str, Any], *, is_entry: bool = False) -> list[str]:
    """Return the fields that a corpus can have, by the ones that it has. `is_entry`: it is in a list."""
    if not is_entry:
        return list(_SINGLE[_kind_of_corpus(corpus)].model_fields)
    key = "corpus" if isinstance(corpus.get("corpus"), dict) else _key_of_corpus(corpus)
    kind = _kind_of_entry(corpus) if key == "corpus" else {"files": "files", "name": "dataset"}[key]
    return ["corpus" if name == key else name for name in _IN_MIXTURE[kind].model_fields]


def corpus_location(location: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return the location of an error inside `corpus` without the kinds of corpora that pydantic adds."""
    if location[1:2] != ("mixture",):
        return (location[0], *location[2:])
    return (location[0], *location[2:3], *location[4:])


def _different(entries: list[Any]) -> list[Any]:
    without_weights = [each.model_dump(exclude={"weight"}) for each in entries]
    for i, each in enumerate(without_weights):
        if each in without_weights[:i]:
            raise ValueError(f"{entries[i]} is given twice: give it once, with the sum of the weights")
    for each in entries:
        if CORPUS_LABEL in getattr(each, "label_fields", ()):
            raise ValueError(f"label_fields of {each}: {CORPUS_LABEL!r} is the name of another column")
    return entries


_Entry = Annotated[
    Annotated[WeightedCorpus, Tag("builtin")] | Annotated[WeightedFiles, Tag("files")] | Annotated[WeightedDataset, Tag("dataset")],
    Discriminator(_kind_of_entry),
    BeforeValidator(_spelled_out),
]
SingleCorpus = str | TextFiles | HubDataset | WeightedCorpus
Corpus = Annotated[
    Annotated[str, AfterValidator(_builtin), Tag("builtin")]
    | Annotated[TextFiles, Tag("files")]
    | Annotated[HubDataset, Tag("dataset")]
    | Annotated[list[_Entry], Field(min_length=2), AfterValidator(_different), Tag("mixture")],
    Discriminator(_kind_of_corpus),
]


def parts_of(corpus: SingleCorpus | Sequence[SingleCorpus]) -> list[SingleCorpus]:
    """Return the entries of a mixed corpus, and a single corpus as a list of one."""
    return list(cast("Sequence[SingleCorpus]", corpus)) if isinstance(corpus, list) else [cast("SingleCorpus", corpus)]


def shares_of(corpora: Sequence[SingleCorpus]) -> dict[str, float]:
    """Return the share of each corpus by its name; of several with one name, such as splits of a data set, the later ones are numbered."""
    weights = [getattr(each, "weight", 1.0) for each in corpora]
    names = [str(each) for each in corpora]
    numbers = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return {
        name if number == 1 else f"{name} ({number})": weight / sum(weights)
        for name, number, weight in zip(names, numbers, weights, strict=True)
    }


def corpus_name(corpus: SingleCorpus | Sequence[SingleCorpus]) -> str:
    """Return the name of a corpus; of a mixed one, the names and shares of its corpora."""
    parts = parts_of(corpus)
    return " + ".join(f"{share:.3g} {name}" for name, share in shares_of(parts).items()) if isinstance(corpus, list) else str(parts[0])


def has_messages(corpus: SingleCorpus | Sequence[SingleCorpus]) -> bool:
    """Return whether a corpus, or one of its corpora, has conversations, which need a chat template."""
    return any(getattr(each, "messages_field", None) is not None for each in parts_of(corpus))


def is_on_hub(corpus: SingleCorpus | Sequence[SingleCorpus]) -> bool:
    """Return whether a corpus, or one of its corpora, is a data set of the hub."""
    return any(isinstance(each, HubDataset) for each in parts_of(corpus))
