"""Experiment files: pydantic models of their fields, reading, sweeps and controls. Importing it loads neither Dagster nor torch."""

from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.sources import SourceSettings

__all__ = ["ExperimentSettings", "SourceSettings"]
