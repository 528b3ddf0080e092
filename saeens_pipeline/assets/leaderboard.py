"""The leaderboard: every experiment, layer and method that was evaluated, side by side, with means and intervals over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.declarations import Declaration, Input, Op, Task, Workplace
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.names import LEADERBOARD_ADDRESS
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import LEADERBOARD, frame

if TYPE_CHECKING:
    import polars as pl

LEADERBOARD_VERSION = 3
_FROM = {  # which columns of which table
    "reconstruction": ("language_model", "sae_data_versions", "n_features", "l0", "explained_variance"),
    "coactivation": ("connectivity",),
    "stability": ("stability",),
    "cost": ("train_tokens", "train_flops", "train_seconds"),
}
_MEASURED = ("experiment", "source", "layer", "seed", "method", "n_members")
_RANKED_TOGETHER = ["source", "layer"]
_LESS_IS_BETTER = ("n_features", "n_members", "l0", "train_tokens", "train_flops", "train_seconds")


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


def standings(store: Store, leaderboard: Declaration, sort: str = "explained_variance") -> pl.DataFrame:
    """The rows of the leaderboard from the tables on disk, in the order of source, layer and rank by `sort`.

    Bagging and boosting count with all their members, expanded SAEs with each of their widths. Raises ConfigurationError for a
    column to sort by that is none of numbers.
    """
    import polars as pl

    sortable = [column.name for column in LEADERBOARD.columns if column.type != "str" and column.name not in ("rank", "layer")]
    if sort not in sortable:
        raise ConfigurationError(f"--sort {sort}: the leaderboard is sorted by one of {', '.join(sortable)}")
    table = frame(LEADERBOARD.name, _rows(_measurements(store, leaderboard)))
    table = _beside_controls(table, leaderboard.settings["controls"])
    rank = pl.col(sort).rank("min", descending=sort not in _LESS_IS_BETTER).over(_RANKED_TOGETHER)
    return table.with_columns(rank=rank.cast(pl.Int64)).sort([*_RANKED_TOGETHER, "rank", "experiment", "method"], nulls_last=True)


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


def for_reading(table: pl.DataFrame) -> pl.DataFrame:
    """Rows of one source and layer for the terminal: the interval in one column, with two seeds their points beside it."""
    import polars as pl

    half_width = (pl.col("explained_variance_high") - pl.col("explained_variance")).map_elements("±{:.2g}".format, pl.String)
    points = pl.col("explained_variance_by_seed").map_elements(_rounded, pl.String)
    interval = pl.when(pl.col("n_seeds") == 2).then(pl.concat_str(half_width, pl.lit(" ("), points, pl.lit(")"))).otherwise(half_width)
    renamed = {
        "n_members": "n", "explained_variance": "EV", "interval": "95 % interval", "l0": "L0", "n_features": "features",
        "stability": "stability", "connectivity": "connectivity", "train_tokens": "tokens", "train_flops": "FLOPs",
        "train_seconds": "seconds", "n_seeds": "seeds",
    }  # fmt: skip
    if table["control_explained_variance"].count():
        renamed |= {"control_explained_variance": "EV untrained", "control_stability": "stability untrained"}
    return table.with_columns(interval=interval).select("rank", "experiment", "method", *renamed).rename(renamed)


def _rounded(points: str) -> str:
    return ", ".join(f"{float(point):.4f}" for point in points.split(","))


def _measurements(store: Store, leaderboard: Declaration) -> pl.DataFrame:
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
    of_all_members = pl.col("n_members") == pl.col("n_members").max().over("experiment", "layer", "method")
    measured = measured.filter(pl.col("explained_variance").is_not_nan())  # nor null: of activations without variance
    return measured.filter(of_all_members | ~pl.col("method").is_in(["bagging", "boosting"]))


def _rows(measured: pl.DataFrame) -> Iterator[dict[str, Any]]:
    from saeens_models.metrics import mean_interval

    numbers = {column.name: column.type for column in LEADERBOARD.columns if column.type != "str" and column.name in measured.columns}
    for of_seeds in measured.sort("seed").partition_by("experiment", "source", "layer", "method", "n_members", maintain_order=True):
        means = of_seeds.select(*numbers).mean().row(0, named=True)
        points = of_seeds["explained_variance"].to_list()
        mean, low, high = mean_interval(points)
        yield {
            **of_seeds.select("experiment", "source", "language_model", "method").row(0, named=True),
            **{name: round(mean) if numbers[name] == "int" and mean is not None else mean for name, mean in means.items()},
            "n_seeds": len(of_seeds),
            "seeds": ",".join(map(str, of_seeds["seed"])),
            "explained_variance": mean,
            "explained_variance_low": low,
            "explained_variance_high": high,
            "explained_variance_by_seed": ",".join(map(str, points)),
            "sae_data_versions": ";".join(of_seeds["sae_data_versions"]),
        }
