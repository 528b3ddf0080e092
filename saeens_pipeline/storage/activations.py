"""The activation store: rows of activations or residuals on disk, written once and read many times.

A store is a Zarr v3 group. It has a group for each split, with

* `activations` `[n, d_in]`: uncompressed (activations hardly compress), in shards of 16 chunks of 1 to 2 MiB. The attribute `dtype` of
  the store is the dtype of the numbers; Zarr has no bfloat16, so its bits are stored as uint16.
* `document`, `position` `[n]` int32: the token of each row, as in `tokens.zarr`. A residual has neither: its rows correspond to
  those of its activations.
* the attribute `statistics` of the stored rows: rows, mean, variance, mean_norm.

A local store of this layout is read memory-mapped, any other layout through Zarr.

Readers read whole chunks, and stored results are computed chunk by chunk. So the same rows always enter the same matrix product and give
the same bits.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.mixing import mix_chunks
from saeens_pipeline.storage.shards import map_shards
from saeens_pipeline.storage.writing_progress import WritingProgress, remove_chunks_from

if TYPE_CHECKING:
    import torch
    import zarr

StoredDtype = Literal["float16", "bfloat16", "float32"]

_BYTES: Mapping[StoredDtype, int] = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAX_CHUNK_BYTES = 2**21
_CHUNKS_PER_SHARD = 16


@dataclass(frozen=True)
class ActivationStatistics:
    """Moments of n rows x: `mean` and (population) `variance` per dimension, `[d_in]` float64, and `mean_norm` = mean of ||x||_2."""

    rows: int
    mean: np.ndarray
    variance: np.ndarray
    mean_norm: float

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON values; `from_json` restores the same bits."""
        return {"rows": self.rows, "mean": self.mean.tolist(), "variance": self.variance.tolist(), "mean_norm": self.mean_norm}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ActivationStatistics:
        """Return statistics from the values of `to_json`."""
        return cls(values["rows"], np.array(values["mean"]), np.array(values["variance"]), values["mean_norm"])


class StreamingStatistics:
    """Accumulates ActivationStatistics over chunks of rows, in float64 (Chan, Golub and LeVeque 1979)."""

    def __init__(self, d_in: int) -> None:
        self._rows, self._norms = 0, 0.0
        self._mean, self._squares = np.zeros(d_in), np.zeros(d_in)  # squares of deviations from the mean

    def update(self, chunk: torch.Tensor) -> None:
        """Add rows `[n, d_in]`."""
        if not len(chunk):
            return
        x = chunk.double().numpy()
        mean, rows = x.mean(axis=0), self._rows + len(x)
        step = mean - self._mean
        self._squares += ((x - mean) ** 2).sum(axis=0) + step**2 * (self._rows * len(x) / rows)
        self._mean = self._mean + step * (len(x) / rows)
        self._norms += float(np.sqrt((x**2).sum(axis=1)).sum())
        self._rows = rows

    @property
    def rows(self) -> int:
        """The number of rows so far."""
        return self._rows

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values, for `restore`."""
        return {"rows": self._rows, "norms": self._norms, "mean": self._mean.tolist(), "squares": self._squares.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Set the state that `state` returned, with the same bits."""
        self._rows, self._norms = state["rows"], state["norms"]
        self._mean, self._squares = np.array(state["mean"]), np.array(state["squares"])

    def compute(self) -> ActivationStatistics:
        """Return the statistics of all rows so far."""
        rows = max(1, self._rows)
        return ActivationStatistics(self._rows, self._mean, self._squares / rows, self._norms / rows)


