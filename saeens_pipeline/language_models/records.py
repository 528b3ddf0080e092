"""Records of text files, read row by row: JSON lines, CSV, Parquet, and whole text files, for corpora and labelled texts.

Texts and labels are strings. A number keeps its spelling (`01`, `1e5`, `0.10`), a boolean of JSON or Parquet is `true` or `false`, an empty
field of a CSV file is null. Byte-order marks are removed, and half a surrogate pair becomes U+FFFD.
"""

from __future__ import annotations

import csv
import fnmatch
import io
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from saeens_pipeline.errors import ConfigurationError, SaeensError

MAX_BYTES = 256 * 2**20  # of a line, or of a text file, after decompression
TEXTS = (".txt", ".md")
ROWS = (".jsonl", ".ndjson", ".csv", ".parquet")
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_BATCH_ROWS = 1000
_BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
_MAGIC = re.compile(r"[*?\[]")


def find_files(pattern: str, folder: Path) -> dict[tuple[int, int], Path]:
    """Return the files of a path or a pattern with *, ?, [...] and **, relative to `folder`, by device and inode, sorted by path.

    A file that is found by several names, such as links, counts once, under the first name. Links to folders are followed, each folder
    once. Hidden files match only a pattern that begins with a point. The folder's own characters have no special meaning, and neither have
    those of a path that exists.
    """
    found = find_paths(pattern, folder)
    files: dict[tuple[int, int], Path] = {}
    for path in sorted(Path(os.path.realpath(path.parent)) / path.name for path in found if path.is_file()):
        status = path.stat()
        files.setdefault((status.st_dev, status.st_ino), path)
    return files


def find_paths(pattern: str, folder: Path) -> list[Path]:
    """Return the files and folders of a pattern, as `find_files`, unsorted and each under every name that matches."""
    start = Path(os.path.expanduser(pattern))  # noqa: PTH111  # keeps a name such as ~x that is no user
    parts = start.parts
    if os.path.lexists(folder / start):
        return [folder / start]
    return _matches([Path(parts[0])], parts[1:]) if start.is_absolute() else _matches([folder], parts)


def has_wildcard(part: str) -> bool:
    """Return whether a part of a pattern has a character with a special meaning."""
    return _MAGIC.search(part) is not None


def _matches(folders: Sequence[Path], parts: Sequence[str]) -> list[Path]:
    for i, part in enumerate(parts):
        is_last = i == len(parts) - 1
        if part == "**":
            below = [each for folder in folders for each in _folders_below(folder)]
            folders = [entry for folder in below for entry in _entries(folder, "*")] if is_last else below
        elif has_wildcard(part):
            folders = [entry for folder in folders for entry in _entries(folder, part)]
        else:
            folders = [folder / part for folder in folders if os.path.lexists(folder / part)]
    return list(folders)


def _entries(folder: Path, pattern: str) -> list[Path]:
    try:
        names = os.listdir(folder)  # noqa: PTH208  # names, for fnmatch
    except OSError:  # a file, or a folder that may not be read
        return []
    return [folder / name for name in names if (pattern[0] == "." or name[0] != ".") and fnmatch.fnmatchcase(name, pattern)]


def _folders_below(folder: Path) -> Iterator[Path]:
    """Yield a folder and all folders below it, each once, also if links form loops."""
    waiting, seen = [folder], set[tuple[int, int]]()
    while waiting:
        folder = waiting.pop()
        if not folder.is_dir():
            continue
        status = folder.stat()
        if (status.st_dev, status.st_ino) not in seen:
            seen.add((status.st_dev, status.st_ino))
            yield folder
            waiting += [entry for entry in sorted(_entries(folder, "*"), reverse=True) if entry.is_dir()]


def file_format(path: Path, allowed: Sequence[str]) -> str:
    """Return the format of a file, `.jsonl` for `a.JSONL.zst` and `a.ndjson`. Raises ConfigurationError for another format."""
    suffixes = [each.lower() for each in path.suffixes]
    is_compressed = suffixes[-1:] and suffixes[-1] in _COMPRESSIONS
    found = suffixes[-2:-1] if is_compressed else suffixes[-1:]
    if not found or found[0] not in allowed or (is_compressed and found == [".parquet"]):
        able = f"{', '.join(allowed)}; all except .parquet also with {' or '.join(_COMPRESSIONS)} at the end"
        raise ConfigurationError(f"{shown(path)} is of a format that is not read; names end in {able}")
    return ".jsonl" if found[0] == ".ndjson" else found[0]


