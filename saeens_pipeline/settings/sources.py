"""Settings of an ActivationSource: a language model, a corpus, and the hook whose activations are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, ValidationInfo, field_validator

from saeens_pipeline.settings.corpora import BUILTIN_CORPUS, Corpus
from saeens_pipeline.settings.from_file import FILE, Distinct, FromFile
from saeens_pipeline.storage.names import validate_name

_TRANSFORMER_LENS = "transformer_lens:"

Name = Annotated[str, AfterValidator(validate_name)]


class SourceSettings(FromFile):
    """Fields of an ActivationSource: activations of a language model on a corpus."""

    name: Name = Field(description="name of the source: lower-case letters, digits and _")
    language_model: str = Field(
        description="language model: builtin/reference, a folder in transformers' format (relative paths start from the experiment file's "
        "folder), a name on the hub, or transformer_lens:NAME"
    )
    revision: str = Field("main", description="branch, tag or commit of a model on the hub")
    language_model_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the language model's forward pass"
    )
    weights: Literal["trained", "random"] = Field("trained", description="weights of the language model; random: an untrained control")
    corpus: Corpus = Field(BUILTIN_CORPUS, description="texts: builtin/installed_packages, {name: DATASET} on the hub, or {files: PATTERN}")
    hook: str = Field("resid_post", description="resid_pre, resid_mid, resid_post, mlp_out, attn_out, or a module path with {layer}")
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Distinct] = Field(min_length=1, description="layers of the language model, from 0")
    context_length: PositiveInt = Field(description="length of a window, in tokens")
    packing: Literal["concatenate", "document"] = Field(
        "concatenate", description="windows from one stream of all documents (concatenate), or from each document alone (document)"
    )
    windows_per_document: PositiveInt | None = Field(
        None, description="largest number of windows per document, evenly spread; needs packing: document; default: all"
    )
    drop: Annotated[list[Literal["special", "padding", "first"]], Distinct] = Field(
        [], description="positions without activation rows: special tokens, padding, or the first position of a window"
    )
    prepend_bos: bool = Field(
        False, description="put the model's beginning-of-sequence token before every window, as its first position, which is never a row"
    )
    train_tokens: PositiveInt = Field(description="number of activation rows for training, before rows are dropped for their norm")
    test_tokens: PositiveInt = Field(description="number of activation rows for evaluation, before rows are dropped for their norm")
    max_norm: Annotated[float, Field(ge=2, allow_inf_nan=False)] | None = Field(
        None,
        description="largest norm of a row, in multiples of the median norm of the first batch of training rows; "
        "rows above it (massive activations) are dropped; default: all rows stay",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="dtype of stored activations")

    @field_validator("language_model")
    @classmethod
    def _from_folder_of_file(cls, name: str, info: ValidationInfo) -> str:
        """Return a folder as an absolute path: one written as a path, or one in the folder of the experiment file."""
        file = (info.context or {}).get(FILE)
        kind, colon, path = name.rpartition(":") if name.startswith(_TRANSFORMER_LENS) else ("", "", name)
        if not file or path.startswith(("~", "builtin/")) or Path(path).is_absolute():
            return name
        folder = Path(os.path.normpath(Path(file).parent / path))
        return f"{kind}{colon}{folder}" if path.startswith(".") or folder.is_dir() else name

    @field_validator("windows_per_document")
    @classmethod
    def _inside_documents(cls, windows: int | None, info: ValidationInfo) -> int | None:
        if windows is not None and info.data.get("packing", "document") != "document":
            raise ValueError("windows_per_document needs packing: document")
        return windows
