"""The table `marginal_gain`: the gain of each further member or round, from the tables of all ensemble sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import polars as pl

from saeens_pipeline.assets.declarations import Declaration, Reference
from saeens_pipeline.assets.registry import Headline, Making, Row, Subject, Table, fills, register
from saeens_pipeline.storage.tables import Column

_MEASURES = {"reconstruction": "explained_variance", "stability": "stability"}  # table and column; both are 1 at best


def _used(subject: Subject) -> dict[str, Declaration]:
    return {name: subject.table(name) for name in _MEASURES if fills(subject.experiment, name)}


def _inputs(subject: Subject) -> Sequence[Reference]:
    return [*_used(subject).values(), subject.bagging, subject.boosting]


def _read(making: Making, table: Declaration) -> pl.DataFrame:
    """Return a layer's part of a table, or its parts of all seeds."""
    paths = dict.fromkeys(of_seed.require(table).path for of_seed in making.of_seeds)
    return pl.concat([pl.read_parquet(path, hive_partitioning=False, glob=False) for path in paths])


def _rows(making: Making) -> Iterator[Row]:
    import saeens_models as sm

    subject = making.subject
    measured = {_MEASURES[name]: _read(making, each) for name, each in _used(subject).items()}
    for method, ensemble in (("bagging", subject.bagging), ("boosting", subject.boosting)):
        values = {column: _by_seed(table, method, column) for column, table in measured.items()}
        suggested = sm.metrics.suggested_size(
            [[fmean(of_seeds) for of_seeds in zip(*each.values(), strict=True)] for each in values.values() if each]
        )
        for of_seed in making.of_seeds:
            saes = of_seed.members(ensemble)
            new_features = sm.metrics.new_features([sm.load_sae(sae.path).W_dec.detach().to(making.device) for sae in saes])
            gains: dict[str, Any] = {column: sm.metrics.gains(each[of_seed.partition.seed]) for column, each in values.items() if each}
            for n in range(1, len(saes) + 1):
                yield of_seed.row(method, n, saes[:n]) | {
                    "explained_variance_gain": gains["explained_variance"][n - 1],
                    "stability_gain": gains["stability"][n - 1] if "stability" in gains and n > 1 else None,
                    "new_features": new_features[n - 1],
                    "suggested": suggested,
                }


def _by_seed(table: pl.DataFrame, method: str, column: str) -> dict[int | None, list[float]]:
    """Return, for each seed, a column's values for the ensembles of 1 .. J members.

    The result is empty if the column is null, as stability is with one seed.
    """
    of_method = table.filter(method=method).drop_nulls(column).sort("n_members")
    return {seed: of_seed[column].to_list() for (seed,), of_seed in of_method.partition_by("seed", as_dict=True).items()}


def _conclusion(table: pl.DataFrame) -> str:
    members = table["n_members"].max()
    suggested = table.filter(n_members=members).drop_nulls("suggested").group_by("method").agg(pl.col("suggested").first()).sort("method")
    sizes = ", ".join(f"{method} {size}{' or more' if size == members else ''}" for method, size in suggested.iter_rows())
    return f"suggested ensemble size: {sizes} (eval/marginal_gain has the gain of each member)" if sizes else ""


register(
    Table(
        name="marginal_gain",
        question="How many members or rounds are enough?",
        columns=(
            Column(
                "explained_variance_gain",
                "float",
                "explained variance minus that of one member less; for the first member, its own",
                from_columns=("explained_variance",),
            ),
            Column(
                "stability_gain",
                "float",
                "stability minus that of one member less; null for the first, and with one seed",
                from_columns=("stability",),
            ),
            Column("new_features", "int", "features of member n whose largest cosine to the features of earlier members is below 0.7"),
            Column(
                "suggested",
                "int",
                "smallest number of members after which no further one closes 5% of the gap to 1 of explained variance or "
                "stability, means over seeds; the same in all rows of a method",
                from_columns=("explained_variance", "stability"),
            ),
        ),
        rows=_rows,
        inputs=_inputs,
        dimensions="layer",
        order=50,
        by_default=True,
        requires=("reconstruction",),
        conclusion=_conclusion,
        headlines=tuple(
            Headline(name, column, ".4g", in_summary=False, about=about)
            for column, name, about in (
                ("new_features", "new features of a member", ""),
                ("explained_variance_gain", "explained variance that a member adds", "over that of one member less"),
                ("stability_gain", "stability that a member adds", "over that of one member less. Below 0: it takes away"),
            )
        ),
    )
)
