"""The leaderboard: every experiment, layer and method that was evaluated, side by side, with means and intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from saeens_pipeline.assets.baselines.registry import methods
from saeens_pipeline.assets.declarations import Declaration, Input, Op, RunContext, Task
from saeens_pipeline.assets.massive_activations import SHARE, cautions, is_held_by_few, marked
from saeens_pipeline.assets.over_seeds import Sizes, measurements, over_seeds
from saeens_pipeline.assets.registry import (
    Markdown,
    Table,
    column_named,
    columns_of,
    register,
    seed_column,
    seed_metrics,
    summary_titles,
    table_frame,
)
from saeens_pipeline.assets.tables.cost import TOTALS, with_totals
from saeens_pipeline.assets.ties import tied_with
from saeens_pipeline.storage.names import LEADERBOARD, LEADERBOARD_ADDRESS, Partition
from saeens_pipeline.storage.recipes import Artefact, Store
from saeens_pipeline.storage.tables import Column, read_part

LEADERBOARD_VERSION = 6
_QUESTION = "Which method is best, over all experiments?"
_PLAIN = {  # by table: columns that vary little or not at all over seeds
    "reconstruction": ("language_model", "sae_data_versions", "n_features", SHARE, "tokens"),
    "cost": ("train_tokens", "train_flops", "train_seconds", "residual_flops", "residual_seconds"),
}
_RANKED_TOGETHER = ["source", "layer"]
_TIED_BY = "explained_variance"
_DEPEND_ON_TOKENS = ("connectivity", "dead_features")
_DIFFERENCES = "differences"
_AT_EQUAL_FEATURES = {  # by metric that grows with the number of features
    **dict.fromkeys(("stability", "stability_pairwise", "stability_matched"), "stability_equal_candidates"),
    **dict.fromkeys(("recovered_fraction", "mean_max_cosine"), "recovered_fraction_equal_rows"),
}
_GIVE_WAY = ("stability_equal_candidates", "connectivity")  # to the metric that the terminal's table is sorted by, because of its width


def _columns_read() -> dict[str, tuple[str, ...]]:
    """Return, by table, the columns that the leaderboard reads."""
    metrics = seed_metrics()
    names = dict.fromkeys([*_PLAIN, *(table for table, _ in metrics.values())])
    read = {name: [*_PLAIN.get(name, ()), *(column for column, (table, _) in metrics.items() if table == name)] for name in names}
    for of_table in read.values():
        of_table += [column.left_out for name in of_table if (column := seed_column(name)) and column.left_out]
    return {name: tuple(columns) for name, columns in read.items()}


def leaderboard_op(tables: Iterable[Declaration], controls: Mapping[str, str]) -> Op:
    """Declare the leaderboard, whose inputs are tables of all experiments. It reads the tables on disk and waits for none.

    `controls`: by experiment, the experiment with an untrained language model whose figures are shown next to it.
    """
    names = {*_columns_read(), _DIFFERENCES}
    used = [table for table in tables if table.address.kind == "eval" and table.address.name in names]
    leaderboard = Declaration(
        address=LEADERBOARD_ADDRESS,
        dimensions="none",
        builder="leaderboard",
        version=LEADERBOARD_VERSION,
        settings={"controls": dict(controls)},
        inputs=tuple(Input(str(table.address), table, optional=True) for table in used),
        source="",
        kinds=frozenset({"parquet", "polars"}),
        tags={"table": LEADERBOARD},
        description=f"{_QUESTION}\n\n`saeens leaderboard` prints it, computed from the tables on disk.",
    )

    def make(context: RunContext, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        with context.compute.measure() as measurement:
            table = standings(context.store, leaderboard)
        context.store.write_table(*task.where, task.recipe, context.provenance(task.declaration) | vars(measurement), table)

    return Op(leaderboard.address.op_name, (leaderboard,), make)


def standings(store: Store, leaderboard: Declaration, sort: str = "explained_variance", sizes: Sizes = "full") -> pl.DataFrame:
    """Return the leaderboard of the tables on disk, in the order of source, layer and rank by `sort`; `sizes` as for `measurements`.

    Raises as `ranked`.
    """
    rows = over_seeds(measurements(store, leaderboard, _columns_read(), sizes), seed_metrics(), [*_PLAIN["cost"], SHARE, "tokens"])
    counts = ("train_tokens", "tokens")
    whole = ({**row, **{name: None if row[name] is None else round(row[name]) for name in counts}} for row in rows)
    table = _with_ties(table_frame(LEADERBOARD, whole), store, leaderboard)
    return ranked(_with_controls(table, leaderboard.settings["controls"]), sort)


def sort_column(given: str) -> str:
    """Return the column to rank by, given by its name or by its heading in the terminal. Raises ConfigurationError, with the columns."""
    sortable = ["n_members", "n_seeds", "n_features", *seed_metrics(), *_PLAIN["cost"], *TOTALS]
    return column_named(given, sortable, {"n_members": "n", "n_seeds": "seeds", **summary_titles()}, "the leaderboard")


def ranked(table: pl.DataFrame, sort: str) -> pl.DataFrame:
    """Return a leaderboard ranked by a column. Raises as `sort_column`.

    Rows of a source and layer have no rank by a metric that depends on the number of test tokens if their numbers differ.
    """
    sort = sort_column(sort)
    columns = (column for name in _columns_read() for column in columns_of(name))
    ascending = {*TOTALS, *(column.name for column in columns if column.less_is_better)}
    rank = pl.col(sort).rank("min", descending=sort not in ascending).over(_RANKED_TOGETHER)
    if sort in _DEPEND_ON_TOKENS:
        rank = pl.when(pl.col("tokens").drop_nulls().n_unique().over(_RANKED_TOGETHER) <= 1).then(rank)
    order = [*_RANKED_TOGETHER, "rank", "experiment", "method", "n_members"]
    return with_totals(table).with_columns(rank=rank.cast(pl.Int64)).sort(order, nulls_last=True).drop(TOTALS)


def unequal_tokens(table: pl.DataFrame) -> Iterator[str]:
    """Yield a sentence for each source and layer with experiments that were evaluated on different numbers of test tokens."""
    for (source, layer), rows in table.drop_nulls("tokens").partition_by(_RANKED_TOGETHER, as_dict=True, maintain_order=True).items():
        if rows["tokens"].n_unique() > 1:
            counts = {n: sorted(set(of_n["experiment"])) for (n,), of_n in rows.sort("tokens").partition_by("tokens", as_dict=True).items()}
            of_experiments = "; ".join(f"{n:,} in {', '.join(names)}" for n, names in counts.items())
            yield (
                f"{source}, layer {layer}: connectivity and dead features are not ranked, because they depend on the number of test "
                f"tokens: {of_experiments}"
            )


def grows_with_features(table: pl.DataFrame, sort: str) -> Iterator[str]:
    """Yield a sentence if the table is ranked by a metric that grows with the number of features, which the rows do not have alike."""
    if sort in _AT_EQUAL_FEATURES and table["n_features"].n_unique() > 1:
        yield (
            f"{sort} grows with the number of features, and so do its reference and chance levels: it does not compare dictionaries of "
            f"other sizes. --sort {_AT_EQUAL_FEATURES[sort]} does"
        )


def _with_ties(table: pl.DataFrame, store: Store, leaderboard: Declaration) -> pl.DataFrame:
    """Return the table with `tied_with_best`, from the tables `differences` on disk."""
    parts: dict[tuple[str, int | None], list[pl.DataFrame]] = {}
    for _, each, where, artefact in leaderboard.optional_inputs(store, Partition()):
        if each.address.name == _DIFFERENCES:
            parts.setdefault((each.address.owner, where.layer), []).append(read_part(artefact.path))
    said: dict[tuple[Any, ...], str] = {}
    for rows in table.partition_by(_RANKED_TOGETHER):
        best = rows.sort(_TIED_BY, descending=True, nulls_last=True).row(0, named=True)
        where, size = (best["experiment"], best["layer"]), (best["method"], best["n_members"])
        if where in parts:
            said[*where, *size] = "best"
            tied = tied_with(pl.concat(parts[where]), _TIED_BY, size, best["n_seeds"])
            said |= {(*where, *other): "tie" if is_tied else "no" for other, is_tied in tied.items()}
    keys = table.select("experiment", "layer", "method", "n_members").rows()
    return table.with_columns(tied_with_best=pl.Series([said.get(key) for key in keys], dtype=pl.String))


def for_reading(table: pl.DataFrame, sort: str = "explained_variance") -> pl.DataFrame:
    """Return the terminal's columns of rows of one source and layer. The metric of `sort` has an interval, with two seeds the points."""
    named = summary_titles() | {"n_seeds": "seeds"}
    if sort in seed_metrics() and sort not in named:
        named = {sort: sort.replace("_", " ")} | {name: title for name, title in named.items() if name not in _GIVE_WAY}
    columns = [pl.col("rank")]
    if sort == _TIED_BY and "tie" in table["tied_with_best"]:
        columns.append(pl.when(tied_with_best="tie").then(pl.lit("tie")).alias("best?"))
    columns += [pl.col("experiment"), pl.col("method"), pl.col("n_members").alias("n")]
    for name, title in named.items():
        columns.append(pl.col(name).alias(marked(title, name, table)))
        if name == (sort if sort in seed_metrics() else "explained_variance"):
            columns.append(_interval(name).alias("95% or points"))
    if table["control_explained_variance"].count():
        columns.append(pl.col("control_explained_variance").alias("EV untrained"))
    shown = with_totals(table).select(columns)
    return shown.select(name for name in shown.columns if name == "rank" or shown[name].count())


