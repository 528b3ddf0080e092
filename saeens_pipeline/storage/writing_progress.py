"""Which part of a store of rows is on the disk for good while it is being written, so that writing can go on after a kill."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from saeens_pipeline.storage.disk import flush

_FILE = ".progress.json"


class WritingProgress:
    """A record in a store's folder, renewed after every shard and gone when the store is whole.

    It is written by a thread of its own, after the shard's bytes have reached the disk: writing rows waits for it only where the disk is
    a whole shard behind. `kind`: what two stores have to share for one to go on from the other.
    """

    def __init__(self, folder: Path, kind: Mapping[str, Any]) -> None:
        self._file, self._kind = folder / _FILE, dict(kind)
        self._done: dict[str, Any] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writing-progress")
        self._last: Future[None] | None = None

    def read(self) -> dict[str, Any]:
        """What was recorded, by split; empty where there is no record, or one that cannot be read or is of another kind."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._file.read_text())
            if record["kind"] == json.loads(json.dumps(self._kind)):
                self._done = dict(record["done"])
        return self._done

    def record(self, split: str, state: Mapping[str, Any], files: Iterable[Path]) -> None:
        """That a split has come to `state` (JSON values), now that `files` are written."""
        self._done = {**self._done, split: state}
        text, files = json.dumps({"kind": self._kind, "done": self._done}), list(files)
        if self._last:
            self._last.result()
        self._last = self._thread.submit(self._write, text, files)

    def stop(self) -> None:
        """Wait for the record of the last shard, which stays."""
        self._thread.shutdown()

    def remove(self) -> None:
        """The store is whole. Raises what recording the last shard has raised."""
        self.stop()
        if self._last:
            self._last.result()
        self._file.unlink(missing_ok=True)

    def _write(self, text: str, files: Iterable[Path]) -> None:
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # Zarr stores no chunk that has the fill value everywhere
                flush(file)
        aside = self._file.with_name(f"{_FILE}.partial")
        aside.write_text(text)
        flush(aside)
        aside.replace(self._file)


def remove_chunks_from(array: Path, number: int) -> None:
    """Remove what lies in the folder of a Zarr v3 array from chunk (or shard) `number` on, and chunks that are not whole."""
    for entry in (array / "c").iterdir() if (array / "c").is_dir() else ():
        if not (entry.name.isdigit() and int(entry.name) < number):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
