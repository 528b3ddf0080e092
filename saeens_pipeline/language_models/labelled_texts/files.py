"""Labelled texts in local files: JSON lines, Parquet or CSV, one text per row."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.fingerprints import fingerprint_once

FORMATS = (".jsonl", ".ndjson", ".parquet", ".csv")


def find_files(name: str, pattern: str) -> list[Path]:
    """Return the files of a data set, sorted. Raises ConfigurationError if there are none, or for one of an unknown format."""
    path = Path(pattern).expanduser()
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise ConfigurationError(f"{name}: there is no file {pattern}")
    for file in files:
        if file.suffix not in FORMATS:
            raise ConfigurationError(f"{name}: {file} is of no format that is read: {', '.join(FORMATS)}")
    return files


def fingerprint(name: str, pattern: str) -> dict[str, str]:
    """Return the SHA-256 of each file, for recipes. Raises ConfigurationError as `find_files`."""
    return {file.name: fingerprint_once(file) for file in find_files(name, pattern)}


def fingerprint_of_folder(name: str, folder: str) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, except hidden ones. Raises ConfigurationError for a folder without files."""
    root = Path(folder).expanduser()
    paths = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}
    shown = {str(place): path for place, path in paths.items() if not any(part.startswith(".") for part in place.parts)}
    if not shown:
        raise ConfigurationError(f"{name}: there is no file below {folder}: `path` has to be a local copy of the data set")
    return {place: fingerprint_once(path) for place, path in shown.items()}


def read_columns(name: str, pattern: str, fields: Mapping[str, str]) -> pl.DataFrame:
    """Return columns of local files as strings, without rows that have a null. `fields` maps new names to columns of the files.

    Raises ConfigurationError for a missing column, with the existing ones, and SaeensError for a file that cannot be read.
    """
    parts = []
    for file in find_files(name, pattern):
        try:
            scanned = {".parquet": pl.scan_parquet, ".csv": pl.scan_csv}.get(file.suffix, pl.scan_ndjson)(file)
            parts.append(select_fields(f"{name}: {file}", scanned, fields).collect())
        except (pl.exceptions.PolarsError, OSError) as error:
            line = "" if file.suffix in (".parquet", ".csv") else _first_broken_line(file)
            raise SaeensError(f"{name}: {file}{line} cannot be read: {error}") from error
    return pl.concat(parts)


def select_fields(what: str, frame: pl.LazyFrame, fields: Mapping[str, str]) -> pl.LazyFrame:
    """Return the columns `fields` as `read_columns`, from a frame. Raises ConfigurationError for a missing column."""
    there_are = frame.collect_schema().names()
    missing = [column for column in fields.values() if column not in there_are]
    if missing:
        raise ConfigurationError(f"{what} has no column {', '.join(map(repr, missing))}; its columns are {', '.join(map(repr, there_are))}")
    return frame.select(pl.col(column).cast(pl.String).alias(new) for new, column in fields.items()).drop_nulls()


def _first_broken_line(file: Path) -> str:
    """Return the first invalid line of JSON lines, as `:12`; empty if each line is valid, or the file cannot be opened."""
    with contextlib.suppress(OSError), file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                json.loads(line or "null")
            except ValueError:
                if line.strip():
                    return f":{number}"
    return ""
