"""`corpus: {files: "texts/*.jsonl.zst"}`: documents of local files, read as a stream.

A document is a line of a `.jsonl` file, a row of a `.parquet` file, or a whole `.txt` or `.md` file, whose labels are the name of its
folder. All formats except Parquet may be compressed (`.gz` or `.zst` at the end of the name). Documents have the order of file names and,
in a file, of the file; shuffle them first if they are sorted by kind. Memory: one row group of a Parquet file, or one document.
"""

from __future__ import annotations

import glob
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.documents import READER_VERSION, Document, RecordCorpus, Split
from saeens_pipeline.language_models.fingerprints import fingerprint_once
from saeens_pipeline.settings.corpora import TextFiles

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_TEXTS = (".txt", ".md")
_FORMATS = (".jsonl", ".parquet", *_TEXTS)
_HASHED_BYTES, _LEAST_HASHED_BYTES = 256 * 2**20, 64 * 2**10  # limit for all files together, but at least this much per file
_BATCH_ROWS = 1000


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
            return self._documents(test if split == "test" else train)
        return self.held_out(self._documents(train), split)

    def _documents(self, files: Mapping[str, Path]) -> Iterator[Document]:
        for name, path in files.items():
            if _format(path) in _TEXTS:
                text = _read_text(path)
                record = {self.settings.text_field: text} | dict.fromkeys(self.settings.label_fields, path.parent.name)
                yield self.document(name, record, str(path))
                continue
            records = _rows(path, self.columns) if _format(path) == ".parquet" else _lines(path)
            for number, record in records:
                document = self.document(f"{name}:{number}", record, f"{path}:{number}")
                if document.text:
                    yield document

    def _chosen(self) -> tuple[dict[str, Path], dict[str, Path]]:
        """Return train and test files by the name for documents: the path relative to the innermost common folder.

        There are no test files if test documents are held out by a hash.
        """
        train = self._found(self.settings.files)
        test = self._found(self.settings.test_files) if self.settings.test_files is not None else []
        both = sorted(set(train) & set(test))
        if both:
            raise ConfigurationError(f"corpus: {both[0]} is among files and among test_files: no document may be in both splits")
        root = Path(os.path.commonpath([path.parent for path in (*train, *test)]))
        train_files, test_files = ({path.relative_to(root).as_posix(): path for path in files} for files in (train, test))
        return train_files, test_files

    def _found(self, files: str | list[str]) -> list[Path]:
        found: set[Path] = set()
        for pattern in [files] if isinstance(files, str) else files:
            paths = glob.glob(self.settings.absolute(pattern), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
            matching = {Path(path).absolute() for path in paths if Path(path).is_file()}
            if not matching:
                raise ConfigurationError(f"corpus: there is no file {pattern} in {self.settings.folder}")
            found |= matching
        for path in sorted(found):
            if _format(path) not in _FORMATS:
                allowed = f"{', '.join(_FORMATS)}; all except .parquet also with {' or '.join(_COMPRESSIONS)} at the end"
                raise ConfigurationError(f"corpus: {path} is of a format that is not read; names end in {allowed}")
        return sorted(found)


def _format(path: Path) -> str:
    """Return the format of a file, `.jsonl` for `a.jsonl.zst`; empty for a Parquet file that is compressed as a whole."""
    suffixes = path.suffixes
    if suffixes[-1:] and suffixes[-1] in _COMPRESSIONS:
        return "" if suffixes[-2:-1] == [".parquet"] else "".join(suffixes[-2:-1])
    return path.suffix


def _open(path: Path) -> io.BufferedReader:
    import pyarrow

    compression = _COMPRESSIONS.get(path.suffix)
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))  # pyright: ignore[reportArgumentType]


def _read_text(path: Path) -> str:
    try:
        with _open(path) as stream:
            return stream.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SaeensError(f"{path}: byte {error.start} is not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        raise SaeensError(f"{path}: cannot be read ({error})") from error


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and content of every line that is not blank."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, json.loads(line)
    except OSError as error:
        raise SaeensError(f"{path}:{number + 1}: cannot be read further ({error}): check that the file is complete") from error
    except ValueError as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else f"not valid JSON: {error}"
        raise SaeensError(f"{path}:{number}: {reason}") from None


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number, from 1, and content of every row."""
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            missing = [column for column in columns if column not in file.schema_arrow.names]
            if missing:
                raise SaeensError(f"{path}: there is no column {missing[0]!r}; there are: {', '.join(file.schema_arrow.names)}")
            batches = file.iter_batches(_BATCH_ROWS, columns=columns)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)
    except (OSError, pyarrow.ArrowException) as error:
        raise SaeensError(f"{path}: cannot be read as a Parquet file ({error})") from error
