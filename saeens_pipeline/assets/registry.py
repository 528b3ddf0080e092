"""The registry of tables: their columns and inputs, how their rows are computed, and how they are summarised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, NamedTuple

import polars as pl

from saeens_pipeline.assets.baselines.registry import methods
from saeens_pipeline.assets.declarations import Declaration, Dimensions, Facts, Input, Op, Reference, RunContext, Task, Wanted, fields_of
from saeens_pipeline.assets.sources import tokens_of
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.settings.experiments import CheckSettings, ExperimentSettings
from saeens_pipeline.settings.sources import SourceSettings
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Artefact, Store
from saeens_pipeline.storage.tables import Column, frame

Row = dict[str, Any]
_KEYS = ("member", "index", "step", "tokens", "n_true_features", "value")  # columns that are no metrics: sorted from small to large

SUBJECT = (
    Column("experiment", "str", "experiment"),
    Column("layer", "int", "layer of the language model, from 0"),
    Column("seed", "int", "ensemble seed"),
    Column("language_model", "str", "trained, or random: the untrained control"),
    Column("method", "str", f"{', '.join(methods())}; for probes also raw, the activations themselves"),
    Column(
        "n_members",
        "int",
        "SAEs in the ensemble (the first n); for expanded SAEs the n whose width they match; else 1",
        less_is_better=True,
    ),
    Column("sae_data_versions", "str", "data versions of the SAEs measured, in member order"),
)
"""The first columns of every table of an experiment: the subject of the measurement."""


class Headline(NamedTuple):
    """A column, or one of the table's totals, that stands for its table in summaries, on pages and in pictures."""

    title: str
    column: str
    form: str
    """Format specification."""
    in_summary: bool = True
    """True: `saeens run` prints it."""
    place: int = 0
    """Place among the columns of the main table of pages, from 1; 0: not one of them."""
    name: str = ""
    """Name on axes; empty: the title."""
    about: str = ""
    """Meaning on pages; empty: that of the column."""
    better: Literal["more", "less", ""] = ""
    log: bool = False
    """True: axes are logarithmic."""
    leaderboard: int = 0
    """Place among the columns that `saeens leaderboard` prints, from 1; 0: not one of them."""
    of_control: bool = False
    """True: the value of the control, on an untrained language model, is shown next to it."""
    table: str = ""
    """Name of the table, which `register` fills in."""


class Curve(NamedTuple):
    """A column against a number of features, drawn and printed for whole ensembles: the mean within each group, then over groups."""

    title: str
    about: str
    x_title: str
    y_title: str
    x: str
    y: str
    group: str


class Markdown(str):
    """Metadata that the UI renders as Markdown."""


class SharedPass(NamedTuple):
    """Work that several tables share, such as one pass over the test activations: done once for the tables of one op."""

    name: str
    run: Callable[[Making], Any]
    """Do the work for the tables `Making.wanted`; its result is `Making.shared`."""


class Measured(NamedTuple):
    """A method and size of one partition."""

    method: str
    n_members: int
    dictionary: Declaration
    """The whole ensemble, or the baseline."""
    saes: list[Artefact]
    """The SAEs that are measured, in member order: the first ones of `dictionary`."""


