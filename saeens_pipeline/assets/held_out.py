"""Held-out figures of an SAE or an ensemble, which the tables of its experiment have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import polars as pl

from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.registry import TABLES, listed
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store


class HeldOut(NamedTuple):
    """Figures of one SAE or ensemble in one partition, by title, and the table that they are from."""

    table: Address
    figures: dict[str, float]


def held_out(store: Store, declaration: Declaration, partition: Partition, artefact: Artefact) -> HeldOut | None:
    """Return the figures of the first table with a row about these SAEs; None before there is one.

    Only rows about the present data versions count, so that figures of an earlier SAE are never shown.
    """
    if declaration.builder == "ensemble":
        named = artefact.recipe["inputs"]
        versions = [named[name] for name, _, _ in declaration.input_partitions(partition) if name in named]
    else:
        versions = [artefact.data_version]
    for table in (table for table in listed(over_experiments=False) if table.figures):
        address = Address(declaration.address.owner, "eval", table.name)
        try:
            found = store.find(address, partition)
        except DamagedArtefactError:
            continue
        if found is None:
            continue
        rows = pl.scan_parquet(found.path, hive_partitioning=False, glob=False).filter(sae_data_versions=",".join(versions))
        for row in rows.select(*table.figures).head(1).collect().iter_rows(named=True):
            return HeldOut(address, {title: row[column] for column, title in table.figures.items() if row[column] is not None})
    return None


def measured_by(table: Declaration) -> Iterator[Declaration]:
    """Yield the SAEs and ensembles that a table has rows about, if it has held-out figures of them."""
    if not TABLES[table.address.name].figures:
        return
    pending = [each.artefact for each in table.inputs]
    while pending:
        each = pending.pop(0)
        if isinstance(each, Declaration) and each.address.kind != "source":
            yield each
            if each.builder == "ensemble":
                pending += [below.artefact for below in each.inputs]
