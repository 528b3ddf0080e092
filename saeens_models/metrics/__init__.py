"""Metrics of SAEs and ensembles: how well they reconstruct, how sparsely, and how reproducible their features are.

Every metric over tokens has a function for data at hand and a class with ``update`` and ``compute`` for a stream of batches; both
accumulate in float64 or in integers and hold no activations beyond a batch.
"""

from __future__ import annotations

from saeens_models.metrics.coactivation import ConnectivityMetric, MemoryBudgetError, connectivity, streaming_memory
from saeens_models.metrics.dictionaries import (
    MAX_MATCHED_FEATURES,
    MemberComparison,
    Stability,
    compare_members,
    diversity,
    max_cosine,
    mean_max_cosine,
    new_features,
    stability,
    stability_matched,
    stability_of_prefixes,
    stability_pairwise,
)
from saeens_models.metrics.intervals import MeanInterval, mean_interval
from saeens_models.metrics.marginal_gain import WORTHWHILE_SHARE, gains, suggested_size
from saeens_models.metrics.reconstruction import Moments, Reconstruction, ReconstructionMetric, reconstruction
from saeens_models.metrics.sparsity import Sparsity, SparsityMetric, sparsity

__all__ = [
    "MAX_MATCHED_FEATURES",
    "WORTHWHILE_SHARE",
    "ConnectivityMetric",
    "MeanInterval",
    "MemberComparison",
    "MemoryBudgetError",
    "Moments",
    "Reconstruction",
    "ReconstructionMetric",
    "Sparsity",
    "SparsityMetric",
    "Stability",
    "compare_members",
    "connectivity",
    "diversity",
    "gains",
    "max_cosine",
    "mean_interval",
    "mean_max_cosine",
    "new_features",
    "reconstruction",
    "sparsity",
    "stability",
    "stability_matched",
    "stability_of_prefixes",
    "stability_pairwise",
    "streaming_memory",
    "suggested_size",
]
