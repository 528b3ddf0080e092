"""The two Dagster components that experiment files name as `type`. Their assets are those of the catalogue."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import dagster as dg
from pydantic import BaseModel

from saeens_pipeline.assets.declarations import Op
from saeens_pipeline.orchestration.assets import build_asset
from saeens_pipeline.orchestration.catalogue import Catalogue
from saeens_pipeline.orchestration.external_data import external_assets
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.sources import SourceSettings


class _Declared:
    """The assets of the source or experiment of this name in the catalogue. No component itself: `dg check` asks each for its settings."""

    settings_class: ClassVar[type[BaseModel]]

    def __init__(self, name: str) -> None:
        self.name = name

    def ops(self, catalogue: Catalogue) -> list[Op]:
        """Return the ops that compute the assets."""
        raise NotImplementedError

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        return cls.settings_class

    @classmethod
    def load(cls, attributes: Any, context: dg.ComponentLoadContext) -> Self:
        return cls(attributes.name)

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        ops = self.ops(Catalogue.load())
        return dg.Definitions(assets=[*map(build_asset, ops), *external_assets(ops)])


class ActivationSource(_Declared, dg.Component):
    """A source: its tokens, and its activations at one hook, partitioned by layer; of each language model that it follows."""

    settings_class = SourceSettings

    def ops(self, catalogue: Catalogue) -> list[Op]:
        return [op for source in catalogue.sources_of(self.name) for op in catalogue.source_ops(source.name)]


class EnsembleExperiment(_Declared, dg.Component):
    """An experiment: members, boosting rounds, residuals, baselines, ensembles and tables, partitioned by layer and seed."""

    settings_class = ExperimentSettings

    def ops(self, catalogue: Catalogue) -> list[Op]:
        ops = [op for each in catalogue.parts(self.name) for op in catalogue.own_ops(each)]
        return [*ops, *map(catalogue.pareto, catalogue.sweeps_of(self.name))]
