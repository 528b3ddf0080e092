"""Downstream tasks for ensembles of every size: concept detection and spurious correlation removal, as defined by SAEBench 0.6."""

from saeens_models.probing.concept_detection import (
    N_FEATURES,
    NEAR_DUPLICATE_COSINE,
    ConceptProbe,
    ConceptScore,
    LabelledTexts,
    detect_concepts,
    one_against_the_others,
    probe_accuracy,
)
from saeens_models.probing.pooling import RAW, Dictionary, PooledTexts, TextBatch, TextBatches, texts_at_once
from saeens_models.probing.spurious_correlation import (
    N_ABLATED,
    CorrelationScore,
    CorrelationTask,
    LinearProbes,
    Quadrants,
    remove_correlations,
    scr,
    train_probes,
)

__all__ = [
    "NEAR_DUPLICATE_COSINE",
    "N_ABLATED",
    "N_FEATURES",
    "RAW",
    "ConceptProbe",
    "ConceptScore",
    "CorrelationScore",
    "CorrelationTask",
    "Dictionary",
    "LabelledTexts",
    "LinearProbes",
    "PooledTexts",
    "Quadrants",
    "TextBatch",
    "TextBatches",
    "detect_concepts",
    "one_against_the_others",
    "probe_accuracy",
    "remove_correlations",
    "scr",
    "texts_at_once",
    "train_probes",
]
