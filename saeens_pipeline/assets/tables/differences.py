"""The table `differences`: which methods can be told apart on the held-out documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from saeens_pipeline.assets.registry import Making, Row, Table, register
from saeens_pipeline.assets.tables.reconstruction import EVALUATION, loss_inputs
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> Iterator[Row]:
    from saeens_pipeline.assets.measurements.differences import difference_rows

    return difference_rows(making)


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    return {f"not measured: {name}": reason for name, reason in artefact.provenance.get("not_measured", {}).items()}


register(
    Table(
        name="differences",
        question="Which dictionaries can be told apart on the held-out documents?",
        columns=(
            Column("metric", "str", "explained_variance, l0 or ce_loss_added_nats"),
            Column("other_method", "str", "method that it is compared with"),
            Column("other_n_members", "int", "its n_members"),
            Column("difference", "float", "metric of the method minus that of the other; null if it was not measured"),
            Column("low", "float", "lower end of its 95% interval: paired bootstrap over documents; null with one document"),
            Column("high", "float", "upper end of the same"),
            Column("tokens", "int", "tokens that the metric was measured on"),
            Column("documents", "int", "documents resampled; more than 1,000 are joined with their neighbours into 1,000 blocks"),
            Column("other_sae_data_versions", "str", "data versions of the other's SAEs, in member order"),
        ),
        rows=_rows,
        inputs=loss_inputs,
        order=15,
        by_default=True,
        settings=lambda experiment: {"ce_loss_tokens": experiment.ce_loss_tokens},
        shared_pass=EVALUATION,
        summary=_summary,
    )
)
