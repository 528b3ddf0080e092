"""What came of asking about features, in words: for the command line and the report."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from saeens_pipeline.language_models.autointerp.endpoint import KEY_VARIABLE, URL_VARIABLE
from saeens_pipeline.language_models.autointerp.interview import MALFORMED, REFUSED, SCORED
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import DamagedArtefactError, Store, read_artefact
from saeens_pipeline.storage.tables import read_table

if TYPE_CHECKING:
    import polars as pl

AUTOINTERP = "autointerp"
MADE, NOT_CONFIGURED = "made", "not configured"  # what the provenance of a table says
WHY = {  # a feature is not scored, by status
    MALFORMED: "no answer that could be read",
    REFUSED: "the endpoint refused a request",
    "too few contexts": "not asked about, it fires on too few texts",
    "too few silent windows": "not asked about, it is silent on too few texts",
}


def outcome(store: Store, experiment: str, seeds: Collection[int], layer: int | None = None) -> str:
    """How many features were asked about and scored, and why others were not; and, where there was no endpoint, how to name one.

    Of these seeds, and of one layer or all; code stands in backticks. Empty where there is no such table. Raises SaeensError for one that
    cannot be read.
    """
    import polars as pl

    address = Address(experiment, "eval", AUTOINTERP)
    there = [
        where for where in store.partitions(address, "layer", "seed") if where.seed in seeds and (layer is None or where.layer == layer)
    ]
    if not there:
        return ""
    rows = read_table(store.root, experiment, AUTOINTERP, layer).filter(pl.col("seed").is_in(list(seeds)))
    sentences = [in_words(rows)] if len(rows) else ["No feature was asked about."]
    lacking = [where for where in there if _had_no_endpoint(store, address, where)]
    if lacking:
        which = "" if len(lacking) == len(there) else f" for {' and '.join(map(str, lacking))}"
        kept = ": what is here was answered before" if len(rows) and not which else ""
        sentences.append(
            f"No endpoint was configured{which}{kept}. Set `{URL_VARIABLE}` to the address of a language model, such as "
            f"`http://localhost:8080/v1`, and `{KEY_VARIABLE}` if it wants a key, then `saeens run {experiment}`."
        )
    return " ".join(sentences)


def in_words(rows: pl.DataFrame) -> str:
    """Counts of rows of the table by status, of which there is at least one."""
    import polars as pl

    counts = dict(rows["status"].value_counts(sort=True, name="n").sort("n", "status", descending=[True, False]).iter_rows())
    n_scored, n_asked = counts.get(SCORED, 0), sum(n for status, n in counts.items() if not status.startswith("too few"))
    models = " and ".join(sorted(set(rows["model"])))
    are = "is" if n_scored == 1 else "are"
    sentences = [f"Of {len(rows):,} features that were drawn, {models} was asked about {n_asked:,}; {n_scored:,} {are} scored."]
    others = [f"{n:,} ({status}{f': {WHY[status]}' if status in WHY else ''})" for status, n in counts.items() if status != SCORED]
    if others:
        sentences.append(f"Not scored: {', '.join(others)}.")
    without_control = rows.filter(pl.col("status") == SCORED, pl.col("control_score").is_null()).height
    if 0 < without_control < n_scored:
        sentences.append(f"Without a control score: {without_control:,} of those that are.")
    return " ".join(sentences)


def _had_no_endpoint(store: Store, address: Address, where: Partition) -> bool:
    try:
        made = read_artefact(store.path(address, where)).provenance
    except DamagedArtefactError:  # it says itself what is wrong with it, elsewhere
        return False
    return made.get(AUTOINTERP, {}).get("status") == NOT_CONFIGURED
