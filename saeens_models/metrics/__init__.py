"""Metrics of SAEs and ensembles: reconstruction, sparsity, and reproducibility of features.

Every metric over tokens has a function for data in memory and a class with ``update`` and ``compute`` for a stream of batches. Both
accumulate in float64 or in integers, and keep no activations longer than a batch.
"""

from saeens_models.metrics.chance import ChanceLevels, chance_levels, isotropic_rows, rows_of_disjoint_documents, rows_with_covariance
from saeens_models.metrics.coactivation import ConnectivityMetric, MemoryBudgetError, connectivity, streaming_memory
from saeens_models.metrics.contexts import HISTOGRAM_BINS, FeatureContexts, FeatureContextsMetric
from saeens_models.metrics.description_length import DescriptionLengthMetric, description_length
from saeens_models.metrics.detection import DetectionScore, detection_score
from saeens_models.metrics.dictionaries import (
    MemberComparison,
    MemberMatches,
    NearestFeatures,
    NearestInOtherRuns,
    compare_members,
    diversity,
    matches_in_other_members,
    max_cosine,
    mean_max_cosine,
    nearest_in_other_runs,
    new_features,
)
from saeens_models.metrics.features import FeatureActivity, FeatureActivityMetric
from saeens_models.metrics.intervals import MeanInterval, jackknife_interval, mean_interval
from saeens_models.metrics.language_model_loss import LossBatch, NextTokenLoss, ce_loss_recovered, next_token_loss
from saeens_models.metrics.marginal_gain import WORTHWHILE_SHARE, Gain, is_worthwhile, suggested_size
from saeens_models.metrics.matched_correlation import MatchedCorrelationMetric
from saeens_models.metrics.matching import Matching, match_features, pw_mcc, shared_fraction
from saeens_models.metrics.output_tokens import OutputTokens, output_tokens
from saeens_models.metrics.paired_bootstrap import (
    MOST_BLOCKS,
    Difference,
    PairedBootstrap,
    Resampled,
    SumsByDocument,
    blocks_of,
    paired_difference,
)
from saeens_models.metrics.reconstruction import Moments, Reconstruction, ReconstructionMetric, reconstruction
from saeens_models.metrics.recovery import RECOVERY_THRESHOLD, Recovery, recovery, recovery_by_chance, recovery_equal_rows
from saeens_models.metrics.sparsity import Sparsity, SparsityMetric, sparsity
from saeens_models.metrics.stability import (
    MAX_MATCHED_FEATURES,
    FeatureStability,
    Stability,
    feature_stability,
    stability,
    stability_equal_candidates,
    stability_matched,
    stability_of_prefixes,
    stability_pairwise,
)

__all__ = [
    "HISTOGRAM_BINS",
    "MAX_MATCHED_FEATURES",
    "MOST_BLOCKS",
    "RECOVERY_THRESHOLD",
    "WORTHWHILE_SHARE",
    "ChanceLevels",
    "ConnectivityMetric",
    "DescriptionLengthMetric",
    "DetectionScore",
    "Difference",
    "FeatureActivity",
    "FeatureActivityMetric",
    "FeatureContexts",
    "FeatureContextsMetric",
    "FeatureStability",
    "Gain",
    "LossBatch",
    "MatchedCorrelationMetric",
    "Matching",
    "MeanInterval",
    "MemberComparison",
    "MemberMatches",
    "MemoryBudgetError",
    "Moments",
    "NearestFeatures",
    "NearestInOtherRuns",
    "NextTokenLoss",
    "OutputTokens",
    "PairedBootstrap",
    "Reconstruction",
    "ReconstructionMetric",
    "Recovery",
    "Resampled",
    "Sparsity",
    "SparsityMetric",
    "Stability",
    "SumsByDocument",
    "blocks_of",
    "ce_loss_recovered",
    "chance_levels",
    "compare_members",
    "connectivity",
    "description_length",
    "detection_score",
    "diversity",
    "feature_stability",
    "is_worthwhile",
    "isotropic_rows",
    "jackknife_interval",
    "match_features",
    "matches_in_other_members",
    "max_cosine",
    "mean_interval",
    "mean_max_cosine",
    "nearest_in_other_runs",
    "new_features",
    "next_token_loss",
    "output_tokens",
    "paired_difference",
    "pw_mcc",
    "reconstruction",
    "recovery",
    "recovery_by_chance",
    "recovery_equal_rows",
    "rows_of_disjoint_documents",
    "rows_with_covariance",
    "shared_fraction",
    "sparsity",
    "stability",
    "stability_equal_candidates",
    "stability_matched",
    "stability_of_prefixes",
    "stability_pairwise",
    "streaming_memory",
    "suggested_size",
]
