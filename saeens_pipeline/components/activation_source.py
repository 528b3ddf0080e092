"""`type: saeens_pipeline.components.ActivationSource`: a language model, a corpus, and where to read its activations."""

from __future__ import annotations

from typing import Annotated, Literal

import dagster as dg
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator

from saeens_pipeline.language_models.corpora import open_corpus
from saeens_pipeline.storage.names import validate_name

Name = Annotated[str, AfterValidator(validate_name)]


class SourceSettings(BaseModel):
    """The fields of an ActivationSource."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="lower-case letters, digits and _")
    language_model: str = Field(description="builtin/reference, or the path of a folder in transformers' format")
    revision: str = "main"
    weights: Literal["trained", "random"] = Field("trained", description="random: the same architecture, untrained, as a control")
    corpus: str = Field("builtin/installed_packages", description="where text comes from")
    hook: str = Field("resid_post", description="resid_pre, resid_post, mlp_out, attn_out, or a module path with {layer}")
    layers: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="layers of the language model, from 0")
    context_length: PositiveInt = Field(description="tokens of a window")
    packing: Literal["concatenate", "document"] = Field("concatenate", description="document: windows inside one document")
    windows_per_document: PositiveInt | None = Field(None, description="at most so many, evenly spread (packing: document); none: all")
    drop: list[Literal["special", "padding", "first"]] = Field([], description="positions that give no activation row; first is position 0")
    train_tokens: PositiveInt = Field(description="activation rows for training")
    test_tokens: PositiveInt = Field(description="activation rows for evaluation")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of stored activations")

    @field_validator("corpus")
    @classmethod
    def _corpus_exists(cls, corpus: str) -> str:
        open_corpus(corpus)
        return corpus

    @field_validator("windows_per_document")
    @classmethod
    def _inside_documents(cls, windows: int | None, info: ValidationInfo) -> int | None:
        if windows is not None and info.data.get("packing", "document") != "document":
            raise ValueError("a limit per document needs packing: document")
        return windows

    @field_validator("layers", "drop")
    @classmethod
    def _no_repetition(cls, values: list) -> list:
        if len(set(values)) < len(values):
            raise ValueError(f"{values} names something twice")
        return values


class ActivationSource(dg.Component):
    """A source: its tokens, and its activations at one hook, partitioned by layer."""

    def __init__(self, settings: SourceSettings) -> None:
        self.settings = settings

    @classmethod
    def get_model_cls(cls) -> type[SourceSettings]:
        return SourceSettings

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> ActivationSource:
        return cls(SourceSettings.model_validate(attributes))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        from saeens_pipeline.assets.dagster_assets import build_assets
        from saeens_pipeline.assets.sources import source_ops

        return dg.Definitions(assets=build_assets(source_ops(self.settings)))
