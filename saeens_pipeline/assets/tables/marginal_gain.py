"""The table that says what each further member or round adds, from the tables of all ensemble sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from saeens_pipeline.assets.declarations import Declaration, Op, Task, Workplace
from saeens_pipeline.assets.tables.evaluation import Row, Subject
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import frame

if TYPE_CHECKING:
    import polars as pl

_MEASURES = {"reconstruction": "explained_variance", "stability": "stability"}  # table and column; both are 1 at best


def marginal_gain_op(subject: Subject, tables: Mapping[str, Declaration]) -> Op:
    """Declare the table of a layer, which is about all seeds; `tables` are those that the experiment fills, by name."""
    used = {table: tables[table] for table in _MEASURES if table in tables}
    declaration = subject.declare("marginal_gain", [*used.values(), subject.bagging, subject.boosting], dimensions="layer")

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        with workplace.compute.measure() as measurement:
            measured = {_MEASURES[table]: _read(workplace.store, each, task.partition) for table, each in used.items()}
            rows = list(_rows(subject, workplace, task.partition, measured))
        workplace.store.write_table(*task.where, task.recipe, workplace.provenance() | vars(measurement), frame("marginal_gain", rows))

    return Op(declaration.address.op_name, (declaration,), make, on_device=True)


def _read(store: Store, table: Declaration, partition: Partition) -> pl.DataFrame:
    """A layer's part of a table, or its parts of all seeds."""
    import polars as pl

    seeds = [None] if table.dimensions == "layer" else table.seeds
    paths = [store.require(table.address, Partition(partition.layer, seed)).path for seed in seeds]
    return pl.concat([pl.read_parquet(path, hive_partitioning=False) for path in paths])


def _rows(subject: Subject, workplace: Workplace, partition: Partition, measured: Mapping[str, pl.DataFrame]) -> Iterator[Row]:
    """`measured` are tables by the column of theirs that is looked at."""
    import saeens_models as sm

    store, device = workplace.store, workplace.compute.resolve(float64=True)
    for method, ensemble in (("bagging", subject.bagging), ("boosting", subject.boosting)):
        values = {column: _by_seed(table, method, column) for column, table in measured.items()}
        suggested = sm.metrics.suggested_size(
            [[fmean(of_seeds) for of_seeds in zip(*each.values(), strict=True)] for each in values.values() if each]
        )
        for seed in subject.experiment.ensemble.seeds:
            where = Partition(partition.layer, seed)
            saes = subject.members(store, ensemble, where)
            new_features = sm.metrics.new_features([sm.load_sae(sae.path).W_dec.detach().to(device) for sae in saes])
            gains: dict[str, Any] = {column: sm.metrics.gains(each[seed]) for column, each in values.items() if each}
            for n in range(1, len(saes) + 1):
                yield subject.row(store, where, method, n, [sae.data_version for sae in saes[:n]]) | {
                    "explained_variance_gain": gains["explained_variance"][n - 1],
                    "stability_gain": gains["stability"][n - 1] if "stability" in gains and n > 1 else None,
                    "new_features": new_features[n - 1],
                    "suggested": suggested,
                }


def _by_seed(table: pl.DataFrame, method: str, column: str) -> dict[int, list[float]]:
    """By seed, the values of the ensembles of 1 .. J members; empty where the column is null, as stability is with one seed."""
    of_method = table.filter(method=method).drop_nulls(column).sort("n_members")
    return {seed: of_seed[column].to_list() for (seed,), of_seed in of_method.partition_by("seed", as_dict=True).items()}
