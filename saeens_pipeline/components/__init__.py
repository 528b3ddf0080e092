"""What an experiment file may declare."""

from saeens_pipeline.components.activation_source import ActivationSource, SourceSettings
from saeens_pipeline.components.ensemble_experiment import EnsembleExperiment, ExperimentSettings

__all__ = ["ActivationSource", "EnsembleExperiment", "ExperimentSettings", "SourceSettings"]
