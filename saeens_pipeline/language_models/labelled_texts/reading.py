"""Reading of the labelled texts in the settings of an experiment, from any source."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.language_models.labelled_texts import embedded, files, hub
from saeens_pipeline.language_models.labelled_texts.drawing import ConceptTexts, CorrelationTexts, Labelled, draw_concepts, draw_quadrants
from saeens_pipeline.settings.corpora import BUILTIN_CORPUS
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.labelled_data_sets import EMBEDDED_CONCEPTS, EMBEDDED_CORRELATIONS, TextCount
from saeens_pipeline.settings.probing import ConceptDataSet, CorrelationDataSet

_DATA_SETS_KEPT = 32
"""Data sets whose drawn texts stay in memory, some megabytes each, for other seeds and layers of the process."""


def identity(data_set: ConceptDataSet | CorrelationDataSet) -> dict[str, Any]:
    """Return the identity of the texts for recipes: hashes of local files, or the commit of a data set on the hub.

    Raises SaeensError for missing local files, and for a data set that the hub does not have or refuses.
    """
    if is_embedded(data_set):
        return {"name": data_set.name, "reader": embedded.READER_VERSION, "corpus": open_corpus(BUILTIN_CORPUS).identity}
    if data_set.local_files:
        return {"name": data_set.name, "sha256": {k: files.fingerprint(data_set.name, p) for k, p in data_set.local_files.items()}}
    hub_set = {"name": data_set.name, "reader": hub.READER_VERSION}
    if data_set.local_copy:
        return hub_set | {"sha256": files.fingerprint_of_folder(data_set.name, data_set.local_copy)}
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
    return draw_concepts(data, data_set.labels or data.labels, count, balance="other" in data.train.columns, seed=seed)


@lru_cache(maxsize=_DATA_SETS_KEPT)
def _drawn_correlations(settings: str, file: Path | None, _identity: str, count: TextCount | None, seed: int) -> list[CorrelationTexts]:
    data_set = CorrelationDataSet.model_validate_json(settings, context={FILE: file})
    data = _labelled(data_set, count := count or (embedded.CORRELATION_COUNT if is_embedded(data_set) else hub.COUNT))
    own = {data.name: (data_set.target, data_set.spurious)} if data_set.target and data_set.spurious else {}
    return [draw_quadrants(data, name, *attributes, count, seed=seed) for name, attributes in (own or data.pairs).items()]


def _labelled(data_set: ConceptDataSet | CorrelationDataSet, count: TextCount) -> Labelled:
    if is_embedded(data_set):
        return _embedded_tasks(json.dumps(open_corpus(BUILTIN_CORPUS).identity)).labelled(data_set.name)
    if not data_set.local_files:
        return hub.HubReader(data_set.revision, data_set.local_copy).labelled(data_set.name, count)
    fields = {"text": data_set.text_field, "label": data_set.label_field}
    if isinstance(data_set, CorrelationDataSet):
        fields["other"] = data_set.spurious_field
    return Labelled(data_set.name, *(files.read_columns(data_set.name, pattern, fields) for pattern in data_set.local_files.values()))


@lru_cache(maxsize=1)
def _embedded_tasks(_identity: str) -> embedded.EmbeddedTasks:
    """Return the embedded tasks, cached: they share pieces, and reading the corpus takes seconds."""
    return embedded.EmbeddedTasks(open_corpus(BUILTIN_CORPUS))
