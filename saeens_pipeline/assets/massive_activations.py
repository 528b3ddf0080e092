"""The mark of explained variances that are mostly about a few rows: massive activations (Sun et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import polars as pl

_MAX_SHARE = 0.1  # of the variance, in 0.1 % of the rows, at least one
SHARE = "top_rows_variance"
"""Column of tables with that share of the held-out rows."""
_MARKED = "explained_variance"


def is_held_by_few(share: float | None) -> bool:
    """Return whether 0.1 % of the rows hold more than a tenth of the variance, given their share; None is unknown."""
    return share is not None and share > _MAX_SHARE


def caution(shares: Iterable[float | None]) -> str:
    """Return a sentence if few rows hold more than a tenth of the variance; otherwise nothing. `shares` may hold nulls."""
    largest = max((share for share in shares if share is not None), default=None)
    if largest is None or not is_held_by_few(largest):
        return ""
    return f"0.1 % of the held-out rows (at least one) hold {largest:.0%} of the variance: explained variance is mostly about these rows"


def cautions(table: pl.DataFrame) -> Iterator[str]:
    """Yield a sentence for each source (if the table names it) and layer of a table with the column `top_rows_variance`."""
    if SHARE not in table.columns:
        return
    where = [name for name in ("source", "layer") if name in table.columns]
    for values, rows in table.partition_by(where, as_dict=True, maintain_order=True).items():
        if sentence := caution(rows[SHARE]):
            source = "".join(f"{value}, " for value in values[:-1])
            yield f"(!) {source}layer {values[-1]}: {sentence}"


def marked(title: str, column: str, table: pl.DataFrame) -> str:
    """Return the title of a column, with (!) for an explained variance that is mostly about a few rows, as `table` says."""
    return f"{title} (!)" if column == _MARKED and SHARE in table.columns and caution(table[SHARE]) else title