@dataclass(frozen=True)
class Making:
    """The arguments of a table's `rows`: the dictionaries, the run, and the partition."""

    subject: Subject
    context: RunContext
    partition: Partition
    wanted: Collection[str]
    """Names of the tables that are computed together."""
    run_shared_pass: Callable[[], Any]
    provenance: dict[str, Any] = field(default_factory=dict)
    """Fields that `rows` adds to the table's record, which also has run, device and time."""

    @property
    def shared(self) -> Any:
        """Return the result of the table's shared pass."""
        return self.run_shared_pass()

    @property
    def store(self) -> Store:
        """Return the store of the run."""
        return self.context.store

    @property
    def experiment(self) -> ExperimentSettings:
        return self.subject.experiment

    @property
    def device(self) -> str:
        """Return the device for evaluations: one that supports float64."""
        return self.context.compute.resolve(float64=True)

    @property
    def of_seeds(self) -> list[Making]:
        """Return the same for each seed of the layer."""
        return [replace(self, partition=Partition(self.partition.layer, seed)) for seed in self.experiment.ensemble.seeds]

    def require(self, reference: Reference) -> Artefact:
        """Return an artefact of this partition. Raises MissingInputError if it does not exist."""
        return reference.require(self.store, self.partition)

    def members(self, dictionary: Declaration) -> list[Artefact]:
        """Return the SAEs of an ensemble, in member order, or a baseline alone. Raises SaeensError if the ensemble has other members."""
        if dictionary.builder != "ensemble":
            return [self.require(dictionary)]
        named = self.require(dictionary).recipe["inputs"]
        members = {name: self.store.require(each.address, where) for name, each, where in dictionary.input_partitions(self.partition)}
        for name, member in members.items():
            if member.data_version != named[name]:
                raise SaeensError(f"{member.path} has changed since {dictionary.address} was computed from it: compute that again first")
        return list(members.values())

    def methods(self) -> Iterator[Measured]:
        """Yield every measured method and size."""
        yield Measured("single", 1, self.subject.bagging, self.members(self.subject.bagging)[:1])
        for method, n_members, dictionary in self.subject.whole:
            saes = self.members(dictionary)
            sizes = range(1, len(saes) + 1) if dictionary.builder == "ensemble" else [n_members]
            yield from (Measured(method, n, dictionary, saes[:n]) for n in sizes)

    def row(self, method: str, n_members: int, saes: Iterable[Artefact]) -> Row:
        """Return the columns `SUBJECT` of a row about these SAEs."""
        return {
            "experiment": self.experiment.name,
            "layer": self.partition.layer,
            "seed": self.partition.seed,
            "language_model": self.require(self.subject.activations).recipe["settings"]["weights"],
            "method": method,
            "n_members": n_members,
            "sae_data_versions": ",".join(sae.data_version for sae in saes),
        }


@dataclass(frozen=True)
class Table:
    """One evaluation table. A module in `tables` that registers one adds it everywhere: assets, command line, UI, reference."""

    name: str
    question: str
    """The question that the table answers; the first line of the asset's description."""
    columns: tuple[Column, ...] | Callable[[], tuple[Column, ...]]
    """Columns after `SUBJECT`; of a table over experiments, all columns. A function if they depend on other tables."""
    rows: Callable[[Making], Iterable[Row] | pl.DataFrame] | None = None
    """Compute the rows; the function imports torch itself. None for tables over experiments, which have their own ops."""
    inputs: Callable[[Subject], Sequence[Reference]] = lambda subject: subject.dictionaries
    version: int = 1
    """Increased whenever the rows would change."""
    dimensions: Dimensions = "layer_and_seed"
    order: int = 100
    """Sort key in lists."""
    by_default: bool = False
    """True: experiments without a list of evaluations fill it, unless `complaint` has a reason why they cannot."""
    settings: Callable[[ExperimentSettings], Mapping[str, Any]] = lambda experiment: {}
    """Return the settings that decide the rows, in addition to the number of members and, for tables that compare seeds, the seeds."""
    partition_settings: Callable[[ExperimentSettings], Mapping[str, Any]] = lambda experiment: {}
    """Return identities of data that decide the rows; read when the recipe is computed."""
    unavailable: Callable[[], Mapping[str, Any]] = dict
    """See `Declaration.unavailable`."""
    shared_pass: SharedPass | None = None
    on_device: bool = True
    requires: tuple[str, ...] = ()
    """Tables among its inputs."""
    complaint: Callable[[ExperimentSettings], str] = lambda experiment: ""
    """Return the reason why an experiment cannot have this table; empty if it can."""
    of_sources: Literal["all", "text", "synthetic"] = "all"
    """The sources whose experiments can have it: `text` if it needs tokens or a language model, `synthetic` if it needs true features."""
    preflight: Callable[[ExperimentSettings, Facts], None] = lambda experiment, facts: None
    """Raise SaeensError, before any training, for settings or data with which the table would fail. The facts are read on demand."""
    has_slow_preflight: bool = False
    """True: the preflight takes seconds in every process."""
    announcement: Callable[[ExperimentSettings, int], str] = lambda experiment, n_partitions: ""
    """Return the text that `saeens run` prints before it computes that number of partitions of the table."""
    headlines: tuple[Headline, ...] = ()
    figures: Mapping[str, str] = field(default_factory=dict)
    """Columns, with titles, that the UI shows as held-out figures of the SAE or the ensemble that a row is about."""
    curve: Curve | None = None
    conclusion: Callable[[pl.DataFrame], str] | None = None
    """Return a sentence below the summary of `saeens run`, from the rows of one layer; empty for none."""
    seed_metrics: tuple[str, ...] = ()
    """Metrics of the leaderboard: columns of which it has mean, interval and points over seeds."""
    forecast: Callable[[ExperimentSettings, int], Iterable[tuple[str, float | None, str, str]]] = lambda experiment, n_partitions: ()
    """Yield lines of `saeens plan` for that number of partitions of the table: item, amount or None if not known, unit and note."""
    over_experiments: bool = False
    """True: it compares experiments. False: it belongs to one experiment."""
    may_be_empty: bool = False
    warnings: Callable[[pl.DataFrame, CheckSettings], Iterable[str]] = lambda table, checks: ()
    """Yield a sentence for every value below the thresholds of the experiment's `checks`."""
    summary: Callable[[pl.DataFrame, Artefact], Mapping[str, Any]] = lambda table, artefact: {}
    """Return metadata for the UI, in addition to the headlines."""
    is_large: bool = False
    """True: the UI shows only its number of rows."""
    note: Callable[[Store, str, Collection[int], int | None], str] = lambda store, experiment, seeds, layer: ""
    """Return a note for readers of the table, given experiment, seeds, and one layer or None for all."""
    sae_part: str = "weights"
    """The part of an SAE that it reads, as named in the column lineage."""
    source_parts: Mapping[str, Mapping[str, str]] = field(default_factory=lambda: {"activations": {"*": "test/activations"}})
    """The part of a source that a column reads, by asset and column; `*` stands for all columns that are not listed."""

    @property
    def all_columns(self) -> tuple[Column, ...]:
        """Return all columns in order, `SUBJECT` first."""
        columns = self.columns() if callable(self.columns) else self.columns
        return columns if self.over_experiments else SUBJECT + columns


