"""`corpus: {files: "texts/*.jsonl.zst"}`: documents of local files, read as a stream.

A document is a line of a `.jsonl` (or `.ndjson`) file, a row of a `.csv` or `.parquet` file, or a whole `.txt` or `.md` file, whose labels
are the name of its folder. All formats except Parquet may be compressed (`.gz` or `.zst` at the end of the name). Documents have the order
of file names and, in a file, of the file; shuffle them first if they are sorted by kind. A file with several names, such as links, is read
once. Memory: one row group of a Parquet file, or one document.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.language_models import records
from saeens_pipeline.language_models.documents import READER_VERSION, Document, RecordCorpus, Split
from saeens_pipeline.language_models.fingerprints import fingerprint_once
from saeens_pipeline.settings.corpora import TextFiles

_FORMATS = (*records.ROWS, *records.TEXTS)
_HASHED_BYTES, _LEAST_HASHED_BYTES = 256 * 2**20, 64 * 2**10  # limit for all files together, but at least this much per file


class TextFileCorpus(RecordCorpus[TextFiles]):
    """Corpus of local text files: one document per line, row or file, by format."""

    @property
    def identity(self) -> dict[str, object]:
        train, test = self._chosen()
        budget = max(_HASHED_BYTES // (len(train) + len(test)), _LEAST_HASHED_BYTES)
        files = {name: fingerprint_once(path, budget) for name, path in (train | test).items()}
        return self.settings_that_decide | {"corpus": "files", "reader": READER_VERSION, "test_files": sorted(test), "files": files}

    def require_readable(self) -> None:
        """Raise ConfigurationError for missing files and unknown formats, SaeensError for an invalid first document of a split."""
        for files in filter(None, self._chosen()):
            next(self._documents(files), None)

    def documents(self, split: Split) -> Iterator[Document]:
        train, test = self._chosen()
        if test:
            return self.with_text(self._documents(test if split == "test" else train), split)
        return self.with_text(self.held_out(self._documents(train), split), split)

    def _documents(self, files: Mapping[str, Path]) -> Iterator[Document]:
        for name, path in files.items():
            if records.file_format(path, _FORMATS) in records.TEXTS:
                if self.settings.messages_field is not None:
                    raise ConfigurationError(
                        f"{records.shown(path)}: a whole text has no field {self.settings.messages_field!r}: conversations are records of "
                        ".jsonl or .parquet files"
                    )
                label = records.shown(path.parent.name)
                record = {self.settings.text_field: records.read_text(path)} | dict.fromkeys(self.settings.label_fields, label)
                found = [self.document(name, record, records.shown(path))]
            else:
                found = self.documents_of(records.read_records(path, self.fields), name, f"{records.shown(path)}:")
            yield from found

    def _chosen(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return train and test files by the name for documents: the path relative to the innermost common folder.

        There are no test files if test documents are held out by a hash.
        """
        train = self._found(self.settings.files)
        test = self._found(self.settings.test_files) if self.settings.test_files is not None else {}
        both = train.keys() & test.keys()
        if both:
            first = min(train[each] for each in both)
            raise ConfigurationError(
                f"corpus: {records.shown(first)} is among files and among test_files: no document may be in both splits"
            )
        root = Path(os.path.commonpath([path.parent for path in (*train.values(), *test.values())]))
        train_files, test_files = (
            {records.shown(path.relative_to(root).as_posix()): path for path in sorted(files.values())} for files in (train, test)
        )
        return train_files, test_files

    def _found(self, files: str | list[str]) -> dict[tuple[int, int], Path]:
        """Return files by device and inode: a file with several links is read once."""
        found: dict[tuple[int, int], Path] = {}
        for pattern in [files] if isinstance(files, str) else files:
            matching = records.find_files(pattern, self.settings.folder)
            if not matching:
                raise ConfigurationError(f"corpus: there is no file {records.shown(pattern)} in {records.shown(self.settings.folder)}")
            found = {key: min(path, found.get(key, path)) for key, path in (found | matching).items()}
        for path in sorted(found.values()):
            try:
                records.file_format(path, _FORMATS)
            except ConfigurationError as error:
                raise ConfigurationError(f"corpus: {error}") from None
        return found
