"""`corpus: {name: monology/pile-uncopyrighted, split: train, test_split: test}`: a data set of the Hugging Face hub, read as a stream.

`datasets` reads it (the extra `hub`); no script of the data set is run. Nothing is downloaded beyond what is read, and nothing kept:
reading ends where enough tokens are there. Documents come in the data set's own order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.corpora import Document, Split
from saeens_pipeline.language_models.records import READER_VERSION, RecordCorpus

if TYPE_CHECKING:
    from datasets import IterableDataset  # pyright: ignore[reportMissingImports]

_INSTALL = "install them with `pip install --constraint constraints.txt --editable '.[hub]'`"


class HubDataset(RecordCorpus):
    """The fields of a corpus that is a data set of the hub, and its documents."""

    name: str = Field(description="of the data set: owner/name")
    subset: str | None = Field(None, description="which of its configurations; none: the only one")
    split: str = Field("train", min_length=1, description="what documents are taken from: a split, or files called so")
    test_split: str | None = Field(None, min_length=1, description="the test split; none: documents are held out by a hash of their places")
    revision: str = Field("main", min_length=1, description="branch, tag or commit")

    @field_validator("name")
    @classmethod
    def _can_be(cls, name: str) -> str:
        if not hub.NAME.fullmatch(name):
            raise ValueError("not a name of a data set on the hub, such as monology/pile-uncopyrighted")
        return name

    @model_validator(mode="after")
    def _disjoint(self) -> HubDataset:
        if self.test_split == self.split:
            raise ValueError(f"split and test_split are both {self.split}: no document may be in both; leave test_split out")
        return self

    def __str__(self) -> str:
        return self.name if self.subset is None else f"{self.name}, {self.subset}"

    @property
    def identity(self) -> dict[str, object]:
        commit = hub.resolve_commit(self.name, self.revision, "dataset")
        parts = {"subset": self.subset, "split": self.split, "test_split": self.test_split}
        return self.settings_that_decide | parts | {"corpus": self.name, "reader": READER_VERSION, "revision": commit}

    def require_readable(self) -> None:
        """Read the first document of every split. Raises ConfigurationError for what the hub or the data set does not have."""
        for split in filter(None, (self.split, self.test_split)):
            next(self._documents(split), None)

    def documents(self, split: Split) -> Iterator[Document]:
        if self.test_split is not None:
            return self._documents(self.test_split if split == "test" else self.split)
        return self.held_out(self._documents(self.split), split)

    def _documents(self, split: str) -> Iterator[Document]:
        records = self._records(split)
        with hub.explained(self.name, self.revision, "dataset"):
            for number, record in enumerate(records, start=1):
                document = self.document(f"{self.name}/{split}:{number}", record, f"data set {self.name}, {split}, record {number}")
                if document.text:
                    yield document

    def _records(self, split: str) -> IterableDataset:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
            from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(f"data set {self.name!r}: reading data sets of the hub takes more packages: {_INSTALL}") from error
        commit = hub.resolve_commit(self.name, self.revision, "dataset")
        hub.download(self.name, commit, ["README.md"], "dataset")  # or the hub's reason why not, which datasets does not pass on
        load = partial(datasets.load_dataset, self.name, split=split, revision=commit, streaming=True)
        with hub.explained(self.name, self.revision, "dataset"):
            try:
                records = load(name=self.subset)
            except ValueError as error:  # no such subset or split: the message lists those that there are
                files = self._files_called(split, commit) if self.subset is None else []
                if not files:
                    raise ConfigurationError(f"data set {self.name!r}: {' '.join(str(error).split())}") from error
                records = load(data_files={split: files})
            except (DatasetsError, RuntimeError) as error:  # among others, a data set that is a script
                raise SaeensError(f"data set {self.name!r} cannot be read by datasets: {error}") from error
        complete = set(self.columns) <= set(records.column_names or [])
        return records.select_columns(self.columns) if complete else records

    def _files_called(self, split: str, commit: str) -> list[str]:
        """Files beside the folders, such as `test.jsonl.zst` of the Pile: beside a folder `train`, datasets knows no other split."""
        from huggingface_hub import HfApi

        files = HfApi().list_repo_files(self.name, repo_type="dataset", revision=commit)
        return [file for file in files if "/" not in file and file.split(".", 1)[0] == split]
