"""Zarr stores in local folders, held open: a file that is replaced or removed while it is read is an error, never other values."""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from zarr.storage import LocalStore

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.recipes import RECIPE_FILE, read_artefact

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


class HeldFolder(LocalStore):
    """A folder open for reading, by a descriptor of its own.

    Zarr gives the fill value for a chunk without a file. This is right only for files that were never written: the files of an artefact are
    those in its record, those of any other folder the ones that are there when it is opened. Raises SaeensError where others are missing,
    and once another folder has the name.
    """

    def __init__(self, root: Path, *, read_only: bool = True) -> None:
        super().__init__(root, read_only=read_only)
        self.descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        weakref.finalize(self, os.close, self.descriptor)
        if (root / RECIPE_FILE).exists():
            self.files = frozenset(read_artefact(root).files)
            if not self.files:
                raise SaeensError(f"{root} holds its record only, its bytes were dropped")
        else:
            self.files = frozenset(file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file())
        self._require_same()  # after the record was read, so that it is the one of the held folder

    async def get(self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None) -> Buffer | None:
        value = await super().get(key, prototype, byte_range)
        if value is None:
            self.require_unwritten(key)
        self._require_same()  # after the file was opened, so that the file is one of the held folder
        return value

    def _require_same(self) -> None:
        try:
            is_same = os.path.samestat(self.root.stat(), os.fstat(self.descriptor))
        except FileNotFoundError:
            is_same = False
        if not is_same:
            raise SaeensError(f"{self.root} was replaced while it was read: run again")

    def require_unwritten(self, name: str) -> None:
        """Raise SaeensError for a file that is missing although it was written."""
        if name in self.files:
            raise SaeensError(f"{self.root / name} is missing: it was removed or replaced. `saeens run` computes it again")
