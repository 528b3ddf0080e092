"""The builtin corpora of a data root: their texts are kept at their first use, so that an upgrade of a package changes nothing.

`corpora/installed_packages` and `corpora/prose` in the data root have `documents.parquet`, the texts in order, and `pin.json`: the versions
of the packages at the first use, the hash of the texts, which recipes hold, and their sizes. Without the folder, the next use keeps that
day's texts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.documents import Document, Split
from saeens_pipeline.language_models.installed_packages import InstalledPackages
from saeens_pipeline.storage.disk import write_atomically, writes_nothing

SPLITS: tuple[Split, ...] = ("train", "test")
FOLDER = "corpora"  # in the data root
_BATCH_ROWS = 500


@dataclass(frozen=True)
class PinnedPackages:
    """A builtin corpus of the packages as they were installed at the first use in a data root."""

    root: Path
    of: type[InstalledPackages] = InstalledPackages

    @property
    def identity(self) -> dict[str, object]:
        pin = self._pin()
        return self.of().identity | ({"packages": pin["packages"], "texts": pin["sha256"]} if pin else {})

    def require_readable(self) -> None:
        """Keep the texts if this is their first use. Raise SaeensError for kept texts that have been changed."""
        pin = self._pin()
        if not pin:
            if not writes_nothing():
                self._write()
        else:
            status = self._texts.stat()
            if _sha256(self._texts, status.st_size, status.st_mtime_ns) != pin["sha256"]:
                raise SaeensError(
                    f"{self._texts} has been changed since it was written: restore it, or delete {self._folder}, and the next use keeps "
                    "the texts of the packages as they are installed now"
                )

    def documents(self, split: Split) -> Iterator[Document]:
        self.require_readable()
        if not self._pin():  # the root cannot be written
            yield from self.of().documents(split)
            return
        from pyarrow import parquet

        with self._texts.open("rb") as stream, parquet.ParquetFile(stream) as file:
            for batch in file.iter_batches(_BATCH_ROWS):
                for row in batch.to_pylist():
                    if row["split"] == split:
                        yield Document(row["name"], row["text"], {self.of.label: row[self.of.label]})

    def summary(self) -> dict[str, Any]:
        """Return documents, bytes and bytes by label of each split; empty before the first use, and for texts of an earlier version."""
        return (self._pin() or {}).get("summary", {})

    @property
    def _folder(self) -> Path:
        return self.root / FOLDER / self.of.name.removeprefix("builtin/")

    @property
    def _texts(self) -> Path:
        return self._folder / "documents.parquet"

    def _pin(self) -> dict[str, Any] | None:
        """Return the content of pin.json; None without one, and for one of another version of the reader."""
        try:
            pin = json.loads((self._folder / "pin.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise SaeensError(f"{self._folder / 'pin.json'} cannot be read ({error}): restore it, or delete {self._folder}") from None
        return pin if pin.get("reader") == self.of().reader and self._texts.is_file() else None

    def _write(self) -> None:
        """Keep the texts of the installed packages, unless the root cannot be written."""
        import pyarrow as pa
        from pyarrow import parquet

        packages = self.of()
        rows = [
            {"split": split, "name": each.name, packages.label: each.labels[packages.label], "text": each.text}
            for split in SPLITS
            for each in packages.documents(split)
        ]
        aside = self._folder / f".documents.{os.getpid()}.parquet"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as stream:
                parquet.write_table(pa.Table.from_pylist(rows), stream, compression="zstd", row_group_size=_BATCH_ROWS)
                stream.flush()
                os.fsync(stream.fileno())
            status = aside.stat()
            pin = {
                "packages": packages.identity["packages"],
                "reader": packages.reader,
                "documents": len(rows),
                "summary": packages.summary(),
                "sha256": _sha256(aside, status.st_size, status.st_mtime_ns),
            }
            aside.replace(self._texts)
            write_atomically(self._folder / "pin.json", json.dumps(pin, indent=2) + "\n", f".pin.{os.getpid()}.json")
        except OSError:
            return


@lru_cache(maxsize=8)
def _sha256(file: Path, _size: int, _changed_at: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
