"""The table `features`: density of each feature, its nearest features in members and seeds, and its most active tokens."""

from __future__ import annotations

import polars as pl

from saeens_pipeline.assets.registry import Making, Table, register
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> pl.DataFrame:
    from saeens_pipeline.assets.measurements.features import feature_rows

    return feature_rows(making)


# Its inputs are SAEs only, as those of `stability`: changed text or activations change the data versions of the SAEs. With activations as
# an input, the automation would request it in the run of the activations, before the SAEs are trained.
register(
    Table(
        name="features",
        of_sources="text",
        question="What does each feature do, and where does it come back?",
        columns=(
            Column("member", "int", "member or round, from 1"),
            Column("index", "int", "row of that member's W_dec, from 0"),
            Column("density", "float", "share of the test tokens on which it fires"),
            Column("mean_activation", "float", "mean over the tokens on which it fires; null if it never does"),
            Column("nearest_member", "int", "the other member with the feature of the largest cosine; null for single SAEs"),
            Column("nearest_cosine", "float", "that cosine"),
            Column("matches", "str", "JSON list of [member, index, cosine]: the nearest of each other member; null for single SAEs"),
            Column("nearest_other_seed_cosine", "float", "largest cosine to any feature under any other seed; null with one seed"),
            Column("nearest_other_seed", "int", "the seed of that feature"),
            Column("nearest_other_seed_member", "int", "its member or round under that seed"),
            Column("nearest_other_seed_index", "int", "its row of that member's W_dec"),
            Column("top_tokens", "str", "JSON list: the ten test tokens on which it is most active, the most active first"),
        ),
        rows=_rows,
        version=3,
        dimensions="layer",
        order=70,
    )
)