def _interval(name: str) -> pl.Expr:
    half_width = (pl.col(f"{name}_high") - pl.col(name)).map_elements("±{:.2g}".format, pl.String)
    points = pl.col(f"{name}_by_seed").map_elements(_rounded, pl.String)
    return pl.coalesce(half_width, pl.when(pl.col("n_seeds") > 1).then(points))


def _with_controls(table: pl.DataFrame, controls: Mapping[str, str]) -> pl.DataFrame:
    """Return the table with the figures of each experiment's control, for the same layer, method and size."""
    names = ("explained_variance", "stability")
    on = ["control", "layer", "method", "n_members"]
    of_controls = table.select(pl.col("experiment").alias("control"), *on[1:], *(pl.col(name).alias(f"control_{name}") for name in names))
    named = table.drop(f"control_{name}" for name in names).with_columns(
        control=pl.col("experiment").replace_strict(controls, default=None, return_dtype=pl.String)
    )
    return named.join(of_controls, on=on, how="left").select(table.columns)


def _rounded(points: str) -> str:
    values = [float(point) for point in points.split(",") if point]
    return ", ".join(f"{value:.4f}" if 0.1 <= abs(value) < 10 else f"{value:.4g}" for value in values)


def _columns() -> tuple[Column, ...]:
    return (
        Column("rank", "int", "place among the rows of one source and layer"),
        Column("experiment", "str", "experiment"),
        Column("source", "str", "source of its activations"),
        Column("language_model", "str", "trained, or random: the untrained control"),
        Column("layer", "int", "layer of the language model, from 0"),
        Column("method", "str", ", ".join(methods())),
        Column("n_members", "int", "SAEs in the ensemble; for expanded SAEs the n whose width they match; else 1"),
        Column(
            "tied_with_best",
            "str",
            "best: the highest explained variance of the source and layer; no: the held-out documents tell it apart from the best in "
            "every seed; tie: they do not; null: not compared, as with another experiment",
            from_columns=("difference",),
        ),
        Column("n_seeds", "int", "ensemble seeds that the means are over"),
        Column("seeds", "str", "these seeds, comma-separated"),
        Column("n_features", "int", "features of the whole dictionary"),
        Column("tokens", "int", "test tokens, on which connectivity and dead_features depend"),
        Column(SHARE, "float", "share of the test rows' variance in 0.1 % of them; above 0.1, explained_variance describes these"),
        *(column for name, (_, meaning) in seed_metrics().items() for column in _over_seeds(name, meaning)),
        Column("train_tokens", "int", "tokens seen in training, summed over members, mean over seeds"),
        Column("train_flops", "float", "dense-equivalent operations of training, mean over seeds"),
        Column("train_seconds", "float", "seconds of training, mean over seeds"),
        Column("residual_flops", "float", "boosting's passes that compute residuals, not in train_flops, mean over seeds"),
        Column("residual_seconds", "float", "seconds of those passes, not in train_seconds, mean over seeds"),
        Column("control", "str", "the same experiment on the untrained language model; null where there is none"),
        Column("control_explained_variance", "float", "the control's, of the same layer and method; null where it was not run"),
        Column("control_stability", "float", "the control's, likewise"),
        Column("sae_data_versions", "str", "data versions of the SAEs in member order, comma-separated; seeds are separated by ;"),
    )


