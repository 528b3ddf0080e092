"""Writes reports from the command line, from the tables that are there: `saeens report`, and the end of `saeens run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource
from saeens_pipeline.report.asset import REPORT, recipe_of_what_is_there
from saeens_pipeline.storage.locks import writing_alone
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.tables import TABLES, has_table, layers_with_tables

if TYPE_CHECKING:
    from saeens_pipeline.assets.declarations import Op
    from saeens_pipeline.orchestration.catalogue import Catalogue

INDEX = "index.html"


def write_reports(name: str | None, layers: Sequence[int]) -> list[Path]:
    """Write the reports of an experiment and the page over all experiments, whether they are fresh or not; gives the pages to open.

    A report whose tables are not all there says what is missing. Without `layers`, of every layer that has a table; without a name,
    only the page over all experiments. Raises SaeensError where there is no table.
    """
    from saeens_pipeline.orchestration.catalogue import load_catalogue

    catalogue, written = load_catalogue(), []
    if name:
        op = _report_op(catalogue, name)
        written = [_write(op, Partition(layer)) for layer in _layers(catalogue, name, layers)]
    return [*written, _write(catalogue.leaderboard_page(), Partition())]


def renew_leaderboard_page(catalogue: Catalogue) -> None:
    """Write the page over all experiments, if tables have changed since it was written."""
    op = catalogue.leaderboard_page()
    (page,), store = op.outputs, StoreResource().store
    if not store.hit(page.address, Partition(), recipe_of_what_is_there(page, store, Partition())):
        _write(op, Partition())


def renew_reports_beside(catalogue: Catalogue, control: str, layers: Sequence[int]) -> list[Path]:
    """Write anew what reports there are of these layers of the experiments that have this control; gives their pages."""
    store = StoreResource().store
    ops = [_report_op(catalogue, name) for name, each in catalogue.controls.items() if each == control]
    reports = [(op, Partition(layer)) for op in ops for layer in layers]
    return [_write(op, where) for op, where in reports if (store.path(op.outputs[0].address, where) / INDEX).exists()]


def _report_op(catalogue: Catalogue, name: str) -> Op:
    (op,) = (op for op in catalogue.ops(catalogue.experiment(name)) if op.outputs[0].address.kind == REPORT)
    return op


def _layers(catalogue: Catalogue, name: str, wanted: Sequence[int]) -> list[int]:
    from saeens_pipeline.orchestration.layers import recorded_layers

    root = StoreResource().store.root
    source = catalogue.sources[catalogue.experiment(name).source]
    known = sorted(source.layers)
    if not {*wanted, *layers_with_tables(root, name)} <= set(known):  # else there is nothing to ask Dagster, which takes a second to load
        known = recorded_layers(source).layers
    unknown = [str(layer) for layer in wanted if layer not in known]
    if unknown:
        raise ConfigurationError(f"{name} has no layer {', '.join(unknown)}; it has {', '.join(map(str, known))}")
    there = [layer for layer in wanted or known if any(has_table(root, name, table, layer) for table in TABLES)]
    if not there:
        which = f" of layer {', '.join(map(str, wanted))}" if wanted else ""
        raise SaeensError(f"{name} has no table{which} below {root} yet, which a report is made from: `saeens run {name}` makes them")
    return there


def _write(op: Op, partition: Partition) -> Path:
    from saeens_pipeline.assets.declarations import Task, Workplace

    (declaration,) = op.outputs
    store = StoreResource().store
    workplace = Workplace(store, ComputeResource.from_environment(), "saeens report", lambda: (), lambda *_: None)
    with writing_alone(store.root, [(declaration.address, partition)]):
        op.make(workplace, [Task(declaration, partition, recipe_of_what_is_there(declaration, store, partition))])
    return store.path(declaration.address, partition) / INDEX
