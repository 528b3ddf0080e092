"""The tables of downstream tasks: concept detection and spurious correlation removal, on texts with labels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Op, Task, Workplace
from saeens_pipeline.assets.sources import language_model_of
from saeens_pipeline.assets.tables.evaluation import Row, Subject, load_dictionary
from saeens_pipeline.language_models.labelled_texts.reading import identity, is_embedded, read_concepts, read_correlations
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import frame

if TYPE_CHECKING:
    from torch import Tensor

    from saeens_models.ensembles import Ensemble
    from saeens_models.probing import ConceptProbe, CorrelationTask, Dictionary, PooledTexts
    from saeens_pipeline.language_models.labelled_texts.drawing import ConceptTexts, CorrelationTexts
    from saeens_pipeline.language_models.models import LanguageModel, LanguageModelDescription

PROBED = ("concept_detection", "spurious_correlation")
SEED = 42  # of SAEBench: which texts are drawn, which of the others are negative, how probes start


def probing_op(subject: Subject) -> Op:
    """Declare the tables of one layer and seed. Texts are read once for both, and run through the language model and all SAEs once.

    Memory, whatever the number of texts: what `PooledTexts` and the two evaluations take; of that the pooled codes, by far the
    most, up to `evaluation_memory_gb`. Data sets come one after another.
    """
    experiment = subject.experiment
    inputs = [subject.tokens, subject.activations, *subject.dictionaries]
    tables = [_declare(subject, table, inputs) for table in PROBED if table in experiment.evaluations]

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        partition = tasks[0].partition
        rows: dict[str, list[Row]] = {task.declaration.address.name: [] for task in tasks}
        with workplace.compute.measure() as measurement:
            probed = _Probed.load(workplace, subject, partition)
            for texts in _collections(experiment, rows):
                for table, row in probed.rows(texts):
                    rows[table].append(row)
        for task in tasks:
            table = task.declaration.address.name
            workplace.store.write_table(*task.where, task.recipe, workplace.provenance() | vars(measurement), frame(table, rows[table]))

    return Op(f"{experiment.name}__eval__downstream", tuple(tables), make, on_device=True)


def validate_labelled_texts(
    experiment: ExperimentSettings, tables: Collection[str], model: LanguageModelDescription, drop: Sequence[Any]
) -> None:
    """Read the texts of these tables, and cut them into tokens. Raises SaeensError where they are not as needed.

    What was read is kept for the tables, unless they are made in another process.
    """
    from saeens_pipeline.language_models.text_activations import encode_texts

    for texts in _collections(experiment, tables):
        encode_texts(model, list(dict.fromkeys(texts.texts())), context_length=texts.context_length, drop=drop)


def _declare(subject: Subject, table: str, inputs: Sequence[Any]) -> Declaration:
    declaration = subject.declare(table, inputs)
    settings = getattr(subject.experiment, table)
    return replace(
        declaration,
        settings={**declaration.settings, **settings.model_dump(mode="json"), "seed": SEED},
        partition_settings=lambda partition: {"texts": [identity(data_set) for data_set in settings.datasets]},
    )


class _Collection(NamedTuple):
    """Tasks whose texts are encoded together."""

    concepts: list[ConceptTexts]
    correlations: list[CorrelationTexts]
    context_length: int

    def texts(self) -> Iterator[str]:
        """All of them; some come more than once."""
        for concept in self.concepts:
            for of_split in (concept.train, concept.test):
                yield from (text for of_label in of_split.values() for text in of_label)
        for correlation in self.correlations:
            for of_split in (correlation.train, correlation.test):
                yield from (text for of_quadrant in of_split for text in of_quadrant)


def _collections(experiment: ExperimentSettings, tables: Collection[str]) -> Iterator[_Collection]:
    """The embedded tasks together, since they have texts in common, and every other data set by itself."""
    settings = {table: getattr(experiment, table) for table in PROBED if table in tables}
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
    """The dictionaries of a partition and the language model that they read."""

    ensembles: Mapping[str, Ensemble]
    row_starts: Mapping[tuple[str, int], list[Row]]
    """the first columns of the rows of each ensemble and size: of bagging's first member, `single` is another name"""
    model: LanguageModel
    hook: str
    layer: int
    drop: Sequence[Any]
    memory_bytes: int
    label: str

    @classmethod
    def load(cls, workplace: Workplace, subject: Subject, partition: Partition) -> _Probed:
        from saeens_models.probing import RAW
        from saeens_pipeline.language_models.models import load_language_model

        store, experiment = workplace.store, subject.experiment
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
            ensembles={each.address.name: load_dictionary(workplace, each, partition) for each in subject.dictionaries},
            row_starts=row_starts,
            model=load_language_model(language_model_of(activations), settings["weights"], workplace.compute.resolve(float64=True)),
            hook=settings["hook"],
            layer=settings["layer"],
            drop=tokens.recipe["settings"]["drop"],
            memory_bytes=int(experiment.evaluation_memory_gb * 1e9),
            label=f"{experiment.name}/eval, downstream tasks, {partition}",
        )

    def rows(self, collection: _Collection) -> Iterator[tuple[str, Row]]:
        """The rows of a collection, each with its table."""
        from saeens_models.probing import PooledTexts, texts_at_once
        from saeens_pipeline.language_models.text_activations import TextActivations

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
        from saeens_models.probing import detect_concepts

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
        from saeens_models.probing import remove_correlations

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
    """One for each data set and label."""
    import torch

    from saeens_models.probing import ConceptProbe, one_against_the_others

    probes: dict[tuple[str, str], ConceptProbe] = {}
    for concept in concepts:
        train, test = ({label: _numbers(texts, numbers) for label, texts in of_split.items()} for of_split in (concept.train, concept.test))
        generator = torch.Generator().manual_seed(SEED)
        for label in train:
            splits = (one_against_the_others(of_split, label, generator) for of_split in (train, test))
            probes[concept.name, label] = ConceptProbe(*splits)
    return probes


def _correlation_task(texts: CorrelationTexts, numbers: Mapping[str, int]) -> CorrelationTask:
    from saeens_models.probing import CorrelationTask, Quadrants

    return CorrelationTask(*(Quadrants(*(_numbers(each, numbers) for each in of_split)) for of_split in (texts.train, texts.test)))


def _numbers(texts: Sequence[str], numbers: Mapping[str, int]) -> Tensor:
    import torch

    return torch.tensor([numbers[text] for text in texts])
