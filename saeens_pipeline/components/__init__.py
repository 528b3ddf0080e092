"""The two Dagster components that experiment files name as `type`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import dagster as dg
from pydantic import BaseModel

from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.orchestration.assets import build_asset
from saeens_pipeline.orchestration.ops import ops_of, tables_of
from saeens_pipeline.report.asset import pareto_op
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.sources import SourceSettings


class _FromFile:
    """The assets of a document of an experiment file. Not a component itself: `dg check` asks every component for its settings."""

    settings_class: ClassVar[type[BaseModel]]

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def ops(self) -> list[Op]:
        """Return the ops that make the assets."""
        raise NotImplementedError

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return cls.settings_class

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> _FromFile:
        return cls(cls.settings_class.model_validate(attributes, context={FILE: Path(context.path) / "defs.yaml"}))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return dg.Definitions(assets=[build_asset(op) for op in self.ops()])


class ActivationSource(_FromFile, dg.Component):
    """A source: its tokens, and its activations at one hook, partitioned by layer."""

    settings_class = SourceSettings

    def ops(self) -> list[Op]:
        return source_ops(self.settings)


class EnsembleExperiment(_FromFile, dg.Component):
    """An experiment: members, boosting rounds, residuals, baselines, ensembles and tables, partitioned by layer and seed."""

    settings_class = ExperimentSettings

    def ops(self) -> list[Op]:
        experiments: list[ExperimentSettings] = self.settings.experiments
        ops = [op for each in experiments for op in ops_of(each)]
        if self.settings.sweep:
            ops.append(pareto_op(self.settings, [table for each in experiments for table in tables_of(each)]))
        return ops
