"""Ties of the leaderboard and the report, from differences written by hand."""

from __future__ import annotations

import polars as pl

from saeens_pipeline.assets.registry import table_frame
from saeens_pipeline.assets.tables.leaderboard import ranked, unequal_tokens
from saeens_pipeline.assets.ties import tied_with
from saeens_pipeline.report.main_table import main_table
from saeens_pipeline.report.metrics import EV
from saeens_pipeline.report.record import Record
from saeens_pipeline.report.results import Results
from saeens_pipeline.storage.names import LEADERBOARD


def _differences(*rows: tuple[int, str, str, float | None, float | None]) -> pl.DataFrame:
    """Rows of (seed, method, other method, low, high)."""
    return table_frame(
        "differences",
        [
            {"seed": seed, "metric": "explained_variance", "method": method, "n_members": 1, "other_method": other, "other_n_members": 1}
            | {"low": low, "high": high}
            for seed, method, other, low, high in rows
        ],
    )


DIFFERENCES = _differences(
    *((seed, "single", "boosting", -0.2, -0.1) for seed in (1, 2)),
    *((seed, "boosting", "expanded", -0.01, 0.1) for seed in (1, 2)),
    (1, "boosting", "bagging", -0.01, 0.1),
    (2, "boosting", "bagging", 0.01, 0.1),
    (1, "boosting", "compute_matched", -0.01, 0.1),
    (2, "boosting", "compute_matched", None, None),
    (1, "consensus", "boosting", 0.01, 0.1),
    (2, "boosting", "consensus", 0.01, 0.1),
)


def test_the_documents_tell_apart_what_differs_on_the_same_side_in_every_seed():
    tied = tied_with(DIFFERENCES, "explained_variance", ("boosting", 1), 2)
    assert tied == {("single", 1): False, ("expanded", 1): True, ("bagging", 1): True, ("consensus", 1): True}
    assert tied_with(DIFFERENCES, "l0", ("boosting", 1), 2) == {}
    assert tied_with(DIFFERENCES, "explained_variance", ("expanded", 1), 2) == {("boosting", 1): True}


def test_the_reports_main_table_marks_ties_with_the_best():
    values = {"single": 0.7, "bagging": 0.75, "boosting": 0.8, "expanded": 0.79}
    reconstruction = table_frame(
        "reconstruction",
        [
            {"seed": seed, "method": method, "n_members": 1, "explained_variance": value, "sae_data_versions": ""}
            for seed in (1, 2)
            for method, value in values.items()
        ],
    )
    results = Results("tiny", 1, {"reconstruction": reconstruction, "differences": DIFFERENCES})
    rows = main_table(results, Record.__new__(Record), [EV])
    assert {row.method.name: (row.cells[0].best, row.cells[0].tie) for row in rows} == {
        "single": (False, False),
        "bagging": (False, True),
        "boosting": (True, False),
        "expanded": (False, True),
    }


def test_connectivity_at_different_numbers_of_tokens_is_not_ranked():
    board = table_frame(
        LEADERBOARD,
        [
            {"source": "s", "layer": layer, "experiment": name, "method": "single", "n_members": 1, "tokens": tokens}
            | {"connectivity": value, "explained_variance": value, "dead_features": value}
            for layer, name, tokens, value in ((1, "a", 20_000, 0.5), (1, "b", 40_000, 0.6), (2, "a", 20_000, 0.5), (2, "b", 20_000, 0.6))
        ],
    )
    for metric, ranks in {"connectivity": [2, 1], "dead_features": [1, 2], "explained_variance": [2, 1]}.items():
        rank = {(layer, name): rank for layer, name, rank in ranked(board, metric).select("layer", "experiment", "rank").iter_rows()}
        assert [rank[2, "a"], rank[2, "b"]] == ranks
        assert [rank[1, "a"], rank[1, "b"]] == (ranks if metric == "explained_variance" else [None, None])
    (sentence,) = unequal_tokens(board)
    assert sentence.startswith("s, layer 1: connectivity and dead features are not ranked")
    assert sentence.endswith("20,000 in a; 40,000 in b")
