"""The leaderboard: every experiment, layer and method that was evaluated, side by side, with means and intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from saeens_pipeline.assets.declarations import Declaration, Input, Op, Task, Workplace
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.names import LEADERBOARD_ADDRESS
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import LEADERBOARD, SEED_METRICS, TOTALS, frame, with_totals

if TYPE_CHECKING:
    import polars as pl

Sizes = Literal["full", "all"]

LEADERBOARD_VERSION = 4
_PLAIN = {  # by table: columns that vary little over seeds, or not at all
    "reconstruction": ("language_model", "sae_data_versions", "n_features"),
    "cost": ("train_tokens", "train_flops", "train_seconds", "residual_flops", "residual_seconds"),
}
_FROM = {  # which columns of which table
    table: (*_PLAIN.get(table, ()), *(name for name, (its_table, _) in SEED_METRICS.items() if its_table == table))
    for table in ("reconstruction", "coactivation", "stability", "cost")
}
_MEASURED = ("experiment", "source", "layer", "seed", "method", "n_members")
_RANKED_TOGETHER = ["source", "layer"]
_LESS_IS_BETTER = (
    *("n_features", "n_members", "l0", "relative_sparsity", *_PLAIN["cost"], *TOTALS),
    *("mse", "fvu", "description_length_bits", "dead_features"),
)
_SHOWN = {
    "explained_variance": "EV", "ce_loss_recovered": "CE rec.", "description_length_bits": "bits", "l0": "L0", "n_features": "features",
    "stability": "stability", "connectivity": "connectivity", "total_flops": "FLOPs", "total_seconds": "seconds", "n_seeds": "seeds",
}  # fmt: skip


def leaderboard_op(tables: Iterable[Declaration], controls: Mapping[str, str]) -> Op:
    """Declare the leaderboard over some tables. It takes those that are there, and waits for none.

    `controls`: by experiment, the same on the untrained language model, whose figures are shown beside.
    """
    used = [table for table in tables if table.address.kind == "eval" and table.address.name in _FROM]
    leaderboard = Declaration(
        address=LEADERBOARD_ADDRESS,
        dimensions="none",
        builder="leaderboard",
        version=LEADERBOARD_VERSION,
        settings={"controls": dict(controls)},
        inputs=tuple(Input(str(table.address), table, optional=True) for table in used),
        source="",
        kinds=frozenset({"parquet", "polars"}),
        tags={"table": LEADERBOARD.name},
        description=f"{LEADERBOARD.question}\n\n`saeens leaderboard` prints it, computed from the tables that are there.",
    )

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        with workplace.compute.measure() as measurement:
            table = standings(workplace.store, leaderboard)
        workplace.store.write_table(*task.where, task.recipe, workplace.provenance() | vars(measurement), table)

    return Op(leaderboard.address.op_name, (leaderboard,), make)


def standings(store: Store, leaderboard: Declaration, sort: str = "explained_variance", sizes: Sizes = "full") -> pl.DataFrame:
    """The rows of the leaderboard from the tables on disk, in the order of source, layer and rank by `sort`.

    Bagging and boosting count with all their members or, with `sizes="all"`, with the first n for every n; expanded SAEs with each of
    their widths. Raises ConfigurationError for a column to sort by that is none of numbers.
    """
    import polars as pl

    sortable = ["n_members", "n_seeds", "n_features", *SEED_METRICS, *_PLAIN["cost"], *TOTALS]
    if sort not in sortable:
        raise ConfigurationError(f"--sort {sort}: the leaderboard is sorted by one of {', '.join(sortable)}")
    table = frame(LEADERBOARD.name, _rows(_measurements(store, leaderboard, sizes)))
    table = _beside_controls(table, leaderboard.settings["controls"])
    rank = pl.col(sort).rank("min", descending=sort not in _LESS_IS_BETTER).over(_RANKED_TOGETHER)
    order = [*_RANKED_TOGETHER, "rank", "experiment", "method", "n_members"]
    return with_totals(table).with_columns(rank=rank.cast(pl.Int64)).sort(order, nulls_last=True).drop(TOTALS)


def for_reading(table: pl.DataFrame, sort: str = "explained_variance") -> pl.DataFrame:
    """Rows of one source and layer for the terminal: what they are sorted by has its interval beside it, with two seeds the points."""
    import polars as pl

    named = _SHOWN
    if sort in SEED_METRICS and sort not in _SHOWN:  # in the place of two others, for which there is no room
        named = {sort: sort.replace("_", " ")} | {
            name: title for name, title in _SHOWN.items() if name not in ("stability", "connectivity")
        }
    columns = [pl.col("rank"), pl.col("experiment"), pl.col("method"), pl.col("n_members").alias("n")]
    for name, title in named.items():
        columns.append(pl.col(name).alias(title))
        if name == (sort if sort in SEED_METRICS else "explained_variance"):
            columns.append(_interval(name).alias("95% interval"))
    if table["control_explained_variance"].count():
        columns += [pl.col("control_explained_variance").alias("EV untrained"), pl.col("control_stability").alias("stability untrained")]
    return with_totals(table).select(columns)


def _interval(name: str) -> pl.Expr:
    import polars as pl

    half_width = (pl.col(f"{name}_high") - pl.col(name)).map_elements("±{:.2g}".format, pl.String)
    points = pl.col(f"{name}_by_seed").map_elements(_rounded, pl.String)
    return pl.when(pl.col("n_seeds") == 2).then(pl.concat_str(half_width, pl.lit(" ("), points, pl.lit(")"))).otherwise(half_width)


def _beside_controls(table: pl.DataFrame, controls: Mapping[str, str]) -> pl.DataFrame:
    """The table with what the control of each experiment reached, of the same layer, method and size."""
    import polars as pl

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


def _measurements(store: Store, leaderboard: Declaration, sizes: Sizes) -> pl.DataFrame:
    """One row for each experiment, layer, seed, method and size; null where a table is not there."""
    import polars as pl

    parts = {name: [frame(name, []).select(pl.lit("").alias("source"), pl.all())] for name in _FROM}
    for each, _, artefact in leaderboard.optional_inputs(store):
        assert isinstance(each.artefact, Declaration)
        part = pl.read_parquet(artefact.path, hive_partitioning=False)
        parts[each.artefact.address.name].append(part.select(pl.lit(each.artefact.source).alias("source"), pl.all()))
    tables = {name: pl.concat(found).select(*_MEASURED, *_FROM[name]) for name, found in parts.items()}
    measured = tables.pop("reconstruction")
    for table in tables.values():
        measured = measured.join(table, on=_MEASURED, how="left")
    measured = measured.filter(pl.col("explained_variance").is_not_nan())  # nor null: of activations without variance
    if sizes == "all":
        return measured
    of_all_members = pl.col("n_members") == pl.col("n_members").max().over("experiment", "layer", "method")
    return measured.filter(of_all_members | ~pl.col("method").is_in(["bagging", "boosting"]))


def _rows(measured: pl.DataFrame) -> Iterator[dict[str, Any]]:
    for of_seeds in measured.sort("seed").partition_by("experiment", "source", "layer", "method", "n_members", maintain_order=True):
        cost = of_seeds.select(*_PLAIN["cost"]).mean().row(0, named=True)
        yield {
            **of_seeds.select("experiment", "source", "layer", "language_model", "method", "n_members", "n_features").row(0, named=True),
            "n_seeds": len(of_seeds),
            "seeds": ",".join(map(str, of_seeds["seed"])),
            **{column: value for name in SEED_METRICS for column, value in _statistics(name, of_seeds[name].to_list())},
            **cost,
            "train_tokens": None if cost["train_tokens"] is None else round(cost["train_tokens"]),
            "sae_data_versions": ";".join(of_seeds["sae_data_versions"]),
        }


def _statistics(name: str, points: Sequence[float | None]) -> Iterator[tuple[str, float | str | None]]:
    """The columns of a metric. A seed that has no value has an empty point; mean and interval are of the others."""
    from saeens_models.metrics import mean_interval

    there = [point for point in points if point is not None]
    mean, low, high = mean_interval(there) if there else (None, None, None)
    yield from ((name, mean), (f"{name}_low", low), (f"{name}_high", high))
    yield f"{name}_by_seed", ",".join("" if point is None else str(point) for point in points) if there else None
