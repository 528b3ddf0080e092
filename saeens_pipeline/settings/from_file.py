"""Bases of the models of experiment files, with relative paths that start from the folder of the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, PrivateAttr, ValidationInfo, model_validator

from saeens_pipeline.settings.changes import Change
from saeens_pipeline.settings.messages import shown

FILE = "file"
"""Key of pydantic's validation context: the path of the experiment file."""
CHANGES = "changes"
"""Key of pydantic's validation context: fields whose values are not those of the file."""


def _distinct(values: Any) -> Any:
    if values and len(set(values)) < len(values):
        raise ValueError(f"{shown(values)} has duplicates")
    return values


Distinct = AfterValidator(_distinct)
"""Refuses a list, if there is one, in which a value is given twice."""


class Section(BaseModel):
    """Base of the mappings of an experiment file: unknown keys and numbers that are not finite are refused, and values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FromFile(Section):
    """Base of settings with paths. Without a validation context, relative paths start from the current folder."""

    _file: Path | None = PrivateAttr(default=None)
    _changes: Sequence[Change] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _keep_file(self, info: ValidationInfo) -> Self:
        if info.context and info.context.get(FILE):
            self._file = Path(info.context[FILE])
            self._changes = tuple(info.context.get(CHANGES, ()))
        return self

    @property
    def file(self) -> Path | None:
        """The experiment file; None for settings from other places."""
        return self._file

    @property
    def changes(self) -> Sequence[Change]:
        """Fields whose values are from the command line, not from the file."""
        return self._changes

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._file.parent if self._file else Path.cwd()

    def absolute(self, path: str) -> str:
        """Return a path or pattern as an absolute path, relative to the experiment file's folder and with `~` expanded."""
        return str(self.folder / Path(path).expanduser())
