"""`type: saeens_pipeline.components.EnsembleExperiment`: SAEs, their ensembles, baselines and evaluation tables."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from saeens_pipeline.orchestration.assets import build_assets
from saeens_pipeline.orchestration.ops import ops_of, tables_of
from saeens_pipeline.report.asset import pareto_op
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.from_file import FILE


class EnsembleExperiment(dg.Component):
    """An experiment: members, boosting rounds, residuals, baselines, ensembles and tables, partitioned by layer and seed."""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings = settings

    @classmethod
    def get_model_cls(cls) -> type[ExperimentSettings]:
        return ExperimentSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> EnsembleExperiment:
        return cls(ExperimentSettings.model_validate(attributes, context={FILE: Path(context.path) / "defs.yaml"}))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        experiments = self.settings.experiments
        ops = [op for each in experiments for op in ops_of(each)]
        if self.settings.sweep:
            ops.append(pareto_op(self.settings, [table for each in experiments for table in tables_of(each)]))
        return dg.Definitions(assets=build_assets(ops))
