"""`corpus: {name: monology/pile-uncopyrighted, split: train, test_split: test}`: a data set of the Hugging Face hub, read as a stream.

`datasets` (the extra `hub`) reads it without running scripts of the data set. Only the records that are read are downloaded, and none are
kept; reading ends when there are enough tokens. Documents have the order of the data set.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import huggingface_hub

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import hub
from saeens_pipeline.language_models.documents import READER_VERSION, Document, RecordCorpus, Split
from saeens_pipeline.settings.corpora import HubDataset

if TYPE_CHECKING:
    from datasets import IterableDataset  # pyright: ignore[reportMissingImports]

_INSTALL = "install them with `pip install --constraint constraints.txt --editable '.[hub]'`"


class HubCorpus(RecordCorpus[HubDataset]):
    """Documents of a data set on the hub."""

    @property
    def identity(self) -> dict[str, object]:
        commit = hub.resolve_commit(self.settings.name, self.settings.revision, "dataset")
        parts = {"subset": self.settings.subset, "split": self.settings.split, "test_split": self.settings.test_split}
        return self.settings_that_decide | parts | {"corpus": self.settings.name, "reader": READER_VERSION, "revision": commit}

    def require_readable(self) -> None:
        """Read the first document of every split. Raises ConfigurationError for a missing data set, subset, split or package.

        Raises SaeensError for a first record without the text, and if the hub cannot be reached.
        """
        for split in filter(None, (self.settings.split, self.settings.test_split)):
            next(self._documents(split), None)

    def documents(self, split: Split) -> Iterator[Document]:
        if self.settings.test_split is not None:
            return self.with_text(self._documents(self.settings.test_split if split == "test" else self.settings.split), split)
        return self.with_text(self.held_out(self._documents(self.settings.split), split), split)

    def _documents(self, split: str) -> Iterator[Document]:
        records = self._records(split)
        with hub.explained(self.settings.name, self.settings.revision, "dataset"):
            place = f"data set {self.settings.name}, {split}, record "
            yield from self.documents_of(enumerate(records, start=1), f"{self.settings.name}/{split}", place)

    def _records(self, split: str) -> IterableDataset:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
            from datasets.exceptions import DatasetsError  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigurationError(
                f"data set {self.settings.name!r}: reading data sets of the hub needs more packages: {_INSTALL}"
            ) from error
        commit = hub.resolve_commit(self.settings.name, self.settings.revision, "dataset")
        hub.download(self.settings.name, commit, ["README.md"], "dataset")  # raises the hub's reason for a refusal; datasets hides it
        load = partial(datasets.load_dataset, self.settings.name, split=split, revision=commit, streaming=True)
        with hub.explained(self.settings.name, self.settings.revision, "dataset"):
            try:
                records = load(name=self.settings.subset)
            except ValueError as error:  # no such subset or split; the message lists the existing ones
                files: list[str] = []
                if self.settings.subset is None:  # next to a folder `train`, datasets finds no files such as `test.jsonl.zst` of the Pile
                    there = huggingface_hub.HfApi().list_repo_files(self.settings.name, repo_type="dataset", revision=commit)
                    files = [file for file in there if "/" not in file and file.split(".", 1)[0] == split]
                if not files:
                    raise ConfigurationError(f"data set {self.settings.name!r}: {' '.join(str(error).split())}") from error
                records = load(data_files={split: files})
            except (DatasetsError, RuntimeError) as error:  # for example, a data set that is a script
                raise SaeensError(f"data set {self.settings.name!r} cannot be read by datasets: {error}") from error
        names = records.column_names or []
        columns = list(dict.fromkeys(field if field in names else field.split(".", 1)[0] for field in self.fields))
        return records.select_columns(columns) if set(columns) <= set(names) else records
