"""The table `coactivation`: features that fire together, and distinct features."""

from __future__ import annotations

from collections.abc import Iterator

from saeens_pipeline.assets.registry import Headline, Making, Row, Table, register
from saeens_pipeline.assets.tables.reconstruction import EVALUATION
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> Iterator[Row]:
    from saeens_pipeline.assets.measurements.dictionaries import sizes

    for row, size in sizes(making):
        yield row | {"connectivity": size.connectivity, "diversity": size.diversity, "tokens": size.reconstruction.tokens}


register(
    Table(
        name="coactivation",
        question="Which features fire together, and how many differ?",
        columns=(
            Column("connectivity", "float", "share of feature pairs that never fire on the same token"),
            Column("diversity", "int", "features whose largest cosine to any other feature of the dictionary is below 0.7"),
            Column("tokens", "int", "test tokens"),
        ),
        rows=_rows,
        inputs=lambda subject: [subject.activations, *subject.dictionaries],
        order=30,
        by_default=True,
        shared_pass=EVALUATION,
        headlines=(
            Headline("connectivity", "connectivity", ".4f", place=8, leaderboard=7),
            Headline("diversity", "diversity", ",.0f", in_summary=False, name="diversity (features)"),
        ),
        seed_metrics=("connectivity", "diversity"),
    )
)
