"""Writing of activation stores, batch by batch; `storage.activations` documents their layout."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.activations import ActivationStatistics, StoredDtype, StreamingStatistics
from saeens_pipeline.storage.disk import flush, require_free_disk, write_atomically

_BYTES: Mapping[StoredDtype, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAX_CHUNK_BYTES = 2**21
_CHUNKS_PER_SHARD = 16
_PROGRESS_FILE = ".progress.json"


class ActivationWriter:
    """Writes a store, batch by batch; use it as a context manager, then read `statistics`.

    `rows` is the number of rows of each split; more or fewer are an error. `name` names the rows in messages. `with_origin`: also store
    document and position of every row. `max_norm`: drop rows whose norm is more than this multiple of the median norm of the first appended
    rows, which have to be training rows. `without_bytes`: splits whose rows are not stored, only their origin and statistics.
    Raises SaeensError before writing if the disk has too little space.
    Memory: one shard of each split (up to 32 MiB). The store can be opened once the writer is closed.
    `resume`: keep a record of the complete shards in `path`. If such a record of the same kind exists, the writer resumes after those
    shards: `resumed_rows` is the number of appended rows that they hold or dropped, by split, and the caller appends the rows after them.
    """

    def __init__(
        self,
        path: Path,
        d_in: int,
        dtype: StoredDtype,
        rows: Mapping[str, int],
        *,
        name: str,
        with_origin: bool = True,
        max_norm: float | None = None,
        without_bytes: Collection[str] = (),
        chunk_rows: int | None = None,
        resume: bool = False,
    ) -> None:
        self.name, self.without_bytes = name, frozenset(without_bytes)
        self.dtype: StoredDtype = dtype
        self.chunk_rows = chunk_rows or default_chunk_rows(d_in, dtype)
        kind = {"d_in": d_in, "dtype": dtype, "rows": dict(rows), "with_origin": with_origin, "chunk_rows": self.chunk_rows}
        kind |= {"max_norm": max_norm, "without_bytes": sorted(self.without_bytes)}
        self._max_norm = max_norm
        self.progress = _Progress(path, kind) if resume else None
        done = self.progress.done if self.progress else {}
        self.resumed_rows = {split: done[split]["appended"] if split in done else 0 for split in rows}
        self.norm_limit: float | None = next((state["norm_limit"] for state in done.values()), None)
        left = {split: n - self.resumed_rows[split] for split, n in rows.items()}
        require_free_disk(path, stored_bytes(d_in, dtype, left, with_origin, without_bytes=self.without_bytes), name)
        if not done:
            zarr.open_group(path, mode="w", zarr_format=3, attributes={"dtype": dtype})
        self._path = path
        self._splits = {split: _SplitWriter(self, path / split, n, d_in, with_origin) for split, n in rows.items()}
        self.statistics: dict[str, ActivationStatistics] = {}

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif self.progress:
            self.progress.stop()

    def append(self, split: str, rows: torch.Tensor, document: torch.Tensor | None = None, position: torch.Tensor | None = None) -> None:
        """Add rows `[n, d_in]` of any float dtype and device; with `with_origin`, also their `document` and `position` `[n]`.

        Raises SaeensError for values that are not finite or too large for the stored dtype.
        """
        kept = self._within_limit(rows)
        columns = {"activations": rows, "document": document, "position": position}
        stored = {name: values[kept.to(values.device)] for name, values in columns.items() if values is not None}
        stored["activations"] = to_stored_dtype(stored["activations"], self.dtype, self.name)
        self._splits[split].append({name: values.cpu() for name, values in stored.items()}, kept.cpu().numpy())

    def record_groups(self, split: str, groups: np.ndarray) -> None:
        """Store the groups of a split without bytes, as `storage.activations` documents."""
        zarr.open_group(self._path / split, mode="a").create_array("groups", data=groups, overwrite=True)

    def _within_limit(self, rows: torch.Tensor) -> torch.Tensor:
        """Return whether each row is stored, bool `[n]`. Rows with values that are not finite are, so that they raise an error."""
        if self._max_norm is None or not len(rows):
            return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        norms = torch.linalg.vector_norm(rows.float(), dim=1)
        if self.norm_limit is None:
            self.norm_limit = self._max_norm * float(norms.median())
            if not self.norm_limit:
                raise SaeensError(f"{self.name}: most rows are zero, so that max_norm would drop all others: leave it out")
        return ~(norms > self.norm_limit) | ~norms.isfinite()

    def close(self) -> None:
        """Finish the store: write the buffered rows and the statistics. Raises SaeensError if a split has fewer rows than declared."""
        self.statistics = {split: writer.finish(f"{self.name}, {split} split") for split, writer in self._splits.items()}
        if self.progress:
            self.progress.remove()


class _SplitWriter:
    """Buffer of the rows of one split, which writes each shard once."""

    def __init__(self, writer: ActivationWriter, folder: Path, n_rows: int, d_in: int, with_origin: bool) -> None:
        self._writer, self._folder, self._n_rows = writer, folder, n_rows
        self._chunk_rows, self._progress = writer.chunk_rows, writer.progress
        self._shard_rows = self._chunk_rows * min(_CHUNKS_PER_SHARD, max(1, -(-n_rows // self._chunk_rows)))
        self._group = group = zarr.open_group(folder, mode="a", zarr_format=3)
        plain = {"chunks": (self._chunk_rows, d_in), "shards": (self._shard_rows, d_in), "compressors": None, "filters": None}
        plain["dtype"] = "uint16" if writer.dtype == "bfloat16" else writer.dtype
        columns: dict[str, Any] = {"activations": (getattr(torch, writer.dtype), (d_in,), plain)}
        for name in ("document", "position") if with_origin else ():
            columns[name] = torch.int32, (), {"chunks": (self._shard_rows,), "dtype": "int32"}
        self._arrays: dict[str, Any] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        for name, (dtype, width, layout) in columns.items():
            if name != "activations" or folder.name not in writer.without_bytes:
                there = name in group
                self._arrays[name] = group[name] if there else group.create_array(name, shape=(n_rows, *width), **layout)
            self._buffers[name] = torch.empty(self._shard_rows, *width, dtype=dtype)
        self._statistics = StreamingStatistics(d_in)
        self._appended, self._dropped = writer.resumed_rows[folder.name], np.empty(0, np.int64)
        if self._progress and folder.name in self._progress.done:
            self._statistics.restore(self._progress.done[folder.name])
            self._dropped = np.array(self._progress.done[folder.name]["dropped"], np.int64)
        self._written, self._filled = self._statistics.rows, 0
        for name in self._arrays if self._progress else ():
            _remove_chunks_from(folder / name, self._written // self._shard_rows)

    def append(self, columns: Mapping[str, torch.Tensor], kept: np.ndarray) -> None:
        """Add columns of the kept rows; `kept` is bool, with a value for each appended row."""
        if columns.keys() != self._buffers.keys():
            raise ValueError(f"got columns {', '.join(columns)}; this store has {', '.join(self._buffers)}")
        places = self._appended + np.flatnonzero(kept)
        self._dropped = np.concatenate([self._dropped, self._appended + np.flatnonzero(~kept)])
        self._appended += len(kept)
        start = 0
        while start < len(places):
            taken = min(len(places) - start, self._shard_rows - self._filled)
            for name, values in columns.items():
                self._buffers[name][self._filled : self._filled + taken] = values[start : start + taken]
            start, self._filled = start + taken, self._filled + taken
            if self._filled == self._shard_rows:
                self._flush()
                if self._progress:
                    self._record(self._progress, appended=int(places[start - 1]) + 1)

    def _record(self, progress: _Progress, appended: int) -> None:
        last = self._written // self._shard_rows - 1
        shards = [self._folder / name / "c" / f"{last}{'/0' if name == 'activations' else ''}" for name in self._arrays]
        dropped = self._dropped[self._dropped < appended].tolist()
        state = {"appended": appended, "dropped": dropped, "norm_limit": self._writer.norm_limit}
        progress.record(self._folder.name, self._statistics.state() | state, shards)

    def finish(self, name: str) -> ActivationStatistics:
        self._flush()
        if self._appended != self._n_rows:
            raise SaeensError(f"{name}: expected {self._n_rows:,} rows, got {self._appended:,}")
        if len(self._dropped):
            for array in self._arrays.values():
                array.resize((self._written, *array.shape[1:]))
            self._group.create_array("dropped", data=self._dropped, overwrite=True)
        statistics = self._statistics.compute()
        if "document" in self._arrays and statistics.top_rows:
            rows = [row for row, *_ in statistics.top_rows]
            origin = zip(*(self._arrays[name].oindex[sorted(rows)].tolist() for name in ("document", "position")), strict=True)
            places = dict(zip(sorted(rows), origin, strict=True))
            statistics = replace(statistics, top_rows=[(row, norm, *places[row]) for row, norm in statistics.top_rows])
        statistics = replace(statistics, norm_limit=self._writer.norm_limit, dropped=len(self._dropped))
        self._group.attrs["statistics"] = statistics.to_json()
        return statistics

    def _flush(self) -> None:
        """Write the buffered rows. Statistics are updated chunk by chunk, so that they do not depend on the sizes of appended batches."""
        rows = self._buffers["activations"][: self._filled]
        for chunk in rows.split(self._chunk_rows) if len(rows) else ():
            self._statistics.update(chunk)
        end = self._written + self._filled
        if end <= self._n_rows:  # `finish` raises the error for too many rows
            for name, array in self._arrays.items():
                values = self._buffers[name][: self._filled]
                array[self._written : end] = (values.view(torch.uint16) if values.dtype == torch.bfloat16 else values).numpy()
        self._written, self._filled = end, 0


class _Progress:
    """A record in a store's folder of the rows that have reached the disk: updated after every shard, removed when the store is complete.

    A thread writes it after the bytes of the shard have reached the disk. Writing rows waits for this thread only if the disk is a full
    shard behind. `kind` describes the store; only a record of the same kind is resumed.
    """

    def __init__(self, folder: Path, kind: Mapping[str, Any]) -> None:
        self._file, self._kind = folder / _PROGRESS_FILE, dict(kind)
        self.done: dict[str, Any] = {}  # the recorded state of each split
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="writing-progress")
        self._last: Future[None] | None = None
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads(self._file.read_text())
            if record["kind"] == json.loads(json.dumps(self._kind)):
                self.done = dict(record["done"])

    def record(self, split: str, state: Mapping[str, Any], files: Iterable[Path]) -> None:
        """Record `state` (JSON values) of a split once `files` have reached the disk."""
        self.done = {**self.done, split: state}
        if self._last:
            self._last.result()
        self._last = self._thread.submit(self._write, json.dumps({"kind": self._kind, "done": self.done}), list(files))

    def stop(self) -> None:
        """Stop the writing thread, after the record of the last shard is written. The record stays on disk."""
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
        write_atomically(self._file, text, aside=f"{_PROGRESS_FILE}.partial")


def _remove_chunks_from(array: Path, number: int) -> None:
    """Remove the chunks (or shards) of a Zarr v3 array from `number` on, and incompletely written ones."""
    for entry in (array / "c").iterdir() if (array / "c").is_dir() else ():
        if not (entry.name.isdigit() and int(entry.name) < number):
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def to_stored_dtype(rows: torch.Tensor, dtype: StoredDtype, name: str) -> torch.Tensor:
    """Round rows to the dtype of a store. Raises SaeensError for NaN, infinity, and values outside the range of the dtype."""
    stored = rows.to(getattr(torch, dtype))
    if bool(torch.isfinite(stored).all()):
        return stored
    if not bool(torch.isfinite(rows).all()):
        raise SaeensError(f"{name} has values that are NaN or infinite: an overflow, or an error where they are computed")
    largest, limit = float(rows.abs().max()), torch.finfo(getattr(torch, dtype)).max
    raise SaeensError(f"{name} has values up to {largest:,.0f}, and {dtype} ends at {limit:,.0f}: set dtype: bfloat16, or float32")


def default_chunk_rows(d_in: int, dtype: StoredDtype) -> int:
    """Return the rows of a chunk: the largest power of two that gives at most 2 MiB."""
    return 1 << max(0, (_MAX_CHUNK_BYTES // (d_in * _BYTES[dtype])).bit_length() - 1)


def stored_bytes(
    d_in: int, dtype: StoredDtype, rows: Mapping[str, int], with_origin: bool = True, *, without_bytes: Collection[str] = ()
) -> int:
    """Return an upper limit of the bytes of a store on disk, without a few kB of metadata and before compression of the two columns."""
    stored = sum(n for split, n in rows.items() if split not in without_bytes)
    return stored * d_in * _BYTES[dtype] + sum(rows.values()) * (8 if with_origin else 0)
