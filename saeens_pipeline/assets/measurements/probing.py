"""Rows of the tables `concept_detection` and `spurious_correlation`: probes on labelled texts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.probing import (
    RAW,
    ConceptProbe,
    CorrelationTask,
    Dictionary,
    PooledTexts,
    Quadrants,
    detect_concepts,
    one_against_the_others,
    remove_correlations,
    texts_at_once,
)
from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import SourceFacts
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary, load_model
from saeens_pipeline.assets.registry import Making, Row
from saeens_pipeline.language_models.labelled_texts.drawing import ConceptTexts, CorrelationTexts
from saeens_pipeline.language_models.labelled_texts.reading import is_embedded, read_concepts, read_correlations
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.text_activations import TextActivations, encode_texts
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.probing import PROBE_SEED as SEED


def probe(making: Making) -> dict[str, list[Row]]:
    """Return the rows of each wanted table. Texts are read once and pass once through the language model and all SAEs.

    Memory, for any number of texts: `PooledTexts` and the two evaluations. The pooled codes, by far the largest part, take up to
    `evaluation_memory_gb`. Data sets are processed one after another.
    """
    row_starts: dict[tuple[str, int], list[Row]] = {(RAW, 1): [making.row(RAW, 1, [])]}
    for method, n, dictionary, saes in making.methods():  # bagging's first member has rows for `single`, too
        row_starts.setdefault((dictionary.address.name, len(saes)), []).append(making.row(method, n, saes))
    ensembles = {each.address.name: load_dictionary(making, each) for each in making.subject.dictionaries}
    model = load_model(making)
    rows: dict[str, list[Row]] = {table: [] for table in making.wanted}
    for collection in _collections(making.experiment, making.wanted):
        for table, dictionary, columns in _scores(making, ensembles, model, collection):
            rows[table] += [start | columns for start in row_starts[dictionary.name, dictionary.n_members]]
    return rows


def read_labelled_texts(experiment: ExperimentSettings, tables: Collection[str], facts: SourceFacts) -> None:
    """Read and tokenise the texts of these tables. Raises SaeensError for missing or unusable texts.

    The texts stay in memory for the tables of this process.
    """
    for texts in _collections(experiment, tables):
        encode_texts(
            facts.describe_model(),
            list(dict.fromkeys(texts.texts())),
            context_length=texts.context_length,
            drop=facts.drop,
            prepend_bos=facts.prepend_bos,
        )


def texts_left_out(experiment: ExperimentSettings, table: str) -> dict[str, dict[str, int]]:
    """Return the numbers of rows of the data sets of a table that no text can be drawn from, by data set and reason."""
    of_table = getattr(experiment, table)
    read = read_concepts if table == "concept_detection" else lambda *arguments: read_correlations(*arguments)[0]
    found = {data_set.name: dict(read(data_set, of_table.count, SEED).left_out) for data_set in of_table.datasets}
    return {name: left_out for name, left_out in found.items() if left_out}


class _Collection(NamedTuple):
    """Tasks whose texts are encoded together."""

    concepts: list[ConceptTexts]
    correlations: list[CorrelationTexts]
    context_length: int

    def texts(self) -> Iterator[str]:
        """Yield all texts of the tasks. A text of several tasks occurs several times."""
        for concept in self.concepts:
            yield from chain(*concept.train.values(), *concept.test.values())
        for correlation in self.correlations:
            yield from chain(*correlation.train, *correlation.test)


def _collections(experiment: ExperimentSettings, tables: Collection[str]) -> Iterator[_Collection]:
    """Yield groups of tasks: all embedded tasks in one group, because they share texts, and every other data set alone."""
    together: dict[int, _Collection] = {}
    for table in sorted(tables):
        of_table = getattr(experiment, table)
        for data_set in of_table.datasets:
            collection = _Collection([], [], of_table.context_length)
            if is_embedded(data_set):
                collection = together.setdefault(of_table.context_length, collection)
            if table == "concept_detection":
                collection.concepts.append(read_concepts(data_set, of_table.count, SEED))
            else:
                collection.correlations.extend(read_correlations(data_set, of_table.count, SEED))
            if not is_embedded(data_set):
                yield collection
    yield from together.values()


def _scores(
    making: Making, ensembles: Mapping[str, Ensemble], model: LanguageModel, collection: _Collection
) -> Iterator[tuple[str, Dictionary, Row]]:
    """Yield table, dictionary and columns of the rows of a collection."""
    source, experiment = making.require(making.subject.activations), making.experiment
    settings = source.recipe["settings"]
    windows = making.require(making.subject.tokens).recipe["settings"]
    texts = list(dict.fromkeys(collection.texts()))
    with progress.task(f"{experiment.name}/eval, downstream tasks, {making.partition}", len(texts), "texts") as advance:
        activations = TextActivations(
            model,
            settings["hook"],
            settings["layer"],
            texts,
            context_length=collection.context_length,
            drop=windows["drop"],
            prepend_bos=windows.get("prepend_bos", False),
            batch_texts=texts_at_once(ensembles),
            norm_limit=source.provenance["statistics"]["train"].get("norm_limit"),
            report=advance,
        )
        pooled = PooledTexts(ensembles, activations, int(experiment.evaluation_memory_gb * 1e9))
        numbers = {texts[number]: place for place, number in enumerate(activations.order)}
        for each in _concept_columns(collection.concepts, numbers, pooled):
            yield "concept_detection", *each
        for each in _correlation_columns(collection.correlations, numbers, pooled):
            yield "spurious_correlation", *each


def _concept_columns(concepts: Sequence[ConceptTexts], numbers: Mapping[str, int], pooled: PooledTexts) -> Iterator[tuple[Dictionary, Row]]:
    """Yield pairs of a dictionary and a row of `concept_detection`, without `SUBJECT`, for each data set and label."""
    probes: dict[tuple[str, str], ConceptProbe] = {}
    for concept in concepts:
        train, test = ({label: _numbers(texts, numbers) for label, texts in of_split.items()} for of_split in (concept.train, concept.test))
        generator = torch.Generator().manual_seed(SEED)
        for label in train:
            splits = (one_against_the_others(of_split, label, generator) for of_split in (train, test))
            probes[concept.name, label] = ConceptProbe(*splits)
    for (data_set, label), scores in zip(probes, detect_concepts(pooled, list(probes.values())), strict=True):
        for score in scores:
            columns: Row = {
                "dataset": data_set,
                "label": label,
                "n_probe_features": score.n_features,
                "code_scale": "1/J" if score.scaled else "unscaled",
                "accuracy": score.accuracy,
                "n_distinct_features": score.n_distinct,
                "accuracy_distinct": score.accuracy_distinct,
            }
            yield score.dictionary, columns


def _correlation_columns(
    correlations: Sequence[CorrelationTexts], numbers: Mapping[str, int], pooled: PooledTexts
) -> Iterator[tuple[Dictionary, Row]]:
    """Yield pairs of a dictionary and a row of `spurious_correlation`, without `SUBJECT`, for each task."""
    tasks = [
        CorrelationTask(*(Quadrants(*(_numbers(each, numbers) for each in of_split)) for of_split in (texts.train, texts.test)))
        for texts in correlations
    ]
    measured = ("n_ablated", "accuracy_biased", "accuracy_clean", "accuracy_ablated", "worst_group_accuracy", "scr")
    for texts, scores in zip(correlations, remove_correlations(pooled, tasks, SEED), strict=True):
        target, spurious = (" or ".join(values) for values in (texts.target, texts.spurious))
        for score in scores:
            name = f"{texts.name}, {spurious} without {target}" if score.reversed else f"{texts.name}, {target} without {spurious}"
            scr_metric = score.scr if score.is_scr_metric else None
            yield score.dictionary, {"task": name, **{each: getattr(score, each) for each in measured}, "scr_metric": scr_metric}


def _numbers(texts: Sequence[str], numbers: Mapping[str, int]) -> Tensor:
    return torch.tensor([numbers[text] for text in texts])