TABLES: dict[str, Table] = {}
"""Tables by name; `listed` gives them in order."""


def register(table: Table) -> Table:
    """Add a table to the registry. Raises ValueError for a name in use."""
    if table.name in TABLES:
        raise ValueError(f"table {table.name!r} is registered twice")
    about = {} if callable(table.columns) else {column.name: column.description for column in table.columns}
    headlines = (
        each._replace(name=each.name or each.title, about=each.about or about.get(each.column, ""), table=table.name)
        for each in table.headlines
    )
    TABLES[table.name] = replace(table, headlines=tuple(headlines))
    return TABLES[table.name]


def listed(*, over_experiments: bool | None = None) -> list[Table]:
    """Return the tables in order: all, or only those with this value of `over_experiments`."""
    chosen = [table for table in TABLES.values() if over_experiments is None or table.over_experiments == over_experiments]
    return sorted(chosen, key=lambda table: (table.order, table.name))


def find_table(name: str) -> Table:
    """Return the table of an experiment with this name. Raises ConfigurationError, with the known names, for another name."""
    table = TABLES.get(name)
    if table is None or table.over_experiments:
        raise ConfigurationError(f"there is no table {name!r}; there are: {', '.join(t.name for t in listed(over_experiments=False))}")
    return table


def columns_of(name: str) -> tuple[Column, ...]:
    """Return all columns of a table, `SUBJECT` first."""
    return TABLES[name].all_columns


