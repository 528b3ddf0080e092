"""The table `token_curves`: what depends on the number of test tokens, against that number."""

from __future__ import annotations

from collections.abc import Iterator

from saeens_pipeline.assets.registry import Making, Row, Table, register
from saeens_pipeline.assets.tables.reconstruction import EVALUATION
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> Iterator[Row]:
    from saeens_pipeline.assets.measurements.dictionaries import sizes

    for row, size in sizes(making):
        yield from (row | point._asdict() for point in size.token_curve)


register(
    Table(
        name="token_curves",
        question="How do connectivity and dead features depend on the number of test tokens?",
        columns=(
            Column("tokens", "int", "test tokens, from the first on: 1/16, 1/8, 1/4, 1/2 of them, and all"),
            Column("connectivity", "float", "share of feature pairs that never fire on the same one of these tokens"),
            Column("dead_features", "float", "share of features that never fire on these tokens", less_is_better=True),
        ),
        rows=_rows,
        inputs=lambda subject: [subject.activations, *subject.dictionaries],
        order=32,
        by_default=True,
        shared_pass=EVALUATION,
    )
)
