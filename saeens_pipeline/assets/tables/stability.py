"""The table `stability`: reproducibility of features under different seeds, with its reference and chance levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from saeens_pipeline.assets.registry import Headline, Making, Row, Table, register
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column

_CHANCE = {
    "isotropic": "random directions",
    "covariance": "random directions with the covariance of the training activations",
    "data": "centred training activations picked at random, from other documents for each run",
}
_CHANCE_OF = {"stability": "stability", "pw_mcc": "pw_mcc", "shared_fraction": "shared_fraction, each row its own encoder,"}


def _compared(name: str, meaning: str, *, left_out: str = "") -> Column:
    return Column(name, "float", meaning, compares_seeds=True, left_out=left_out)


def _rows(making: Making) -> Iterator[Row]:
    from saeens_pipeline.assets.measurements.stability import stability_rows

    return stability_rows(making)


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    provenance = artefact.provenance
    counts = {
        "equal candidates [features]": provenance.get("candidates"),
        "functional stability [tokens]": provenance.get("functional_tokens"),
    }
    reasons = {f"not measured: {column}": reason for column, reason in provenance.get("not_measured", {}).items()}
    return {name: value for name, value in counts.items() if value} | reasons


_HEADLINES = (
    Headline(
        "stability", "stability", ".4f", place=6, of_control=True,
        about="do the same features come back under another seed? Mean over features of the largest cosine to a feature of any other run. "
        "It grows with the number of features: compare it with its reference and chance levels, not with another size",
    ),
    Headline(
        "reference", "stability_reference", ".4f", name="stability, one SAE against as many features",
        about="stability of member 1 alone against as many features of the other runs: what the number of candidates gives without an "
        "ensemble",
    ),
    Headline(
        "equal-candidate stability", "stability_equal_candidates", ".4f", in_summary=False, place=7, leaderboard=6, better="more",
        about="stability with as many features drawn from every dictionary as one SAE has: comparable between sizes",
    ),
    Headline(
        "stability by chance", "stability_chance_data", ".4f", in_summary=False,
        about="stability of dictionaries of as many training activations picked at random: chance",
    ),
    Headline(
        "pw_mcc", "pw_mcc", ".4f", in_summary=False, name="pw_mcc (one-to-one)", better="more",
        about="mean absolute cosine of features matched one to one between two runs",
    ),
)  # fmt: skip


register(
    Table(
        name="stability",
        question="Do the same features come back under another seed?",
        columns=(
            Column("n_runs", "int", "seeds compared; stability grows with it"),
            Column("n_features", "int", "features of the dictionary; stability grows with it"),
            _compared("stability", "mean over features of the largest cosine to any feature of any other seed"),
            _compared("stability_pairwise", "the same with each other seed alone, averaged", left_out="stability_pairwise_left_out"),
            Column("stability_pairwise_left_out", "float", "mean of stability_pairwise without this seed; null with fewer than three"),
            _compared("stability_matched", "mean cosine of the one-to-one matching; null above 2048 features"),
            _compared(
                "stability_reference",
                "stability of member 1 alone against the first n members of other seeds that have as many features; null if none have",
            ),
            _compared(
                "stability_equal_candidates",
                "stability of as many features as member 1 has, drawn from every dictionary; mean of ten draws; null if it has fewer",
            ),
            _compared("stability_of_member", "stability of the n-th member or round alone, against those of other seeds"),
            *(
                Column(f"{column}_chance_{kind}", "float", f"{meaning} of as many {rows}; mean of several draws")
                for column, meaning in _CHANCE_OF.items()
                for kind, rows in _CHANCE.items()
            ),
            _compared(
                "pw_mcc",
                "mean absolute cosine of features matched one to one with another seed; averaged over seeds",
                left_out="pw_mcc_left_out",
            ),
            Column("pw_mcc_left_out", "float", "mean of pw_mcc without this seed; null with fewer than three"),
            Column("pw_mcc_bound", "float", "the best matching has at most this pw_mcc; equal to pw_mcc where it is exact"),
            _compared("shared_fraction", "share of matched features with a cosine of at least 0.7 in decoder and in encoder"),
            _compared(
                "functional_stability",
                "mean correlation of the activations of matched features, over at most 10,000 test tokens; pairs that never fire left out",
            ),
        ),
        rows=_rows,
        version=2,
        dimensions="layer",
        order=40,
        by_default=True,
        headlines=_HEADLINES,
        seed_metrics=(
            *("stability", "stability_pairwise", "stability_matched", "stability_reference", "stability_equal_candidates"),
            *("pw_mcc", "shared_fraction", "functional_stability"),
        ),
        summary=_summary,
    )
)
