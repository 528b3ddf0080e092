"""`type: saeens_pipeline.components.ActivationSource`: a language model, a corpus, and the hook whose activations are read."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
from pydantic import BaseModel

from saeens_pipeline.assets.sources import source_ops
from saeens_pipeline.orchestration.assets import build_assets
from saeens_pipeline.settings.from_file import FILE
from saeens_pipeline.settings.sources import SourceSettings


class ActivationSource(dg.Component):
    """A source: its tokens, and its activations at one hook, partitioned by layer."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings

    @classmethod
    def get_model_cls(cls) -> type[SourceSettings]:
        return SourceSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> ActivationSource:
        return cls(SourceSettings.model_validate(attributes, context={FILE: Path(context.path) / "defs.yaml"}))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return dg.Definitions(assets=build_assets(source_ops(self.settings)))
