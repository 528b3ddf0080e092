"""Rows of the tables `concept_detection` and `spurious_correlation`: probes on labelled texts."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from saeens_pipeline.assets.declarations import RunContext
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary
from saeens_pipeline.assets.registry import Row, Subject
from saeens_pipeline.assets.sources import SourceFacts, language_model_of
from saeens_pipeline.language_models.labelled_texts.drawing import ConceptTexts, CorrelationTexts
from saeens_pipeline.language_models.labelled_texts.reading import is_embedded, read_concepts, read_correlations
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.models import load_language_model
from saeens_pipeline.language_models.text_activations import TextActivations, encode_texts
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.probing import PROBE_SEED as SEED
from saeens_pipeline.storage.names import Partition


def probe(subject: Subject, context: RunContext, partition: Partition, wanted: Collection[str]) -> dict[str, list[Row]]:
    """Return the rows of each wanted table. Texts are read once and pass once through the language model and all SAEs.

    Memory, for any number of texts: `PooledTexts` and the two evaluations. The pooled codes, by far the largest part, take up to
    `evaluation_memory_gb`. Data sets are processed one after another.
    """
    rows: dict[str, list[Row]] = {table: [] for table in wanted}
    probed = _Probed.load(context, subject, partition)
    for texts in _collections(subject.experiment, wanted):
        for table, row in probed.rows(texts):
            rows[table].append(row)
    return rows


def read_labelled_texts(experiment: ExperimentSettings, tables: Collection[str], facts: SourceFacts) -> None:
    """Read and tokenise the texts of these tables. Raises SaeensError for missing or unusable texts.

    The texts stay in memory for the tables made in this process.
    """
    for texts in _collections(experiment, tables):
        encode_texts(facts.model, list(dict.fromkeys(texts.texts())), context_length=texts.context_length, drop=facts.drop)


class _Collection(NamedTuple):
    """Tasks whose texts are encoded together."""

    concepts: list[ConceptTexts]
    correlations: list[CorrelationTexts]
    context_length: int

    def texts(self) -> Iterator[str]:
        """Give all texts, with repetitions."""
        for concept in self.concepts:
            for of_split in (concept.train, concept.test):
                yield from (text for of_label in of_split.values() for text in of_label)
        for correlation in self.correlations:
            for of_split in (correlation.train, correlation.test):
                yield from (text for of_quadrant in of_split for text in of_quadrant)


def _collections(experiment: ExperimentSettings, tables: Collection[str]) -> Iterator[_Collection]:
    """Give the embedded tasks together, because they share texts, and every other data set alone."""
    settings = {table: getattr(experiment, table) for table in sorted(tables)}
    together: dict[int, _Collection] = {}
    for table, of_table in settings.items():
        for data_set in of_table.datasets:
            length = of_table.context_length
            collection = together.setdefault(length, _Collection([], [], length)) if is_embedded(data_set) else _Collection([], [], length)
            if table == "concept_detection":
                collection.concepts.append(read_concepts(data_set, of_table.count, SEED))
            else:
                collection.correlations.extend(read_correlations(data_set, of_table.count, SEED))
            if not is_embedded(data_set):
                yield collection
    yield from together.values()


@dataclass(frozen=True)
class _Probed:
    """The dictionaries of a partition and their language model."""

    ensembles: Mapping[str, Ensemble]
    row_starts: Mapping[tuple[str, int], list[Row]]
    """First columns of the rows of each ensemble and size. Bagging's first member has rows for `single`, too."""
    model: LanguageModel
    hook: str
    layer: int
    drop: Sequence[Any]
    memory_bytes: int
    label: str

    @classmethod
    def load(cls, context: RunContext, subject: Subject, partition: Partition) -> _Probed:
        store, experiment = context.store, subject.experiment
        activations = store.require(subject.activations.address, subject.activations.narrow(partition))
        tokens = store.require(subject.tokens.address, Partition())
        settings = activations.recipe["settings"]
        baselines = {(method, n): (declaration.address.name, 1) for method, n, declaration in subject.baselines}
        row_starts: dict[tuple[str, int], list[Row]] = {(RAW, 1): [subject.row(store, partition, RAW, 1, [])]}
        for method, n, saes in subject.methods(store, partition):
            ensemble = subject.boosting if method == "boosting" else subject.bagging
            row = subject.row(store, partition, method, n, [sae.data_version for sae in saes])
            row_starts.setdefault(baselines.get((method, n), (ensemble.address.name, n)), []).append(row)
        return cls(
            ensembles={each.address.name: load_dictionary(context, each, partition) for each in subject.dictionaries},
            row_starts=row_starts,
            model=load_language_model(language_model_of(activations), settings["weights"], context.compute.resolve(float64=True)),
            hook=settings["hook"],
            layer=settings["layer"],
            drop=tokens.recipe["settings"]["drop"],
            memory_bytes=int(experiment.evaluation_memory_gb * 1e9),
            label=f"{experiment.name}/eval, downstream tasks, {partition}",
        )

    def rows(self, collection: _Collection) -> Iterator[tuple[str, Row]]:
        """Give the rows of a collection, each with its table."""
        texts = list(dict.fromkeys(collection.texts()))
        with progress.task(self.label, len(texts), "texts") as advance:
            activations = TextActivations(
                self.model,
                self.hook,
                self.layer,
                texts,
                context_length=collection.context_length,
                drop=self.drop,
                batch_texts=texts_at_once(self.ensembles),
                report=advance,
            )
            pooled = PooledTexts(self.ensembles, activations, self.memory_bytes)
            numbers = {texts[number]: place for place, number in enumerate(activations.order)}
            yield from self._concept_rows(collection.concepts, numbers, pooled)
            yield from self._correlation_rows(collection.correlations, numbers, pooled)

    def _concept_rows(self, concepts: Sequence[ConceptTexts], numbers: Mapping[str, int], pooled: PooledTexts) -> Iterator[tuple[str, Row]]:
        probes = _concept_probes(concepts, numbers)
        for (data_set, label), scores in zip(probes, detect_concepts(pooled, list(probes.values())), strict=True):
            for score in scores:
                columns = {
                    "dataset": data_set,
                    "label": label,
                    "n_probe_features": score.n_features,
                    "code_scale": "1/J" if score.scaled else "unscaled",
                    "accuracy": score.accuracy,
                    "n_distinct_features": score.n_distinct,
                    "accuracy_distinct": score.accuracy_distinct,
                }
                yield from (("concept_detection", start | columns) for start in self._starts(score.dictionary))

    def _correlation_rows(
        self, correlations: Sequence[CorrelationTexts], numbers: Mapping[str, int], pooled: PooledTexts
    ) -> Iterator[tuple[str, Row]]:
        tasks = [_correlation_task(texts, numbers) for texts in correlations]
        for texts, scores in zip(correlations, remove_correlations(pooled, tasks, SEED), strict=True):
            for score in scores:
                target, spurious = (" or ".join(values) for values in (texts.target, texts.spurious))
                columns = {
                    "task": f"{texts.name}, {spurious} without {target}"
                    if score.reversed
                    else f"{texts.name}, {target} without {spurious}",
                    "n_ablated": score.n_ablated,
                    "accuracy_biased": score.accuracy_biased,
                    "accuracy_clean": score.accuracy_clean,
                    "accuracy_ablated": score.accuracy_ablated,
                    "worst_group_accuracy": score.worst_group_accuracy,
                    "scr": score.scr,
                    "scr_metric": score.scr if score.is_scr_metric else None,
                }
                yield from (("spurious_correlation", start | columns) for start in self._starts(score.dictionary))

    def _starts(self, dictionary: Dictionary) -> list[Row]:
        return self.row_starts[dictionary.name, dictionary.n_members]


def _concept_probes(concepts: Sequence[ConceptTexts], numbers: Mapping[str, int]) -> dict[tuple[str, str], ConceptProbe]:
    """Return a probe for each data set and label."""
    probes: dict[tuple[str, str], ConceptProbe] = {}
    for concept in concepts:
        train, test = ({label: _numbers(texts, numbers) for label, texts in of_split.items()} for of_split in (concept.train, concept.test))
        generator = torch.Generator().manual_seed(SEED)
        for label in train:
            splits = (one_against_the_others(of_split, label, generator) for of_split in (train, test))
            probes[concept.name, label] = ConceptProbe(*splits)
    return probes


def _correlation_task(texts: CorrelationTexts, numbers: Mapping[str, int]) -> CorrelationTask:
    return CorrelationTask(*(Quadrants(*(_numbers(each, numbers) for each in of_split)) for of_split in (texts.train, texts.test)))


def _numbers(texts: Sequence[str], numbers: Mapping[str, int]) -> Tensor:
    return torch.tensor([numbers[text] for text in texts])
