"""The two components that an experiment file names as its `type`."""

from saeens_pipeline.components.activation_source import ActivationSource
from saeens_pipeline.components.ensemble_experiment import EnsembleExperiment

__all__ = ["ActivationSource", "EnsembleExperiment"]
