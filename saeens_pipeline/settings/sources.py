"""Settings of an ActivationSource: a language model, a corpus, and the hook whose activations are read; or synthetic activations."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, ValidationInfo, field_validator, model_validator

from saeens_pipeline.settings.corpora import BUILTIN_CORPUS, Corpus, is_hub_name, is_on_hub
from saeens_pipeline.settings.from_file import CHANGES, FILE, Distinct, FromFile, Section, wrong_field
from saeens_pipeline.settings.messages import shown
from saeens_pipeline.storage.names import validate_name

SYNTHETIC = "builtin/synthetic"
FOLLOW = "follow"
_TRANSFORMER_LENS = "transformer_lens:"
_OF_TEXT = {
    "revision",
    "revisions",
    "language_model_dtype",
    "corpus",
    "hook",
    "packing",
    "windows_per_document",
    "drop",
    "prepend_bos",
    "keep_activations",
}

Name = Annotated[str, AfterValidator(validate_name)]


class SyntheticSettings(Section):
    """`synthetic`: activations with known features, as `saeens_models.synthetic.SyntheticActivations` computes them."""

    n_features: PositiveInt = Field(description="number of true features")
    d_in: PositiveInt = Field(description="dimensions of the activations")
    features_per_row: float = Field(gt=0, description="mean number of true features that fire in a row, at most half of them")
    frequency_exponent: float = Field(1.0, ge=0, description="firing rates fall as rank to minus this power (Zipf); 0: all are equal")
    group_size: PositiveInt = Field(1, description="features of a group, which tend to fire together")
    correlation: float = Field(
        0.0, ge=0, lt=1, description="correlation inside a group of the normal variables whose thresholds decide which features fire"
    )
    children_per_parent: int = Field(
        0, ge=0, description="children of each parent feature, which fire only in rows in which it fires; parents are the most frequent"
    )
    noise: float = Field(0.0, ge=0, description="root mean squared norm of the noise, in units of the mean activation of a feature")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of features, groups, codes and noise")

    @model_validator(mode="after")
    def _possible(self) -> SyntheticSettings:
        from saeens_models.synthetic import SyntheticActivations  # it loads torch, which importing this module does not

        SyntheticActivations(**self.model_dump())  # raises ValueError
        return self


class EachModel(FromFile):
    """`language_model` of a source that follows a set of local models. Each is a source of its own."""

    each: str = Field(
        min_length=1,
        description="pattern with * of folders in transformers' format, or of .gguf files, such as checkpoints/step-*; relative paths "
        "start from the experiment file's folder",
    )

    @field_validator("each")
    @classmethod
    def _one_folder_deep(cls, each: str) -> str:
        if not each.isprintable():
            raise ValueError("a path has no control characters")
        if "**" in each:
            raise ValueError("** is not possible here: write a * for each folder, such as runs/*/step-*")
        return each

    def __str__(self) -> str:
        return os.path.normpath(self.folder / os.path.expanduser(self.each))  # noqa: PTH111  # keeps a name such as ~x that is no user


def _kind_of_model(given: object) -> str:
    return "set" if isinstance(given, dict | EachModel) else "single"


def _kind_of_revisions(given: object) -> str:
    return "list" if isinstance(given, list) else "word"


_Models = Annotated[Annotated[str, Tag("single")] | Annotated[EachModel, Tag("set")], Discriminator(_kind_of_model)]
_Revisions = Annotated[
    Annotated[list[Annotated[str, Field(min_length=1)]], Tag("list")] | Annotated[Literal["follow"], Tag("word")],
    Discriminator(_kind_of_revisions),
]


class SourceSettings(FromFile):
    """Fields of an ActivationSource: activations of a language model on a corpus."""

    name: Name = Field(description="name of the source: lower-case letters, digits and _")
    language_model: _Models = Field(
        description="language model: builtin/reference, builtin/smollm2 (after `make smollm2`), a folder in transformers' format or a "
        ".gguf file (relative paths start from the experiment file's folder), a name on the hub, or transformer_lens:NAME; "
        "builtin/synthetic: none, but activations with known features; {each: PATTERN}: a source for each local model of this pattern"
    )
    synthetic: SyntheticSettings | None = Field(
        None, description="activations with known features; needs language_model: builtin/synthetic, and leaves out all fields of texts"
    )
    revision: str = Field("main", description="branch, tag or commit of a model on the hub")
    revisions: _Revisions | None = Field(
        None,
        description="revisions of a model on the hub, each a source of its own: a list, or follow: all branches and tags, also later ones",
    )
    language_model_dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="dtype of the language model's forward pass"
    )
    weights: Literal["trained", "random"] = Field(
        "trained",
        description="weights of the language model; random: an untrained control; of synthetic activations: without sparse features",
    )
    corpus: Corpus = Field(
        BUILTIN_CORPUS,
        description="texts: builtin/installed_packages (code), builtin/prose, {name: DATASET} on the hub, {files: PATTERN}, or a list of "
        "these with weights: [{corpus: builtin/prose, weight: 3}, {corpus: data/my.jsonl, weight: 1}]",
    )
    hook: str = Field("resid_post", description="resid_pre, resid_mid, resid_post, mlp_out, attn_out, or a module path with {layer}")
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Distinct] = Field(min_length=1, description="layers of the language model, from 0")
    context_length: PositiveInt = Field(description="length of a window, in tokens; of synthetic activations: rows of a document")
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
        description="largest norm of a row, in multiples of the median norm of the first training rows; "
        "rows above it (massive activations) are dropped; default: all rows stay",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="dtype of stored activations")
    keep_activations: Literal["all", "test"] = Field(
        "all", description="activations whose bytes stay on disk; test: training rows are computed again whenever they are read"
    )

    @field_validator("language_model")
    @classmethod
    def _from_folder_of_file(cls, name: str | EachModel, info: ValidationInfo) -> str | EachModel:
        """Return a folder or a GGUF file as an absolute path: one written as a path, or a folder in that of the experiment file."""
        if isinstance(name, EachModel):
            return name
        file = (info.context or {}).get(FILE)
        kind, colon, path = name.rpartition(":") if name.startswith(_TRANSFORMER_LENS) else ("", "", name)
        if not file or path.startswith(("~", "builtin/")) or Path(path).is_absolute():
            return name
        is_gguf = not kind and path.lower().endswith(".gguf")
        folder = Path(os.path.normpath(Path(file).parent / path))
        is_folder = os.path.isdir(folder)  # noqa: PTH112  # pathlib raises an error for a long name
        return f"{kind}{colon}{folder}" if path.startswith(".") or is_gguf or is_folder else name

    @field_validator("revisions")
    @classmethod
    def _some_revision(cls, revisions: list[str] | str | None) -> list[str] | str | None:
        if revisions == []:
            raise ValueError(f"expected a list of at least one revision, or {FOLLOW}")
        if isinstance(revisions, list) and len(set(revisions)) < len(revisions):
            raise ValueError(f"{shown(revisions)} has duplicates")
        return revisions

    @field_validator("windows_per_document")
    @classmethod
    def _inside_documents(cls, windows: int | None, info: ValidationInfo) -> int | None:
        if windows is not None and info.data.get("packing", "document") != "document":
            raise ValueError("windows_per_document needs packing: document")
        return windows

    @model_validator(mode="after")
    def _synthetic_or_of_text(self) -> SourceSettings:
        if (self.language_model == SYNTHETIC) != (self.synthetic is not None):
            raise ValueError(f"language_model: {SYNTHETIC} and the section synthetic need each other: give both, or neither")
        if self.synthetic:
            if unused := sorted(_OF_TEXT & self.model_fields_set):
                raise ValueError(f"{', '.join(unused)}: synthetic activations have no text and no language model: leave this out")
            if self.layers != [0]:
                raise ValueError(f"layers: {self.layers}, and synthetic activations have one layer: write layers: [0]")
        return self

    @model_validator(mode="after")
    def _revisions_of_a_hub_model(self) -> SourceSettings:
        if isinstance(self.language_model, EachModel) and "revision" in self.model_fields_set:
            raise wrong_field(["revision"], "only models on the hub have revisions, and each: finds local ones: leave this out")
        if self.revisions is None:
            return self
        if "revision" in self.model_fields_set:
            raise wrong_field(["revisions"], "revision is given, too: leave out one of the two")
        name = self.language_model
        if not isinstance(name, str) or not is_hub_name(name) or name.startswith("builtin/") or name.lower().endswith(".gguf"):
            raise wrong_field(["revisions"], f"only models on the hub have revisions, and {name} is none: leave this out")
        return self

    @property
    def follows(self) -> bool:
        """Return True if this source stands for a set of language models, each of which is a source of its own."""
        return self.revisions is not None or isinstance(self.language_model, EachModel)

    @property
    def needs_hub(self) -> bool:
        """Return whether the language model or a text of the corpus is on the hub."""
        name = str(self.language_model)
        is_local = name.startswith("builtin/") or name.lower().endswith(".gguf")
        return name.startswith(_TRANSFORMER_LENS) or (is_hub_name(name) and not is_local) or is_on_hub(self.corpus)

    def of_model(self, suffix: str, **model: str) -> SourceSettings:
        """Return the source of one language model of the set, NAME__SUFFIX, with its `language_model` or `revision`.

        Raises ValidationError for a name that is not possible.
        """
        given = self.model_dump(exclude_unset=True, exclude={"revisions"})
        return SourceSettings.model_validate(
            given | model | {"name": f"{self.name}__{suffix}"}, context={FILE: self.file, CHANGES: self.changes}
        )
