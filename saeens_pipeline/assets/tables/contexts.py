"""The table `contexts`: places in the test text where each feature is most active, and the next tokens that it promotes."""

from __future__ import annotations

import polars as pl

from saeens_pipeline.assets.registry import Making, Table, register
from saeens_pipeline.storage.tables import Column

CONTEXTS = 8  # of each feature
RADIUS = 12  # tokens on either side of the token on which it is most active


def _rows(making: Making) -> pl.DataFrame:
    from saeens_pipeline.assets.measurements.contexts import context_rows

    return context_rows(making, CONTEXTS, RADIUS)


register(
    Table(
        name="contexts",
        of_sources="text",
        question="Where in the text is each feature most active?",
        columns=(
            Column("member", "int", "member or round, from 1"),
            Column("index", "int", "row of that member's W_dec, from 0"),
            Column("max_activation", "float", "largest activation on the test tokens; null if it never fires"),
            Column(
                "contexts",
                "str",
                f"JSON list: up to {CONTEXTS} places of the test text where it is most active, each in another window, with {RADIUS} "
                "tokens on either side: document, position and centre of the middle token, tokens, activations (null: dropped tokens)",
            ),
            Column("histogram", "str", "JSON list: number of test tokens whose activation is in [i, i + 1) * bin_width, not 0"),
            Column("bin_width", "float", "a power of two; null if it never fires"),
            Column("promoted_tokens", "str", "JSON list of [token, logit]: largest of W_dec W_U, without final norm; [] without a head"),
            Column("suppressed_tokens", "str", "the same for the smallest logits"),
        ),
        rows=_rows,
        inputs=lambda subject: [subject.tokens, subject.activations, *subject.ensembles.values()],
        version=2,
        order=80,
        is_large=True,
        source_parts={
            "tokens": {"contexts": "test/tokens"},
            "activations": {"promoted_tokens": "language_model", "suppressed_tokens": "language_model", "*": "test/activations"},
        },
    )
)
