"""`type: saeens_pipeline.components.EnsembleExperiment`: SAEs, their ensembles, baselines and evaluation tables."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from saeens_pipeline.assets.experiments import declared_ops
from saeens_pipeline.orchestration.assets import build_assets
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.relative_paths import FOLDER


class EnsembleExperiment(dg.Component):
    """An experiment: members, boosting rounds, residuals, baselines, ensembles and tables, partitioned by layer and seed."""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings

    @classmethod
    def get_model_cls(cls) -> type[ExperimentSettings]:
        return ExperimentSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> EnsembleExperiment:
        return cls(ExperimentSettings.model_validate(attributes, context={FOLDER: Path(context.path)}))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        checks = {each.name: each.checks for each in self.settings.experiments}
        return dg.Definitions(assets=build_assets(declared_ops(self.settings), checks))
