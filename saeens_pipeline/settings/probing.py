"""Settings of `concept_detection` and `spurious_correlation`: the labelled texts for probes of dictionaries."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from saeens_pipeline.settings.from_file import FromFile, Section
from saeens_pipeline.settings.labelled_data_sets import (
    EMBEDDED_CONCEPTS,
    EMBEDDED_CORRELATIONS,
    HUB_CONCEPTS,
    HUB_CORRELATIONS,
    SAE_PROBES,
    SAE_PROBES_CORRELATIONS,
    Label,
    Labels,
    TextCount,
)

PROBE_SEED = 42  # as in SAEBench: drawing of texts, choice of negatives, initial weights of probes


class _DataSet(FromFile):
    """Common fields of the data sets of both tables. Relative paths start from the folder of the experiment file."""

    embedded_names: ClassVar[tuple[str, ...]]
    packaged_names: ClassVar[tuple[str, ...]]
    hub_names: ClassVar[tuple[str, ...]]

    name: str = Field(min_length=1, description="name of a known data set, or a new name for local files")
    revision: str = Field(default="main", description="branch, tag or commit on the hub")
    path: str | None = Field(default=None, description="folder with a local copy of the hub's data set, readable by the package datasets")
    train: str | None = Field(default=None, description="local training files, .jsonl, .csv or .parquet; a path or a pattern with * and **")
    test: str | None = Field(default=None, description="local test files; default: test texts are drawn from train, without overlap")
    text_field: str = Field(default="text", description="column of the texts")
    label_field: str = Field(default="label", description="column of the labels")

    @property
    def local_files(self) -> dict[Literal["train", "test"], str]:
        """Patterns of the local files, relative to `folder`, by split; empty for other data sets."""
        files: dict[Literal["train", "test"], str] = {}
        if self.train:
            files["train"] = self.train
        if self.test:
            files["test"] = self.test
        return files

    @property
    def is_packaged(self) -> bool:
        """Return True if the texts are in the package sae-probes."""
        return self.name in self.packaged_names

    @property
    def local_copy(self) -> str | None:
        """`path` as an absolute path."""
        return self.absolute(self.path) if self.path else None

    @model_validator(mode="after")
    def _known(self) -> Self:
        """Refuse an unknown data set without files, and fields that do not apply to this kind of data set."""
        fields = type(self).model_fields
        if self.name in self.embedded_names:
            what, allowed = "is read from the installed packages", {"labels"}
        elif self.name in self.hub_names:
            what, allowed = "is a known data set of the hub; choose another name for local files", {"labels", "revision", "path"}
        elif self.is_packaged:
            what, allowed = "is read from the package sae-probes", {"labels"}
        elif self.train is None:
            known = ", ".join((*self.embedded_names, *self.packaged_names, *self.hub_names))
            raise ValueError(f"{self.name!r} is not known; known are {known}; for local files give train, and optionally test")
        else:
            what, allowed = "is read from local files", fields.keys() - {"revision", "path"}
        unused = [name for name in fields if name not in {"name", *allowed} and getattr(self, name) != fields[name].default]
        if unused:
            raise ValueError(f"{self.name!r} {what}: leave {', '.join(unused)} out")
        return self


class ConceptDataSet(_DataSet):
    """An entry of `concept_detection.datasets`: a name, or a mapping with these fields."""

    embedded_names, packaged_names, hub_names = EMBEDDED_CONCEPTS, (f"{SAE_PROBES}NAME",), HUB_CONCEPTS
    labels: Labels = Field(default=[], description="labels with a probe each; default: all labels")

    @property
    def is_packaged(self) -> bool:
        return self.name.startswith(SAE_PROBES) and self.train is None

    @field_validator("labels")
    @classmethod
    def _two_at_least(cls, labels: list[str]) -> list[str]:
        if len(labels) == 1 or len(set(labels)) < len(labels):
            raise ValueError("a probe needs texts of at least two different labels")
        return labels


class CorrelationDataSet(_DataSet):
    """An entry of `spurious_correlation.datasets`: a name, or a mapping with these fields."""

    embedded_names, packaged_names, hub_names = EMBEDDED_CORRELATIONS, tuple(SAE_PROBES_CORRELATIONS), HUB_CORRELATIONS
    spurious_field: str = Field(default="spurious", description="column of the spurious attribute")
    target: tuple[Label, Label] | None = Field(default=None, description="the two labels of the probe; for local files only")
    spurious: tuple[Label, Label] | None = Field(
        default=None, description="the two values of the spurious attribute that correlate with target, in the same order"
    )

    @model_validator(mode="after")
    def _attributes_have_two_values(self) -> Self:
        if self.train and (self.target is None or self.spurious is None):
            raise ValueError("for local files give target and spurious, two values each; values at the same place correlate")
        for values in (self.target, self.spurious):
            if values and values[0] == values[1]:
                raise ValueError(f"an attribute needs two different values, not {values[0]!r} twice")
        return self


class _TaskSettings(Section):
    train_texts: int | None = Field(
        default=None,
        ge=8,
        multiple_of=4,
        description="number of training texts of a probe; default: 4000, fewer for embedded tasks and sae_probes",
    )
    test_texts: int | None = Field(
        default=None,
        ge=8,
        multiple_of=4,
        description="number of test texts of a probe; default: 1000, fewer for embedded tasks and sae_probes",
    )
    context_length: int = Field(default=128, ge=2, description="number of tokens of a text, counted from its start")

    @field_validator("datasets", mode="before", check_fields=False)
    @classmethod
    def _named(cls, given: Any) -> Any:
        """Return entries as mappings; a name stands for a mapping with this name."""
        return [{"name": each} if isinstance(each, str) else each for each in given] if isinstance(given, list) else given

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.train_texts is None) != (self.test_texts is None):
            raise ValueError("give both train_texts and test_texts, or none of them")
        return self

    @property
    def count(self) -> TextCount | None:
        """`train_texts` and `test_texts`; None for the defaults of each data set."""
        return None if self.train_texts is None or self.test_texts is None else TextCount(self.train_texts, self.test_texts)


class ConceptDetectionSettings(_TaskSettings):
    """`concept_detection`: probes for the labels of texts."""

    datasets: Annotated[list[ConceptDataSet], Field(min_length=1)] = Field(
        default=[ConceptDataSet(name=name) for name in EMBEDDED_CONCEPTS], description="labelled data sets; default: the embedded tasks"
    )


class SpuriousCorrelationSettings(_TaskSettings):
    """`spurious_correlation`: removal of a spurious attribute from probes."""

    datasets: Annotated[list[CorrelationDataSet], Field(min_length=1)] = Field(
        default=[CorrelationDataSet(name=name) for name in EMBEDDED_CORRELATIONS],
        description="data sets with two attributes; default: the embedded task",
    )