def _over_seeds(name: str, meaning: str) -> tuple[Column, ...]:
    return (
        Column(name, "float", f"{meaning}, mean over seeds"),
        Column(f"{name}_low", "float", f"lower end of its 95% interval ({_interval_kind(name)})", from_columns=(name,)),
        Column(f"{name}_high", "float", "upper end of the same", from_columns=(name,)),
        Column(f"{name}_by_seed", "str", "the points, comma-separated, in the order of seeds", from_columns=(name,)),
    )


def _interval_kind(name: str) -> str:
    column = seed_column(name)
    if column is None or not column.compares_seeds:
        return "Student's t over seeds, from three"
    return "jackknife over seeds, from three" if column.left_out else "none: it compares seeds; always null"


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    """Return the first row of every source and layer."""
    first = table.filter(rank=1).unique(["source", "layer"], keep="first", maintain_order=True)
    rows = [
        f"| {row['source']} | {row['layer']} | {row['experiment']} | {row['method']} "
        f"| {row['explained_variance']:.4f}{' (!)' if is_held_by_few(row[SHARE]) else ''} "
        f"| {'' if row['control_explained_variance'] is None else format(row['control_explained_variance'], '.4f')} |"
        for row in first.iter_rows(named=True)
    ]
    head = ["| source | layer | experiment | method | EV | EV of the control, untrained |", "|---|---|---|---|---|---|"]
    return {"best": Markdown("\n".join([*head, *rows, "", *cautions(first), *unequal_tokens(table)]))}


register(
    Table(
        name=LEADERBOARD,
        question=_QUESTION,
        columns=_columns,
        version=LEADERBOARD_VERSION,
        dimensions="none",
        order=200,
        over_experiments=True,
        may_be_empty=True,
        summary=_summary,
    )
)
