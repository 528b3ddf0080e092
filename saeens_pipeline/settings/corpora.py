"""Settings of `corpus`, the texts of a source. `language_models` reads the texts."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from saeens_pipeline.settings.from_file import Distinct, FromFile, Section

BUILTIN_CORPUS, BUILTIN_PROSE = BUILTIN_CORPORA = "builtin/installed_packages", "builtin/prose"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_COLUMNS_OF_DOCUMENTS = ("split", "document", "name")  # of documents.parquet, which has a column for each label as well


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
    label_fields: Annotated[list[str], AfterValidator(_label_names), Distinct] = Field([], description="record fields of the labels")
    test_share: float = Field(
        0.05, gt=0, lt=1, description="share of documents held out by a hash of their names, if there is no test split"
    )


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
            f"corpus {name!r} is not known; it can be {BUILTIN_CORPUS}, {BUILTIN_PROSE}, {{name: DATASET, split: train}} of the hub, or "
            "{files: PATTERN}"
        )
    return name


def _kind_of_corpus(corpus: Any) -> str:
    if isinstance(corpus, dict):
        return "files" if "files" in corpus else "dataset"
    return next((kind for kind, model in CORPORA.items() if isinstance(corpus, model)), "builtin")


CORPORA: dict[str, type[Section]] = {"files": TextFiles, "dataset": HubDataset}
"""Models of the corpora with fields, by the tag that pydantic adds to the location of an error."""

Corpus = Annotated[
    Annotated[str, AfterValidator(_builtin), Tag("builtin")] | Annotated[TextFiles, Tag("files")] | Annotated[HubDataset, Tag("dataset")],
    Discriminator(_kind_of_corpus),
]
