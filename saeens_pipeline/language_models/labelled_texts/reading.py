"""Reading of the labelled texts in the settings of an experiment, from any source; local files have one text per row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import polars as pl

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models import records
from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.documents import Split
from saeens_pipeline.language_models.fingerprints import fingerprint_once
from saeens_pipeline.language_models.labelled_texts import drawing, embedded, hub, packaged
from saeens_pipeline.language_models.labelled_texts.drawing import ConceptTexts, CorrelationTexts, Labelled
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.labelled_data_sets import EMBEDDED_CONCEPTS, EMBEDDED_CORRELATIONS, SAE_PROBES_CORRELATIONS, TextCount
from saeens_pipeline.settings.probing import ConceptDataSet, CorrelationDataSet

READER_VERSION = 1  # of local files; increased with every change of the drawn texts
_DATA_SETS_KEPT = 32
"""Data sets whose drawn texts stay in memory, some megabytes each, for other seeds and layers of the process."""


def identity(data_set: ConceptDataSet | CorrelationDataSet) -> dict[str, Any]:
    """Return the identity of the texts for recipes: hashes of local files, or the commit of a data set on the hub.

    Hidden files of a copy do not count. Raises SaeensError for missing files, and for a data set that the hub does not have or refuses.
    """
    if is_embedded(data_set):
        return {"name": data_set.name, "reader": embedded.READER_VERSION, "corpus": open_corpus(BUILTIN_CORPUS).identity}
    if data_set.local_files:
        hashes = {
            split: [[records.shown(file.name), fingerprint_once(file)] for file in found] for split, found in _files(data_set).items()
        }
        return {"name": data_set.name, "reader": READER_VERSION, "sha256": hashes}
    if data_set.is_packaged:
        hashes = {file.name: fingerprint_once(file) for file in packaged.packaged_files(data_set.name)}
        return {"name": data_set.name, "reader": packaged.READER_VERSION, "sha256": hashes}
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
    return _drawn_concepts(data_set.model_dump_json(), data_set.file, _identity_read(data_set), count, seed)


def read_correlations(data_set: CorrelationDataSet, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
    """Return the texts of every task of a data set. Raises as `read_concepts`."""
    return _drawn_correlations(data_set.model_dump_json(), data_set.file, _identity_read(data_set), count, seed)


def _identity_read(data_set: ConceptDataSet | CorrelationDataSet) -> str:
    """Return the identity as JSON. The builtin corpus is kept first, since its identity changes then."""
    if is_embedded(data_set):
        open_corpus(BUILTIN_CORPUS).require_readable()
    return json.dumps(identity(data_set))


@lru_cache(maxsize=_DATA_SETS_KEPT)
def _drawn_concepts(settings: str, file: Path | None, _identity: str, count: TextCount | None, seed: int) -> ConceptTexts:
    data_set = ConceptDataSet.model_validate_json(settings, context={FILE: file})
    data = _labelled(data_set, count := count or _default_count(data_set, embedded.CONCEPT_COUNT))
    return drawing.draw_concepts(data, data_set.labels or data.labels, count, balance="other" in data.train.columns, seed=seed)


@lru_cache(maxsize=_DATA_SETS_KEPT)
def _drawn_correlations(settings: str, file: Path | None, _identity: str, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
    data_set = CorrelationDataSet.model_validate_json(settings, context={FILE: file})
    data = _labelled(data_set, count := count or _default_count(data_set, embedded.CORRELATION_COUNT))
    own = {data.name: (data_set.target, data_set.spurious)} if data_set.target and data_set.spurious else {}
    return [drawing.draw_quadrants(data, name, *attributes, count, seed=seed) for name, attributes in (own or data.pairs).items()]


def _default_count(data_set: ConceptDataSet | CorrelationDataSet, of_embedded: TextCount) -> TextCount:
    if is_embedded(data_set):
        return of_embedded
    if task := SAE_PROBES_CORRELATIONS.get(data_set.name):
        return task.texts
    return packaged.COUNT if data_set.is_packaged else hub.COUNT


def _labelled(data_set: ConceptDataSet | CorrelationDataSet, count: TextCount) -> Labelled:
    if is_embedded(data_set):
        return _embedded_tasks(json.dumps(open_corpus(BUILTIN_CORPUS).identity)).labelled(data_set.name)
    if data_set.is_packaged:
        return packaged.packaged_texts(data_set.name)
    if not data_set.local_files:
        return hub.HubReader(data_set.revision, data_set.local_copy).labelled(data_set.name, count)
    fields = {"text": data_set.text_field, "label": data_set.label_field}
    if isinstance(data_set, CorrelationDataSet):
        fields["other"] = data_set.spurious_field
    read = {split: _read_columns(data_set.name, files, fields) for split, files in _files(data_set).items()}
    complete = {split: frame.drop_nulls() for split, frame in read.items()}
    n_incomplete = sum(map(len, read.values())) - sum(map(len, complete.values()))
    return Labelled(data_set.name, complete["train"], complete.get("test"), n_incomplete=n_incomplete)


def _files(data_set: ConceptDataSet | CorrelationDataSet) -> dict[Split, list[Path]]:
    """Return the local files by split, sorted. Raises ConfigurationError for missing files, unknown formats, and a file in both splits."""
    files: dict[Split, dict[tuple[int, int], Path]] = {}
    for split, pattern in data_set.local_files.items():
        files[split] = records.find_files(pattern, data_set.folder)
        if not files[split]:
            raise ConfigurationError(f"{data_set.name}: there is no file {records.shown(data_set.absolute(pattern))}")
        for file in files[split].values():
            try:
                records.file_format(file, records.ROWS)
            except ConfigurationError as error:
                raise ConfigurationError(f"{data_set.name}: {error}") from None
    both = files["train"].keys() & files.get("test", {}).keys()
    if both:
        raise ConfigurationError(f"{data_set.name}: {records.shown(files['train'][both.pop()])} is among the files of train and of test")
    return {split: list(of_split.values()) for split, of_split in files.items()}


def _read_columns(name: str, files: Sequence[Path], fields: Mapping[str, str]) -> pl.DataFrame:
    """Return fields of files as strings, or null. `fields` maps new names to fields of the files.

    Raises SaeensError, with file and line, for what cannot be read, and for a field that the first row of a file does not have.
    """
    rows: list[list[str | None]] = []
    for file in files:
        for i, (number, record) in enumerate(records.read_records(file, list(fields.values()))):
            place = f"{name}: {records.shown(file)}:{number}"
            if not isinstance(record, Mapping):
                raise SaeensError(f"{place}: a record has to be an object with fields, and this is of type {type(record).__name__}")
            rows.append([_value(record, field, place, is_first=i == 0) for field in fields.values()])
    return pl.DataFrame(rows, schema=dict.fromkeys(fields, pl.String), orient="row")


def _value(record: Mapping[str, Any], field: str, place: str, *, is_first: bool) -> Any:
    try:
        value = records.as_text(records.field_value(record, field))
    except KeyError:
        if is_first:
            there = ", ".join(map(repr, record))
            raise ConfigurationError(f"{place}: there is no column {field!r}; the columns are {there}") from None
        return None
    if value is not None and not isinstance(value, str):
        raise SaeensError(f"{place}: field {field!r} is of type {type(value).__name__}, and it has to be a text")
    return value


@lru_cache(maxsize=1)
def _embedded_tasks(_identity: str) -> embedded.EmbeddedTasks:
    """Return the embedded tasks, cached: they share pieces, and reading the corpus takes seconds."""
    return embedded.EmbeddedTasks(open_corpus(BUILTIN_CORPUS))
