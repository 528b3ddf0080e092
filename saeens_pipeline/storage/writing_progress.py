"""Record of the rows of a store that have reached the disk, so that a killed write can be resumed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from saeens_pipeline.storage.disk import flush, write_atomically

_FILE = ".progress.json"


class WritingProgress:
    """A record in a store's folder: updated after every shard, removed when the store is complete.

    A thread writes it after the bytes of the shard have reached the disk. Writing rows waits for this thread only if the disk is a full
    shard behind. `kind` describes the store; only a record of the same kind is resumed.
    """

    def __init__(self, folder: Path, kind: Mapping[str, Any]) -> None:
        self._file, self._kind = folder / _FILE, dict(kind)
        self._done: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writing-progress")
        self._last: Future[None] | None = None

    def read(self) -> dict[str, Any]:
        """Return the recorded state of each split; empty if there is no readable record of this kind."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._file.read_text())
            if record["kind"] == json.loads(json.dumps(self._kind)):
                self._done = dict(record["done"])
        return self._done

    def record(self, split: str, state: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Record `state` (JSON values) of a split once `files` have reached the disk."""
        self._done = {**self._done, split: state}
        text, files = json.dumps({"kind": self._kind, "done": self._done}), list(files)
        if self._last:
            self._last.result()
        self._last = self._thread.submit(self._write, text, files)

    def stop(self) -> None:
        """Wait until the record of the last shard is written. The record stays."""
        self._thread.shutdown()

    def remove(self) -> None:
        """Remove the record of a complete store. Raises the error of the last write of the record, if there was one."""
        self.stop()
        if self._last:
            self._last.result()
        self._file.unlink(missing_ok=True)

    def _write(self, text: str, files: Iterable[Path]) -> None:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # Zarr does not store a chunk that holds nothing but the fill value
                flush(file)
        write_atomically(self._file, text, aside=f"{_FILE}.partial")


def remove_chunks_from(array: Path, number: int) -> None:
    """Remove the chunks (or shards) of a Zarr v3 array from `number` on, and incompletely written ones."""
    for entry in (array / "c").iterdir() if (array / "c").is_dir() else ():
        if not (entry.name.isdigit() and int(entry.name) < number):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
