"""The table `feature_stability`: how often each feature comes back under other seeds."""

from __future__ import annotations

import polars as pl

from saeens_pipeline.assets.registry import Making, Table, register
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> pl.DataFrame:
    from saeens_pipeline.assets.measurements.stability import feature_stability_rows

    return feature_stability_rows(making)


register(
    Table(
        name="feature_stability",
        question="Which features come back under other seeds?",
        columns=(
            Column("member", "int", "member or round, from 1"),
            Column("index", "int", "row of that member's W_dec, from 0"),
            Column("n_runs", "int", "seeds compared"),
            Column("n_found", "int", "other seeds with a feature of cosine at least 0.7; null with one seed"),
            Column("best_cosine", "float", "largest cosine to any feature of any other seed; null with one seed"),
        ),
        rows=_rows,
        dimensions="layer",
        order=45,
    )
)