def table_frame(name: str, rows: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """Return rows as a data frame with exactly the table's columns. Raises ValueError for a column that the table does not have."""
    return frame(name, columns_of(name), rows)


def columns_frame(name: str, same: Row, columns: Mapping[str, Any]) -> pl.DataFrame:
    """Return columns, with `same` in every row, as a data frame with exactly the table's columns; those that are not given are null."""
    rows, empty = pl.DataFrame(columns).with_columns(pl.lit(value).alias(column) for column, value in same.items()), table_frame(name, [])
    rows = pl.concat([empty, rows], how="diagonal_relaxed")
    return rows.select(empty.columns).cast(empty.schema)  # pyright: ignore[reportArgumentType]  # a schema is what cast takes


def summary_titles(names: Iterable[str] = ()) -> dict[str, str]:
    """Return title by column: those of the leaderboard, in order, or `names`."""
    headlines = [each for table in listed(over_experiments=False) for each in table.headlines if each.leaderboard]
    titles = {each.column: each.title for each in sorted(headlines, key=lambda each: each.leaderboard)}
    return {name: titles[name] for name in names or titles}


def column_named(given: str, columns: Iterable[str], titles: Mapping[str, str], shown: str) -> str:
    """Return the column of this name, or of this heading, in any case; `titles` by column. Raises ConfigurationError, with the columns."""
    known = list(columns)
    wanted = given.removesuffix("(!)").strip().casefold()
    for names in (known, [titles.get(each, "") for each in known], [each.replace("_", " ") for each in known]):
        if wanted and wanted in (lowered := [each.casefold() for each in names]):
            return known[lowered.index(wanted)]
    headings = (f" ({titles[each]})" if titles.get(each, each) != each else "" for each in known)
    raise ConfigurationError(
        f"--sort {given}: {shown} is sorted by one of {', '.join(each + heading for each, heading in zip(known, headings, strict=True))}"
    )


def sorted_by(rows: pl.DataFrame, given: str, titles: Mapping[str, str], shown: str) -> pl.DataFrame:
    """Return rows by a column, named as for `column_named`: metrics with the better end first, other columns ascending, nulls last."""
    column = column_named(given, rows.columns, titles, shown)
    less = {each.name for table in TABLES.values() for each in table.all_columns if each.less_is_better}
    keys = {*(each.name for each in SUBJECT), *_KEYS}
    descending = rows[column].dtype.is_numeric() and column not in less | keys
    return rows.sort(column, descending=descending, nulls_last=True, maintain_order=True)


def seed_metrics() -> dict[str, tuple[str, str]]:
    """Return the metrics of the leaderboard: table and meaning by column, in order."""
    return {
        name: (table.name, next(column.description for column in table.all_columns if column.name == name))
        for table in listed(over_experiments=False)
        for name in table.seed_metrics
    }


def seed_column(name: str) -> Column | None:
    """Return the column of a metric of the leaderboard; None for another name."""
    columns = (column for table in listed(over_experiments=False) if name in table.seed_metrics for column in table.all_columns)
    return next((column for column in columns if column.name == name), None)


def evaluations_of(experiment: ExperimentSettings) -> list[Table]:
    """Return the tables that an experiment fills, each after the tables that it requires."""
    if experiment.evaluations is None:
        wanted = [table for table in listed(over_experiments=False) if table.by_default and not table.complaint(experiment)]
    else:
        wanted = [TABLES[name] for name in experiment.evaluations]
    ordered: dict[str, Table] = {}

    def add(table: Table) -> None:
        for name in table.requires:
            if TABLES[name] in wanted:
                add(TABLES[name])
        ordered.setdefault(table.name, table)

    for table in wanted:
        add(table)
    return list(ordered.values())


def fills(experiment: ExperimentSettings, name: str) -> bool:
    """Return whether an experiment fills the table of this name."""
    return any(table.name == name for table in evaluations_of(experiment))


def complaint_about(experiment: ExperimentSettings) -> tuple[int, str] | None:
    """Return index and error message of the first wrong entry of `evaluations`; None if all entries are right."""
    for i, name in enumerate(experiment.evaluations or ()):
        if name not in TABLES or TABLES[name].over_experiments:
            known = ", ".join(table.name for table in listed(over_experiments=False))
            return i, f"there is no table {name!r}; one of: {known}"
        missing = [each for each in TABLES[name].requires if each not in (experiment.evaluations or ())]
        if missing:
            return i, f"{name} is computed from the table {missing[0]}: add it, or leave {name} out"
        if message := TABLES[name].complaint(experiment):
            return i, message
    return None


def complaint_about_source(experiment: ExperimentSettings, source: SourceSettings) -> tuple[tuple[str | int, ...], str] | None:
    """Return field and error message of the first setting of an experiment that its source does not allow; None if it allows all."""
    return next(_complaints_about(experiment, source), None)


def _complaints_about(experiment: ExperimentSettings, source: SourceSettings) -> Iterator[tuple[tuple[str | int, ...], str]]:
    why = f"the source {source.name!r} has {'no text and no language model: it is synthetic' if source.synthetic else 'none'}"
    for i, name in enumerate(experiment.evaluations or ()):
        if TABLES[name].of_sources == "text" and source.synthetic:
            yield ("evaluations", i), f"{name} needs tokens and a language model, and {why}; leave it out"
        if TABLES[name].of_sources == "synthetic" and not source.synthetic:
            yield ("evaluations", i), f"{name} compares with the true features of a synthetic source, and {why}; leave it out"
    for i, each in enumerate(experiment.ensemble.published):
        if len(source.layers) > 1 and not each.depends_on("layer"):
            layers = ", ".join(map(str, source.layers))
            message = f"one SAE, and the source {source.name!r} has the layers {layers}: write {{layer}} where the paths differ"
            yield ("ensemble", "published", i, "sae"), message
    if source.keep_activations == "test" and experiment.saes and experiment.mixing != "contiguous":
        message = (
            f"the source {source.name!r} has keep_activations: test, and a chunk from anywhere would cost the forward pass of many: write "
            "mixing: contiguous, or keep all activations"
        )
        yield ("mixing",), message
    if source.synthetic:
        if experiment.ce_loss_tokens and "ce_loss_tokens" in experiment.model_fields_set:
            yield ("ce_loss_tokens",), f"{experiment.ce_loss_tokens}, but {why}; leave it out"
        if any(each.documents for each in experiment.ensemble.specialised):
            yield ("ensemble", "specialised"), f"documents have no labels: {why}"


@dataclass(frozen=True)
class Subject:
    """The dictionaries that an experiment measures: its ensembles, and the baselines as (method, width in members, SAE)."""

    experiment: ExperimentSettings
    activations: Reference
    bagging: Declaration
    boosting: Declaration | None
    """None in an experiment that trains nothing."""
    baselines: Sequence[tuple[str, int, Declaration]]

    @property
    def tokens(self) -> Reference:
        """Return a reference to the tokens of the source."""
        return tokens_of(self.experiment.source)

    @property
    def dictionaries(self) -> list[Declaration]:
        """Return the ensembles and the baselines."""
        return [*self.ensembles.values(), *(declaration for _, _, declaration in self.baselines)]

    @property
    def ensembles(self) -> dict[str, Declaration]:
        """Return the ensembles by method."""
        return {"bagging": self.bagging} | ({"boosting": self.boosting} if self.boosting else {})

    def table(self, name: str) -> Declaration:
        """Return the declaration of a table of the experiment."""
        table, experiment = TABLES[name], self.experiment
        settings: dict[str, Any] = {"members": experiment.ensemble.members}
        if table.dimensions == "layer":
            settings["seeds"] = experiment.ensemble.seeds
        return Declaration(
            **fields_of(experiment, "eval", table.name, table.dimensions, table=table.name),
            builder=f"table {table.name}",
            version=table.version,
            settings={**settings, **table.settings(experiment)},
            partition_settings=lambda partition: table.partition_settings(experiment),
            unavailable=table.unavailable,
            inputs=tuple(Input(each.address.name, each) for each in table.inputs(self)),
            kinds=frozenset({"parquet", "polars"}),
            description=f"{table.question}\n\n`saeens table {experiment.name} {table.name}` prints it.",
        )

    @property
    def whole(self) -> list[tuple[str, int, Declaration]]:
        """Return every dictionary with all its members: method, n_members, declaration."""
        size = self.experiment.ensemble.members
        return [*((method, size, ensemble) for method, ensemble in self.ensembles.items()), *self.baselines]


def table_ops(subject: Subject) -> list[Op]:
    """Declare the ops of an experiment's tables. Tables with the same shared pass are one op."""
    groups: dict[str, list[Table]] = {}
    for table in evaluations_of(subject.experiment):
        groups.setdefault(table.shared_pass.name if table.shared_pass else table.name, []).append(table)
    return [_table_op(subject, name, tables) for name, tables in groups.items()]


def _table_op(subject: Subject, name: str, tables: Sequence[Table]) -> Op:
    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        @cache
        def run_shared_pass() -> Any:
            assert tables[0].shared_pass is not None, "a table without a shared pass asks for its result"
            return tables[0].shared_pass.run(making)

        wanted = {task.declaration.address.name for task in tasks}
        making = Making(subject, context, tasks[0].partition, wanted, run_shared_pass)
        made: list[tuple[Task, pl.DataFrame, dict[str, Any]]] = []
        with context.compute.measure() as measured:
            for task in tasks:
                table, of_table = TABLES[task.declaration.address.name], replace(making, provenance={})
                assert table.rows is not None, "complaint_about refuses tables over experiments"
                rows = table.rows(of_table)
                made.append((task, rows if isinstance(rows, pl.DataFrame) else table_frame(table.name, rows), of_table.provenance))
        for task, rows, provenance in made:
            context.store.write_table(*task.where, task.recipe, context.provenance(task.declaration) | vars(measured) | provenance, rows)

    def check(store: Store, wanted: Wanted, facts: Facts) -> None:
        for table in dict.fromkeys(declaration.address.name for declaration, _ in wanted):
            TABLES[table].preflight(subject.experiment, facts)

    outputs, on_device = tuple(subject.table(table.name) for table in tables), any(table.on_device for table in tables)
    return Op(f"{subject.experiment.name}__eval__{name}", outputs, make, on_device, preflight=check)
