"""The two Dagster components that experiment files name as `type`."""

from saeens_pipeline.components.activation_source import ActivationSource
from saeens_pipeline.components.ensemble_experiment import EnsembleExperiment

__all__ = ["ActivationSource", "EnsembleExperiment"]
