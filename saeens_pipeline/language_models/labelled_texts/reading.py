"""Reading of the labelled texts in the settings of an experiment, from any source; local files have one text per row."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.fingerprints import fingerprint_once
from saeens_pipeline.language_models.labelled_texts import drawing, embedded, hub
from saeens_pipeline.language_models.labelled_texts.drawing import ConceptTexts, CorrelationTexts, Labelled
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.labelled_data_sets import EMBEDDED_CONCEPTS, EMBEDDED_CORRELATIONS, TextCount
from saeens_pipeline.settings.probing import ConceptDataSet, CorrelationDataSet

_SCANNERS = {".jsonl": pl.scan_ndjson, ".ndjson": pl.scan_ndjson, ".parquet": pl.scan_parquet, ".csv": pl.scan_csv}
_DATA_SETS_KEPT = 32
"""Data sets whose drawn texts stay in memory, some megabytes each, for other seeds and layers of the process."""


def identity(data_set: ConceptDataSet | CorrelationDataSet) -> dict[str, Any]:
    """Return the identity of the texts for recipes: hashes of local files, or the commit of a data set on the hub.

    Hidden files of a copy do not count. Raises SaeensError for missing files, and for a data set that the hub does not have or refuses.
    """
    if is_embedded(data_set):
        return {"name": data_set.name, "reader": embedded.READER_VERSION, "corpus": open_corpus(BUILTIN_CORPUS).identity}
    if data_set.local_files:
        files = {split: _find_files(data_set.name, pattern) for split, pattern in data_set.local_files.items()}
        hashes = {split: {file.name: fingerprint_once(file) for file in of_split} for split, of_split in files.items()}
        return {"name": data_set.name, "sha256": hashes}
    hub_set = {"name": data_set.name, "reader": hub.READER_VERSION}
    if data_set.local_copy:
        root = Path(data_set.local_copy)
        paths = {path.relative_to(root): path for path in sorted(root.rglob("*")) if path.is_file()}
        shown = {str(place): path for place, path in paths.items() if not any(part.startswith(".") for part in place.parts)}
        if not shown:
            raise ConfigurationError(f"{data_set.name}: there is no file below {root}: `path` has to be a local copy of the data set")
        return hub_set | {"sha256": {place: fingerprint_once(path) for place, path in shown.items()}}
    return hub_set | {"revision": hub.commit(data_set.name, data_set.revision)}


def is_embedded(data_set: ConceptDataSet | CorrelationDataSet) -> bool:
    """Return whether the texts are from the builtin corpus. Such data sets share texts."""
    return data_set.name in (*EMBEDDED_CONCEPTS, *EMBEDDED_CORRELATIONS)


def read_concepts(data_set: ConceptDataSet, count: TextCount | None, seed: int) -> ConceptTexts:
    """Return the texts for concept detection. Raises SaeensError for missing columns, missing labels, a single label, and too few texts."""
    return _drawn_concepts(data_set.model_dump_json(), data_set.file, json.dumps(identity(data_set)), count, seed)


def read_correlations(data_set: CorrelationDataSet, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
    """Return the texts of every task of a data set. Raises as `read_concepts`."""
    return _drawn_correlations(data_set.model_dump_json(), data_set.file, json.dumps(identity(data_set)), count, seed)


@lru_cache(maxsize=_DATA_SETS_KEPT)
def _drawn_concepts(settings: str, file: Path | None, _identity: str, count: TextCount | None, seed: int) -> ConceptTexts:
    data_set = ConceptDataSet.model_validate_json(settings, context={FILE: file})
    data = _labelled(data_set, count := count or (embedded.CONCEPT_COUNT if is_embedded(data_set) else hub.COUNT))
    return drawing.draw_concepts(data, data_set.labels or data.labels, count, balance="other" in data.train.columns, seed=seed)


@lru_cache(maxsize=_DATA_SETS_KEPT)
def _drawn_correlations(settings: str, file: Path | None, _identity: str, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
    data_set = CorrelationDataSet.model_validate_json(settings, context={FILE: file})
    data = _labelled(data_set, count := count or (embedded.CORRELATION_COUNT if is_embedded(data_set) else hub.COUNT))
    own = {data.name: (data_set.target, data_set.spurious)} if data_set.target and data_set.spurious else {}
    return [drawing.draw_quadrants(data, name, *attributes, count, seed=seed) for name, attributes in (own or data.pairs).items()]


def _labelled(data_set: ConceptDataSet | CorrelationDataSet, count: TextCount) -> Labelled:
    if is_embedded(data_set):
        return _embedded_tasks(json.dumps(open_corpus(BUILTIN_CORPUS).identity)).labelled(data_set.name)
    if not data_set.local_files:
        return hub.HubReader(data_set.revision, data_set.local_copy).labelled(data_set.name, count)
    fields = {"text": data_set.text_field, "label": data_set.label_field}
    if isinstance(data_set, CorrelationDataSet):
        fields["other"] = data_set.spurious_field
    frames = {split: _read_columns(data_set.name, pattern, fields) for split, pattern in data_set.local_files.items()}
    return Labelled(data_set.name, frames["train"], frames.get("test"))


def _find_files(name: str, pattern: str) -> list[Path]:
    """Return the files of a data set, sorted. Raises ConfigurationError if there are none, or for one of an unknown format."""
    files = sorted(Path(pattern).parent.glob(Path(pattern).name))
    if not files:
        raise ConfigurationError(f"{name}: there is no file {pattern}")
    for file in files:
        if file.suffix not in _SCANNERS:
            raise ConfigurationError(f"{name}: {file} is of no format that is read: {', '.join(_SCANNERS)}")
    return files


def _read_columns(name: str, pattern: str, fields: Mapping[str, str]) -> pl.DataFrame:
    """Return columns of local files as `select_fields`. Raises SaeensError for a file that cannot be read."""
    parts = []
    for file in _find_files(name, pattern):
        try:
            parts.append(drawing.select_fields(f"{name}: {file}", _SCANNERS[file.suffix](file), fields).collect())
        except (pl.exceptions.PolarsError, OSError) as error:
            line = "" if file.suffix in (".parquet", ".csv") else _first_broken_line(file)
            raise SaeensError(f"{name}: {file}{line} cannot be read: {error}") from error
    return pl.concat(parts)


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


@lru_cache(maxsize=1)
def _embedded_tasks(_identity: str) -> embedded.EmbeddedTasks:
    """Return the embedded tasks, cached: they share pieces, and reading the corpus takes seconds."""
    return embedded.EmbeddedTasks(open_corpus(BUILTIN_CORPUS))
