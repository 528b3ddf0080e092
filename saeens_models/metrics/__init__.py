"""Metrics of SAEs and ensembles: how well they reconstruct, how sparsely, and how reproducible their features are.

Every metric over tokens has a function for data at hand and a class with ``update`` and ``compute`` for a stream of batches; both
accumulate in float64 or in integers and hold no activations beyond a batch.
"""

from __future__ import annotations

from saeens_models.metrics.coactivation import ConnectivityMetric, connectivity
from saeens_models.metrics.dictionaries import (
    MAX_MATCHED_FEATURES,
    diversity,
    max_cosine,
    mean_max_cosine,
    stability,
    stability_matched,
    stability_pairwise,
)
from saeens_models.metrics.reconstruction import Reconstruction, ReconstructionMetric, reconstruction
from saeens_models.metrics.sparsity import Sparsity, SparsityMetric, sparsity

__all__ = [
    "MAX_MATCHED_FEATURES",
    "ConnectivityMetric",
    "Reconstruction",
    "ReconstructionMetric",
    "Sparsity",
    "SparsityMetric",
    "connectivity",
    "diversity",
    "max_cosine",
    "mean_max_cosine",
    "reconstruction",
    "sparsity",
    "stability",
    "stability_matched",
    "stability_pairwise",
]
