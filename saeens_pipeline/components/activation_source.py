"""`type: saeens_pipeline.components.ActivationSource`: a language model, a corpus, and where to read its activations."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg
from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, PositiveInt, Tag, ValidationInfo, field_validator

from saeens_pipeline.language_models.corpora import BUILTIN_CORPUS, open_corpus
from saeens_pipeline.language_models.hub_datasets import HubDataset
from saeens_pipeline.language_models.text_files import FOLDER, TextFiles
from saeens_pipeline.storage.names import validate_name

Name = Annotated[str, AfterValidator(validate_name)]


def _builtin(name: str) -> str:
    open_corpus(name)
    return name


def _kind_of_corpus(corpus: Any) -> str:
    if isinstance(corpus, dict):
        return "files" if "files" in corpus else "dataset"
    return {TextFiles: "files", HubDataset: "dataset"}.get(type(corpus), "builtin")


CORPORA: dict[str, type[BaseModel]] = {"files": TextFiles, "dataset": HubDataset}
"""What a corpus with fields may be, by the part that pydantic adds to the place of an error."""

Corpus = Annotated[
    Annotated[str, AfterValidator(_builtin), Tag("builtin")] | Annotated[TextFiles, Tag("files")] | Annotated[HubDataset, Tag("dataset")],
    Discriminator(_kind_of_corpus),
]


class SourceSettings(BaseModel):
    """The fields of an ActivationSource."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="lower-case letters, digits and _")
    language_model: str = Field(
        description="builtin/reference, a folder in transformers' format, a model's name on the hub, or transformer_lens:NAME"
    )
    revision: str = Field("main", description="of a model of the hub: branch, tag or commit")
    language_model_dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="that the language model computes in")
    weights: Literal["trained", "random"] = Field("trained", description="random: the same architecture, untrained, as a control")
    corpus: Corpus = Field(BUILTIN_CORPUS, description="where text comes from: builtin, {name: DATASET} of the hub, or {files: PATTERN}")
    hook: str = Field("resid_post", description="resid_pre, resid_mid, resid_post, mlp_out, attn_out, or a module path with {layer}")
    layers: list[Annotated[int, Field(ge=0)]] = Field(min_length=1, description="layers of the language model, from 0")
    context_length: PositiveInt = Field(description="tokens of a window")
    packing: Literal["concatenate", "document"] = Field("concatenate", description="document: windows inside one document")
    windows_per_document: PositiveInt | None = Field(None, description="at most so many, evenly spread (packing: document); none: all")
    drop: list[Literal["special", "padding", "first"]] = Field([], description="positions that give no activation row; first is position 0")
    train_tokens: PositiveInt = Field(description="activation rows for training")
    test_tokens: PositiveInt = Field(description="activation rows for evaluation")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of stored activations")

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
        return cls(SourceSettings.model_validate(attributes, context={FOLDER: Path(context.path)}))

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        from saeens_pipeline.assets.dagster_assets import build_assets
        from saeens_pipeline.assets.sources import source_ops

        return dg.Definitions(assets=build_assets(source_ops(self.settings)))
