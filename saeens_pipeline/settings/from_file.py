"""Settings that know the experiment file that they were read from: relative paths start from its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, PrivateAttr, ValidationInfo, model_validator

FILE = "file"
"""Key of pydantic's validation context: the path of the experiment file."""


class FromFile(BaseModel):
    """Base of settings that hold paths. Without a validation context paths start from the current folder."""

    _file: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _keep_file(self, info: ValidationInfo) -> Self:
        if info.context and info.context.get(FILE):
            self._file = Path(info.context[FILE])
        return self

    @property
    def file(self) -> Path | None:
        """The experiment file; None for settings that were not read from a file."""
        return self._file

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._file.parent if self._file else Path.cwd()

    def absolute(self, path: str) -> str:
        """Return a path or a pattern of paths from the root, `~` expanded."""
        return str(self.folder / Path(path).expanduser())
