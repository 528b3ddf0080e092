"""Settings with paths: relative ones start from the folder of the experiment file."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, PrivateAttr, ValidationInfo, model_validator

FOLDER = "folder"
"""Key of pydantic's validation context: the folder that relative paths start from."""


class RelativePaths(BaseModel):
    """Base of settings that hold paths or settings with paths. Without a validation context paths start from the current folder."""

    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @model_validator(mode="after")
    def _keep_folder(self, info: ValidationInfo) -> Self:
        if info.context:
            self._folder = Path(info.context[FOLDER])
        return self

    @property
    def folder(self) -> Path:
        """The folder that relative paths start from."""
        return self._folder

    def absolute(self, path: str) -> str:
        """Return a path or a pattern of paths from the root, `~` expanded."""
        return str(self._folder / Path(path).expanduser())