class ActivationReader(ABC):
    """Rows for training and evaluation: an ActivationStore, or a residual that is computed while it is read."""

    d_in: int
    dtype: StoredDtype  # of the numbers on disk; reading gives float32
    chunk_rows: int

    @abstractmethod
    def n_rows(self, split: str) -> int:
        """Return the number of rows. Raises SaeensError for a split that does not exist, as all methods do."""

    @abstractmethod
    def statistics(self, split: str) -> ActivationStatistics:
        """Return the statistics of the rows of a split, as they are read."""

    @abstractmethod
    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        """Return the stored rows from which chunk `index` is derived, in the stored dtype.

        Computes nothing, since `batches` calls it on a thread during training. The tensor may be a private mapping of a file, which it
        keeps open: writes change the tensor, not the file.
        """

    def derive(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of this reader for a stored chunk, in the stored dtype; a store returns the chunk itself."""
        return rows

    def read_chunk(self, split: str, index: int) -> torch.Tensor:
        """Return rows `[index * chunk_rows, (index + 1) * chunk_rows)` in the stored dtype; the last chunk may be shorter."""
        return self.derive(self.stored_chunk(split, index))

    def n_chunks(self, split: str) -> int:
        """Return the number of chunks of a split; the last one may be shorter."""
        return -(-self.n_rows(split) // self.chunk_rows)

    def chunks(self, split: str) -> Iterator[torch.Tensor]:
        """Yield all rows in storage order, as float32 `[<= chunk_rows, d_in]`. Memory: one chunk."""
        import torch

        for index in range(self.n_chunks(split)):
            yield self.read_chunk(split, index).to(torch.float32, copy=True)  # a copy, so that no file stays open

    def batches(
        self, split: str, batch_tokens: int, *, seed: int, epochs: int = 1, mixing_chunks: int = 64, skipped_batches: int = 0
    ) -> Generator[torch.Tensor]:
        """Yield shuffled rows, as float32 `[batch_tokens, d_in]`; only the last batch may be shorter.

        Each epoch takes the chunks in a new random order, `mixing_chunks` at a time, and shuffles their rows together: every row occurs
        exactly once per epoch. The order of rows depends on seed, chunks and mixing_chunks, not on batch_tokens. A batch may hold the end
        of one epoch and the start of the next. `skipped_batches` leaves out the first batches without changing the others; chunks that
        only they need are not read. A thread reads the next chunks; it ends with this iterator, also if that is closed early.

        Memory: two mixing buffers, each of `mixing_chunks` chunks (of up to 2 MiB: 256 MiB in total by default) or of the split,
        whichever is smaller; 8 bytes for each of their rows; one batch in the stored dtype and one in float32.
        """
        import torch

        if min(batch_tokens, mixing_chunks) < 1:
            raise ValueError(f"batch_tokens = {batch_tokens}, mixing_chunks = {mixing_chunks}: both are at least 1")
        batch, filled = torch.empty(batch_tokens, self.d_in, dtype=getattr(torch, self.dtype)), 0
        skipped_rows = skipped_batches * batch_tokens
        stream = mix_chunks(self, split, seed=seed, epochs=epochs, mixing_chunks=mixing_chunks, skipped_rows=skipped_rows)
        with closing(stream) as mixed:
            for rows, order in mixed:
                start = 0
                while start < len(order):
                    taken = order[start : start + batch_tokens - filled]
                    torch.index_select(rows, 0, taken, out=batch[filled : filled + len(taken)])
                    start, filled = start + len(taken), filled + len(taken)
                    if filled == batch_tokens:
                        yield batch.to(torch.float32, copy=True)
                        filled = 0
        if filled:
            yield batch[:filled].to(torch.float32, copy=True)


def compute_statistics(reader: ActivationReader, split: str) -> ActivationStatistics:
    """Return the statistics of a split, computed in a pass over its rows."""
    statistics = StreamingStatistics(reader.d_in)
    for index in range(reader.n_chunks(split)):
        statistics.update(reader.read_chunk(split, index))
    return statistics.compute()


class ActivationStore(ActivationReader):
    """A store on disk, open for reading. Raises SaeensError if there is none, or only an incomplete one."""

    def __init__(self, path: Path) -> None:
        import zarr

        self.path = path
        try:
            group = zarr.open_group(path, mode="r")
            self.dtype = cast("StoredDtype", group.attrs["dtype"])
            self._arrays: dict[str, dict[str, Any]] = {}
            self._statistics: dict[str, ActivationStatistics] = {}
            for split in ("train", "test"):
                if split not in group:  # residuals have no test split
                    continue
                members = cast("zarr.Group", group[split])
                self._arrays[split] = dict(members.arrays())
                self._statistics[split] = ActivationStatistics.from_json(cast("dict[str, Any]", members.attrs["statistics"]))
            activations = {split: arrays["activations"] for split, arrays in self._arrays.items()}
            self.d_in, self.chunk_rows = next((array.shape[1], array.chunks[0]) for array in activations.values())
        except (FileNotFoundError, KeyError, StopIteration) as error:
            raise SaeensError(f"{path} holds no activations, or only a part of them ({error}): make them again") from None
        self._shards = {split: map_shards(array) for split, array in activations.items() if array.chunks[0] == self.chunk_rows}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the store, `train` first."""
        return tuple(sorted(self._arrays, reverse=True))

    def n_rows(self, split: str) -> int:
        return self._array(split, "activations").shape[0]

    def statistics(self, split: str) -> ActivationStatistics:
        self._array(split, "activations")
        return self._statistics[split]

    def document(self, split: str) -> np.ndarray:
        """Return the document of each row, `[n]` int32."""
        return self._array(split, "document")[:]

    def document_blocks(self, split: str) -> Iterator[np.ndarray]:
        """Yield `document` in stored blocks, each of the rows of 16 chunks."""
        array = self._array(split, "document")
        for start in range(0, array.shape[0], array.chunks[0]):
            yield array[start : start + array.chunks[0]]

    def position(self, split: str) -> np.ndarray:
        """Return the position of each row in its document, in tokens, `[n]` int32."""
        return self._array(split, "position")[:]

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        import torch

        array, start = self._array(split, "activations"), index * self.chunk_rows
        shards = self._shards.get(split)
        values = torch.from_numpy(shards.chunk(index) if shards else array[start : start + self.chunk_rows])
        return values.view(torch.bfloat16) if self.dtype == "bfloat16" else values

    def _array(self, split: str, name: str) -> Any:
        try:
            return self._arrays[split][name]
        except KeyError:
            held = ", ".join(f"{s}/{n}" for s, arrays in self._arrays.items() for n in arrays)
            raise SaeensError(f"{self.path} has no {split}/{name}; it has {held}") from None


class ActivationWriter:
    """Writes a store, batch by batch; use it as a context manager, then read `statistics`.

    `rows` is the number of rows of each split; more or fewer are an error. `name` names the rows in messages. `with_origin`: also store
    document and position of every row. Raises SaeensError before writing if the disk has too little space.
    Memory: one shard of each split (up to 32 MiB). The store can be opened once the writer is closed.
    `resume`: keep a record of the complete shards in `path`. If such a record of the same kind exists, the writer resumes after those
    shards: `resumed_rows` is the number of rows on disk of each split, and the caller appends the rows after them.
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
        chunk_rows: int | None = None,
        resume: bool = False,
    ) -> None:
        import zarr

        self.name = name
        self.dtype: StoredDtype = dtype
        chunk_rows = chunk_rows or default_chunk_rows(d_in, dtype)
        kind = {"d_in": d_in, "dtype": dtype, "rows": dict(rows), "with_origin": with_origin, "chunk_rows": chunk_rows}
        self._progress = WritingProgress(path, kind) if resume else None
        done = self._progress.read() if self._progress else {}
        self.resumed_rows = {split: done[split]["rows"] if split in done else 0 for split in rows}
        left = {split: n - self.resumed_rows[split] for split, n in rows.items()}
        require_free_disk(path, stored_bytes(d_in, dtype, left, with_origin), name)
        if not done:
            zarr.open_group(path, mode="w", zarr_format=3, attributes={"dtype": dtype})
        self._splits = {
            split: _SplitWriter(path / split, n, d_in, dtype, chunk_rows=chunk_rows, with_origin=with_origin, progress=self._progress)
            for split, n in rows.items()
        }
        self.statistics: dict[str, ActivationStatistics] = {}

    def __enter__(self) -> ActivationWriter:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif self._progress:
            self._progress.stop()

    def append(self, split: str, rows: torch.Tensor, document: torch.Tensor | None = None, position: torch.Tensor | None = None) -> None:
        """Add rows `[n, d_in]` of any float dtype and device; with `with_origin`, also their `document` and `position` `[n]`.

        Raises SaeensError for values that are not finite or too large for the stored dtype.
        """
        columns = {"activations": to_stored_dtype(rows, self.dtype, self.name).cpu()}
        if document is not None and position is not None:
            columns |= {"document": document.cpu(), "position": position.cpu()}
        self._splits[split].append(columns)

    def close(self) -> None:
        """Write the buffered rows and the statistics. Raises SaeensError if rows of a split are missing."""
        self.statistics = {split: writer.finish(f"{self.name}, {split} split") for split, writer in self._splits.items()}
        if self._progress:
            self._progress.remove()


class _SplitWriter:
    """Buffer of the rows of one split, which writes each shard once."""

    def __init__(
        self,
        folder: Path,
        n_rows: int,
        d_in: int,
        dtype: StoredDtype,
        *,
        chunk_rows: int,
        with_origin: bool,
        progress: WritingProgress | None,
    ) -> None:
        import torch
        import zarr

        self._folder, self._n_rows, self._chunk_rows, self._progress = folder, n_rows, chunk_rows, progress
        self._group = group = zarr.open_group(folder, mode="a", zarr_format=3)
        self._shard_rows = chunk_rows * min(_CHUNKS_PER_SHARD, max(1, -(-n_rows // chunk_rows)))
        self._arrays: dict[str, Any] = {
            "activations": _require_array(
                group,
                "activations",
                shape=(n_rows, d_in),
                chunks=(chunk_rows, d_in),
                shards=(self._shard_rows, d_in),
                dtype="uint16" if dtype == "bfloat16" else dtype,
                compressors=None,
                filters=None,
            )
        }
        self._buffers = {"activations": torch.empty(self._shard_rows, d_in, dtype=getattr(torch, dtype))}
        for name in ("document", "position") if with_origin else ():
            self._arrays[name] = _require_array(group, name, shape=(n_rows,), chunks=(self._shard_rows,), dtype="int32")
            self._buffers[name] = torch.empty(self._shard_rows, dtype=torch.int32)
        self._statistics = StreamingStatistics(d_in)
        done = progress.read().get(folder.name) if progress else None
        if done is not None:
            self._statistics.restore(done)
        self._written, self._filled = self._statistics.rows, 0
        for name in self._arrays if progress else ():
            remove_chunks_from(folder / name, self._written // self._shard_rows)

    def append(self, columns: Mapping[str, torch.Tensor]) -> None:
        if columns.keys() != self._buffers.keys():
            raise ValueError(f"got columns {', '.join(columns)}; this store has {', '.join(self._buffers)}")
        n_rows, start = len(columns["activations"]), 0
        while start < n_rows:
            taken = min(n_rows - start, self._shard_rows - self._filled)
            for name, values in columns.items():
                self._buffers[name][self._filled : self._filled + taken] = values[start : start + taken]
            start, self._filled = start + taken, self._filled + taken
            if self._filled == self._shard_rows:
                self._flush()
                if self._progress:
                    last = self._written // self._shard_rows - 1
                    shards = [self._folder / name / "c" / f"{last}{'/0' if name == 'activations' else ''}" for name in self._arrays]
                    self._progress.record(self._folder.name, self._statistics.state(), shards)

    def finish(self, name: str) -> ActivationStatistics:
        self._flush()
        if self._written != self._n_rows:
            raise SaeensError(f"{name}: expected {self._n_rows:,} rows, got {self._written:,}")
        statistics = self._statistics.compute()
        self._group.attrs["statistics"] = statistics.to_json()
        return statistics

    def _flush(self) -> None:
        """Write the buffered rows. Statistics are updated chunk by chunk, so that they do not depend on the sizes of appended batches."""
        rows = self._buffers["activations"][: self._filled]
        for chunk in rows.split(self._chunk_rows) if len(rows) else ():
            self._statistics.update(chunk)
        end = self._written + self._filled
        if end <= self._n_rows:  # `finish` raises the error for too many rows
            for name, buffer in self._buffers.items():
                self._arrays[name][self._written : end] = _as_numpy(buffer[: self._filled])
        self._written, self._filled = end, 0


def _require_array(group: zarr.Group, name: str, **how: Any) -> Any:
    return group[name] if name in group else group.create_array(name, **how)


def to_stored_dtype(rows: torch.Tensor, dtype: StoredDtype, name: str) -> torch.Tensor:
    """Round rows to the dtype of a store. Raises SaeensError for NaN, infinity, and values outside the range of the dtype."""
    import torch

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


def stored_bytes(d_in: int, dtype: StoredDtype, rows: Mapping[str, int], with_origin: bool = True) -> int:
    """Return an upper limit of the bytes of a store on disk, without a few kB of metadata and before compression of the two columns."""
    return sum(rows.values()) * (d_in * _BYTES[dtype] + (8 if with_origin else 0))


def require_free_disk(path: Path, n_bytes: int, name: str) -> None:
    """Raise SaeensError unless the disk of `path`, which need not exist, has `n_bytes` free."""
    folder = path.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise SaeensError(
            f"{name} needs {n_bytes:,} bytes in {path}, where {free:,} bytes are free: "
            "make room, ask for fewer tokens or layers, or set SAEENS_DATA to a larger disk"
        )


def _as_numpy(values: torch.Tensor) -> np.ndarray:
    import torch

    return values.view(torch.uint16).numpy() if values.dtype == torch.bfloat16 else values.numpy()