def shown(path: Path | str) -> str:
    """Return a path as text that can be printed and encoded, with `\\xe9` for bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read_text(path: Path) -> str:
    """Return a whole text file. Raises SaeensError for one that cannot be read, is not UTF-8, or is too long."""
    try:
        with _open(path) as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise SaeensError(f"{shown(path)}: cannot be read ({error})") from error
    if len(content) > MAX_BYTES:
        raise SaeensError(f"{shown(path)}: a text of more than {MAX_BYTES:,} bytes: divide it into several files")
    try:
        return content.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        raise SaeensError(f"{shown(path)}: byte {error.start} is not UTF-8: save the file as UTF-8") from None


def read_records(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield number, from 1, and content of each record: of JSON lines the number of the line, otherwise of the row.

    `fields` names the fields that are read, with a dot for nested ones. Raises SaeensError, with file and line, for what cannot be read.
    """
    match file_format(path, ROWS):
        case ".csv":
            return _csv_rows(path, fields)
        case ".parquet":
            return _parquet_rows(path, fields)
        case _:
            return _json_lines(path)


def field_value(record: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field, which a dot may select inside another field. Raises KeyError(name, where it is missing)."""
    if field in record:
        return record[field]
    found: Any = record
    for part in field.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise KeyError(part, found)
        found = found[part]
    return found


def as_text(value: Any) -> Any:
    """Return a string, number, boolean or date as text, and anything else unchanged."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATE.sub("\ufffd", value)
    return value if value is None or isinstance(value, (Mapping, list, tuple, bytes)) else str(value)


def kind(value: object) -> str:
    """Return the type of a value for a message: null, or of type str."""
    return "null" if value is None else f"of type {type(value).__name__}"


def _open(path: Path) -> IO[bytes]:
    import pyarrow

    file = path.open("rb")  # pyarrow opens no path that is not UTF-8
    compression = _COMPRESSIONS.get(path.suffix.lower())
    return io.BufferedReader(pyarrow.CompressedInputStream(file, compression)) if compression else file  # pyright: ignore[reportArgumentType]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number, from 1, and text of each line, with its end."""
    number = 0
    try:
        with _open(path) as stream:
            while line := stream.readline(MAX_BYTES + 1):
                number += 1
                if len(line) > MAX_BYTES:
                    raise SaeensError(f"{shown(path)}:{number}: a line of more than {MAX_BYTES:,} bytes")
                text = line.decode("utf-8")
                yield number, text.removeprefix(_BYTE_ORDER_MARK) if number == 1 else text
    except UnicodeDecodeError:
        raise SaeensError(f"{shown(path)}:{number}: not UTF-8: save the file as UTF-8") from None
    except OSError as error:
        hint = "compress it without --long" if "too much memory" in str(error) else "check that the file is complete"
        raise SaeensError(f"{shown(path)}:{number + 1}: cannot be read further ({error}): {hint}") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if line.strip():
            try:
                record = json.loads(line, parse_int=str, parse_float=str, parse_constant=str)
            except ValueError as error:
                raise SaeensError(f"{shown(path)}:{number}: not valid JSON: {error}") from None
            except RecursionError:
                raise SaeensError(f"{shown(path)}:{number}: the JSON has too many levels") from None
            yield number, record


def _csv_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, str | None]]]:
    csv.field_size_limit(MAX_BYTES)
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = next(rows, [])
        _require_once(path, fields, header)
        for number, row in enumerate((row for row in rows if row), start=1):
            if len(row) != len(header):
                raise SaeensError(f"{shown(path)}:{rows.line_num}: {len(row)} fields, and the first line has {len(header)}")
            yield number, {name: value or None for name, value in zip(header, row, strict=True)}
    except csv.Error as error:
        raise SaeensError(f"{shown(path)}:{rows.line_num}: not valid CSV: {error}") from None


def _require_once(path: Path, wanted: Sequence[str], columns: Sequence[str]) -> None:
    for name in wanted:
        if (n := columns.count(name)) > 1:
            raise SaeensError(f"{shown(path)}: {n} columns are called {name!r}: rename all but the one to read")


def _parquet_rows(path: Path, fields: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with path.open("rb") as stream, parquet.ParquetFile(stream) as file:
            names = file.schema_arrow.names
            columns = list(dict.fromkeys(field if field in names else field.split(".", 1)[0] for field in fields))
            missing = [column for column in columns if column not in names]
            if missing:
                raise SaeensError(f"{shown(path)}: there is no column {missing[0]!r}; there are: {', '.join(names)}")
            _require_once(path, columns, names)
            for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except UnicodeDecodeError:
        raise SaeensError(f"{shown(path)}:{number + 1}: not UTF-8") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise SaeensError(f"{shown(path)}: cannot be read as a Parquet file ({error})") from error
