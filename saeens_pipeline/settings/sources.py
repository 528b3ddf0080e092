"""Settings of an ActivationSource: a language model, a corpus, and the hook whose activations are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, PositiveInt, ValidationInfo, field_validator

from saeens_pipeline.settings.corpora import BUILTIN_CORPUS, Corpus
from saeens_pipeline.settings.from_file import FromFile
from saeens_pipeline.storage.names import validate_name

Name = Annotated[str, AfterValidator(validate_name)]


class SourceSettings(FromFile):
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
