"""Rows of the table `recovery`: dictionaries compared with the true features of synthetic activations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from safetensors.torch import load_file

from saeens_models.metrics import Recovery, recovery, recovery_by_chance, recovery_equal_rows
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary
from saeens_pipeline.assets.registry import Making, Row
from saeens_pipeline.assets.sources import true_features


def recovery_rows(making: Making) -> Iterator[Row]:
    """Yield a row for each method and ensemble size."""
    features = load_file(true_features(making.require(making.subject.activations)))["W_dec"].to(making.device)
    n_of_one = len(load_dictionary(making, making.subject.bagging)[:1].W_dec)

    @cache
    def by_chance(n_rows: int) -> Recovery:
        return recovery_by_chance(features, n_rows)

    for method, n, dictionary, saes in making.methods():
        W_dec = load_dictionary(making, dictionary)[: len(saes)].W_dec.detach()
        chance = by_chance(len(W_dec))
        row = recovery(features, W_dec)._asdict() | {"n_true_features": len(features), "n_rows": len(W_dec)}
        row |= {f"{name}_chance": getattr(chance, name) for name in ("recovered_fraction", "mean_max_cosine")}
        if len(W_dec) >= n_of_one:
            equal = recovery_equal_rows(features, W_dec, n_of_one)
            row |= {f"{name}_equal_rows": getattr(equal, name) for name in ("recovered_fraction", "mean_max_cosine")}
        yield making.row(method, n, saes) | row
