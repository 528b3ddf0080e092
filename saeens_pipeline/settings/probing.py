"""`concept_detection` and `spurious_correlation`: which labelled texts an experiment's dictionaries are probed on."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from saeens_pipeline.settings.from_file import FromFile
from saeens_pipeline.settings.labelled_data_sets import (
    EMBEDDED_CONCEPTS,
    EMBEDDED_CORRELATIONS,
    HUB_CONCEPTS,
    HUB_CORRELATIONS,
    TextCount,
)
from saeens_pipeline.settings.labels import Label, Labels

PROBE_SEED = 42  # as SAEBench: drawing of texts, choice of negatives, initial weights of probes


class _DataSet(FromFile):
    """The fields that both tables' data sets have. Relative paths start from the experiment file's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(min_length=1, description="a data set that is known, or what local files are to be called")
    revision: str = Field(default="main", description="branch, tag or commit on the hub")
    path: str | None = Field(default=None, description="a local copy of the hub's data set, as the package datasets loads it")
    train: str | None = Field(default=None, description="local files, .jsonl, .parquet or .csv; * stands for part of the last name")
    test: str | None = Field(
        default=None, description="local files of the test split; left out: test texts come out of train, none is in both"
    )
    text_field: str = Field(default="text", description="column of the texts")
    label_field: str = Field(default="label", description="column of the labels")

    @property
    def local_files(self) -> dict[str, str]:
        """Absolute patterns of the local files, by split; none of a data set that lies elsewhere."""
        patterns = {"train": self.train, "test": self.test}
        return {split: self.absolute(pattern) for split, pattern in patterns.items() if pattern}

    @property
    def local_copy(self) -> str | None:
        """`path`, absolute."""
        return self.absolute(self.path) if self.path else None

    def _check_known(self, embedded_names: tuple[str, ...], hub_names: tuple[str, ...]) -> None:
        """Raise ValueError for a set that is not known and has no files, and for fields that its kind does not have."""
        if self.name in embedded_names:
            self._check_unused("is read from the installed packages", {"labels"})
        elif self.name in hub_names:
            self._check_unused("is a known data set of the hub; call files of yours something else", {"labels", "revision", "path"})
        elif self.train is None:
            known = ", ".join((*embedded_names, *hub_names))
            raise ValueError(f"{self.name!r} is not known; known are {known}; for local files give train, and maybe test")
        else:
            self._check_unused("is read from files of yours", set(type(self).model_fields) - {"revision", "path"})

    def _check_unused(self, what: str, allowed: set[str]) -> None:
        fields = type(self).model_fields.items()
        unused = [name for name, field in fields if name not in {"name", *allowed} and getattr(self, name) != field.default]
        if unused:
            raise ValueError(f"{self.name!r} {what}: leave {', '.join(unused)} out")


class ConceptDataSet(_DataSet):
    """An entry of `concept_detection.datasets`: a name, or a mapping with these fields."""

    labels: Labels = Field(default=[], description="labels that are probed; left out: all")

    @model_validator(mode="after")
    def _known(self) -> Self:
        self._check_known(EMBEDDED_CONCEPTS, HUB_CONCEPTS)
        return self

    @field_validator("labels")
    @classmethod
    def _two_at_least(cls, labels: list[str]) -> list[str]:
        if len(labels) == 1 or len(set(labels)) < len(labels):
            raise ValueError("a probe needs texts of at least two labels, each named once")
        return labels


class CorrelationDataSet(_DataSet):
    """An entry of `spurious_correlation.datasets`: a name, or a mapping with these fields."""

    spurious_field: str = Field(default="spurious", description="column of the spurious attribute")
    target: tuple[Label, Label] | None = Field(default=None, description="the two labels that are told apart, of local files")
    spurious: tuple[Label, Label] | None = Field(
        default=None, description="the values of the spurious attribute that go with them, in order"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        self._check_known(EMBEDDED_CORRELATIONS, HUB_CORRELATIONS)
        if self.train and (self.target is None or self.spurious is None):
            raise ValueError("of local files give target and spurious, two values each: the first of both go together, and the second")
        for values in (self.target, self.spurious):
            if values and values[0] == values[1]:
                raise ValueError(f"an attribute has two values that differ, not {values[0]!r} twice")
        return self


class _TaskSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    train_texts: int | None = Field(
        default=None,
        ge=8,
        multiple_of=4,
        description="that a probe is trained on; left out: 4000, of embedded tasks what there is enough of",
    )
    test_texts: int | None = Field(default=None, ge=8, multiple_of=4, description="that it is tested on; left out: 1000, or the same")
    context_length: int = Field(default=128, ge=2, description="tokens of a text, from its beginning")

    @field_validator("datasets", mode="before", check_fields=False)
    @classmethod
    def _named(cls, datasets: Any) -> Any:
        """An entry may be a name alone."""
        if not isinstance(datasets, list):
            return datasets
        return [{"name": entry} if isinstance(entry, str) else entry for entry in datasets]

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.train_texts is None) != (self.test_texts is None):
            raise ValueError("give both of train_texts and test_texts, or none")
        return self

    @property
    def count(self) -> TextCount | None:
        return None if self.train_texts is None or self.test_texts is None else TextCount(self.train_texts, self.test_texts)


class ConceptDetectionSettings(_TaskSettings):
    """`concept_detection`."""

    datasets: list[ConceptDataSet] = Field(
        min_length=1, default=[ConceptDataSet(name=name) for name in EMBEDDED_CONCEPTS], description="left out: the embedded tasks"
    )


class SpuriousCorrelationSettings(_TaskSettings):
    """`spurious_correlation`."""

    datasets: list[CorrelationDataSet] = Field(
        min_length=1, default=[CorrelationDataSet(name=name) for name in EMBEDDED_CORRELATIONS], description="left out: the embedded task"
    )
