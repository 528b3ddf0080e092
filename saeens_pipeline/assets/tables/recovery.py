"""The table `recovery`: true features of synthetic activations that each dictionary has."""

from __future__ import annotations

from collections.abc import Iterator

from saeens_pipeline.assets.registry import Headline, Making, Row, Table, register
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> Iterator[Row]:
    from saeens_pipeline.assets.measurements.recovery import recovery_rows

    return recovery_rows(making)


_HEADLINES = (
    Headline(
        "recovered", "recovered_fraction", ".3f", place=9, name="true features recovered",
        about="share of the true features with a dictionary row of cosine at least 0.9. It grows with the number of rows: "
        "compare it at equal rows",
    ),
    Headline(
        "recovered at equal rows", "recovered_fraction_equal_rows", ".3f", place=10, name="true features recovered, at equal rows",
        better="more",
        about="the same with as many rows drawn from every dictionary as one SAE has: comparable between sizes",
    ),
    Headline(
        "precision", "precision", ".3f", better="more",
        about="share of dictionary rows with a true feature of cosine at least 0.9",
    ),
)  # fmt: skip


register(
    Table(
        name="recovery",
        question="How many of the true features does each dictionary have?",
        columns=(
            Column("recovered_fraction", "float", "share of true features with a dictionary row of cosine at least 0.9"),
            Column("mean_max_cosine", "float", "mean over true features of the largest cosine to a dictionary row"),
            Column("precision", "float", "share of dictionary rows with a true feature of cosine at least 0.9"),
            Column("n_true_features", "int", "true features of the source"),
            Column("n_rows", "int", "rows of the dictionary; recovery grows with it", less_is_better=True),
            Column(
                "recovered_fraction_equal_rows",
                "float",
                "recovered_fraction of as many rows as member 1 has, drawn from the dictionary; mean of ten draws; null if it has fewer",
            ),
            Column("mean_max_cosine_equal_rows", "float", "mean_max_cosine of these rows; null if the dictionary has fewer"),
            Column("recovered_fraction_chance", "float", "recovered_fraction of n_rows random directions; mean of three draws"),
            Column("mean_max_cosine_chance", "float", "mean_max_cosine of n_rows random directions; mean of three draws"),
        ),
        rows=_rows,
        of_sources="synthetic",
        inputs=lambda subject: [subject.activations, *subject.dictionaries],
        order=35,
        headlines=_HEADLINES,
        seed_metrics=("recovered_fraction", "recovered_fraction_equal_rows", "mean_max_cosine", "precision"),
        source_parts={"activations": {"*": "features"}},
    )
)
