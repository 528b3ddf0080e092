"""The activation store: rows of activations or residuals on disk, written once and read many times.

A store is a Zarr v3 group. It has a group for each split, with

* `activations` `[n, d_in]`: uncompressed (activations hardly compress), in shards of 16 chunks of 1 to 2 MiB. The attribute `dtype` of
  the store is the dtype of the numbers; Zarr has no bfloat16, so its bits are stored as uint16.
* `document`, `position` `[n]` int32: the token of each row, as in `tokens.zarr`. A residual has neither: its rows correspond to
  those of its activations.
* `dropped` `[n]` int64, if rows were dropped for their norm: their indices among the kept positions of `tokens.zarr`.
* instead of `activations`, where they are computed when they are read: `groups` `[n_groups, 2]` int64, the first window and the first kept
  position of each group of windows that passes through the language model together.
* the attribute `statistics` of the stored rows, as ActivationStatistics.

A local store of this layout is read memory-mapped, any other layout through Zarr.

Readers read whole chunks, and stored results are computed chunk by chunk. So the same rows always enter the same matrix product and give
the same bits.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, cycle, pairwise
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import zarr

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.held_folders import HeldFolder
from saeens_pipeline.storage.shards import map_shards

StoredDtype = Literal["float16", "bfloat16", "float32"]

_OCTAVES, _BINS_PER_OCTAVE = 64, 4  # of the histogram of squared deviations: from 2**-64 to 2**64
_BINS = 2 * _OCTAVES * _BINS_PER_OCTAVE
_TOP_FRACTION, _TOP_ROWS, _LEAST_ROWS = 0.001, 5, 100


@dataclass(frozen=True)
class ActivationStatistics:
    """Moments of n rows x: `mean` and (population) `variance` per dimension, `[d_in]` float64, and `mean_norm` = mean of ||x||_2.

    `top_share` is the share of the variance (squared deviations from the mean, summed over dimensions) in the 0.1 % of the rows that hold
    most of it, at least one row, to about 1 %; None for fewer than 100 rows, of which one may well hold a tenth. `top_rows` are the first
    of these: row and norm, and in a store with origins document and position. `norm_limit` is the largest norm of a stored row, None
    without a limit, and `dropped` the number of rows above it, which no other number counts.
    """

    rows: int
    mean: np.ndarray
    variance: np.ndarray
    mean_norm: float
    top_share: float | None = None
    top_rows: Sequence[Sequence[float]] = ()
    norm_limit: float | None = None
    dropped: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the statistics as JSON values; `from_json` restores the same bits."""
        return vars(self) | {"mean": self.mean.tolist(), "variance": self.variance.tolist(), "top_rows": [*map(list, self.top_rows)]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> ActivationStatistics:
        """Return statistics from the values of `to_json`."""
        return cls(**{**values, "mean": np.array(values["mean"]), "variance": np.array(values["variance"])})


class StreamingStatistics:
    """Accumulates ActivationStatistics over chunks of rows, in float64 (Chan, Golub and LeVeque 1979).

    `top_share` comes from squared deviations from the running mean: the largest five or, where 0.1 % of the rows are more, a histogram with
    four bins per factor of two.
    """

    def __init__(self, d_in: int) -> None:
        self.rows, self._norms = 0, 0.0
        self._mean, self._squares = np.zeros(d_in), np.zeros(d_in)  # squares of deviations from the mean
        self._histogram = np.zeros((2, _BINS))  # numbers of rows, and sums of their squared deviations
        self._top: list[tuple[float, int, float]] = []  # squared deviation, row, norm

    def update(self, chunk: torch.Tensor) -> None:
        """Add rows `[n, d_in]`, n >= 1."""
        x = chunk.double().numpy()
        mean, rows = x.mean(axis=0), self.rows + len(x)
        step = mean - self._mean
        self._squares += ((x - mean) ** 2).sum(axis=0) + step**2 * (self.rows * len(x) / rows)
        self._mean = self._mean + step * (len(x) / rows)
        norms = np.sqrt((x**2).sum(axis=1))
        self._norms += float(norms.sum())
        deviations = ((x - self._mean) ** 2).sum(axis=1)
        bins = (np.log2(np.maximum(deviations, 2.0**-_OCTAVES)) * _BINS_PER_OCTAVE).astype(int).clip(1 - _BINS // 2, _BINS // 2 - 1)
        self._histogram += [np.bincount(bins + _BINS // 2, weights, _BINS) for weights in (None, deviations)]
        largest = np.argsort(-deviations, kind="stable")[:_TOP_ROWS]
        self._top += zip(deviations[largest].tolist(), (self.rows + largest).tolist(), norms[largest].tolist(), strict=True)
        self._top = sorted(self._top, key=lambda each: (-each[0], each[1]))[:_TOP_ROWS]
        self.rows = rows

    def state(self) -> dict[str, Any]:
        """Return the state as JSON values; `restore` sets it, with the same bits."""
        moments = {"rows": self.rows, "norms": self._norms, "mean": self._mean.tolist(), "squares": self._squares.tolist()}
        return moments | {"histogram": self._histogram.tolist(), "top": self._top}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.rows, self._norms = state["rows"], state["norms"]
        self._mean, self._squares, self._histogram = (np.array(state[name]) for name in ("mean", "squares", "histogram"))
        self._top = [(deviation, row, norm) for deviation, row, norm in state["top"]]

    def compute(self) -> ActivationStatistics:
        """Return the statistics of all rows so far."""
        rows = max(1, self.rows)
        top_rows = [(row, norm) for _, row, norm in self._top]
        return ActivationStatistics(self.rows, self._mean, self._squares / rows, self._norms / rows, self._top_share(), top_rows)

    def _top_share(self) -> float | None:
        """Return the share of the squared deviations in the 0.1 % largest; in the last bin the rows count with their mean."""
        counts, sums = self._histogram[:, ::-1]
        if self.rows < _LEAST_ROWS or not sums.any():
            return None
        n_top = math.ceil(_TOP_FRACTION * self.rows)
        if n_top <= _TOP_ROWS:
            return sum(deviation for deviation, _, _ in self._top[:n_top]) / float(sums.sum())
        taken = np.diff(np.minimum(np.cumsum(counts), n_top), prepend=0)
        return float((taken * sums / np.maximum(counts, 1)).sum() / sums.sum())


class ActivationReader(ABC):
    """Rows for training and evaluation: an ActivationStore, or a residual that is computed while it is read."""

    d_in: int
    dtype: StoredDtype  # of the numbers on disk; reading gives float32
    chunk_rows: int
    _statistics: dict[str, ActivationStatistics]  # of the splits for which they are known

    @abstractmethod
    def n_rows(self, split: str) -> int:
        """Return the number of rows of a split. Raises SaeensError for a split that does not exist; the other methods do, too."""

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

    def statistics(self, split: str) -> ActivationStatistics:
        """Return the statistics of the rows of a split. If they are not stored, the first call reads all rows."""
        if split not in self._statistics:
            statistics = StreamingStatistics(self.d_in)
            for index in range(self.n_chunks(split)):
                statistics.update(self.read_chunk(split, index))
            self._statistics[split] = statistics.compute()
        return self._statistics[split]

    def chunks(self, split: str, device: str = "cpu") -> Iterator[torch.Tensor]:
        """Yield all rows in storage order on a device, as float32 `[<= chunk_rows, d_in]`. Memory: one chunk.

        Rows are converted on the device.
        """
        for index in range(self.n_chunks(split)):
            yield self.read_chunk(split, index).to(device).to(torch.float32, copy=True)  # a copy, so that no file stays open

    def batches(
        self,
        split: str,
        batch_tokens: int,
        *,
        seed: int,
        epochs: int = 1,
        mixing_chunks: int = 64,
        contiguous: bool = False,
        skipped_batches: int = 0,
        as_stored: bool = False,
    ) -> Generator[torch.Tensor]:
        """Yield shuffled rows `[batch_tokens, d_in]`, as float32 or, with `as_stored`, in the stored dtype; the last batch may be shorter.

        Each epoch takes the chunks in a new random order, `mixing_chunks` at a time, and shuffles their rows together: every row occurs
        exactly once per epoch. `contiguous`: the chunks that are taken together follow each other, and the random order is that of such
        blocks, whose ends are elsewhere in each epoch. The order of rows depends on seed, chunks, mixing_chunks and contiguous, not on
        batch_tokens. A batch may hold the end of one epoch and the start of the next. `skipped_batches` leaves out the first batches
        without changing the others; chunks that only they need are not read. A thread reads the next chunks; it ends with this iterator,
        also if that is closed early.

        Memory: two mixing buffers, each of `mixing_chunks` chunks (of up to 2 MiB: 256 MiB in total by default) or of the split,
        whichever is smaller; 8 bytes for each of their rows; one batch in the stored dtype and its copy.
        """
        if min(batch_tokens, mixing_chunks) < 1:
            raise ValueError(f"batch_tokens = {batch_tokens}, mixing_chunks = {mixing_chunks}: both are at least 1")
        batch, filled = torch.empty(batch_tokens, self.d_in, dtype=getattr(torch, self.dtype)), 0
        given_as = batch.dtype if as_stored else torch.float32
        skipped_rows = skipped_batches * batch_tokens
        blocks = _contiguous_blocks if contiguous else _scattered_blocks
        mixing = _mix(self, split, blocks, seed=seed, epochs=epochs, mixing_chunks=mixing_chunks, skipped_rows=skipped_rows)
        with closing(mixing) as mixed:
            for rows, order in mixed:
                start = 0
                while start < len(order):
                    taken = order[start : start + batch_tokens - filled]
                    torch.index_select(rows, 0, taken, out=batch[filled : filled + len(taken)])
                    start, filled = start + len(taken), filled + len(taken)
                    if filled == batch_tokens:
                        yield batch.to(given_as, copy=True)
                        filled = 0
        if filled:
            yield batch[:filled].to(given_as, copy=True)


_Blocks = Callable[[int, int, np.random.Generator], list[list[int]]]
"""Function of the number of chunks and that of a block: the chunks of each block, in the order in which they are read."""


def _scattered_blocks(n_chunks: int, size: int, generator: np.random.Generator) -> list[list[int]]:
    order = generator.permutation(n_chunks).tolist()
    return [order[first : first + size] for first in range(0, n_chunks, size)]


def _contiguous_blocks(n_chunks: int, size: int, generator: np.random.Generator) -> list[list[int]]:
    ends = [*range(int(generator.integers(1, size + 1)), n_chunks, size), n_chunks]
    blocks = [list(range(first, end)) for first, end in pairwise([0, *ends])]
    return [blocks[number] for number in generator.permutation(len(blocks))]


def _mix(
    reader: ActivationReader, split: str, blocks: _Blocks, *, seed: int, epochs: int, mixing_chunks: int, skipped_rows: int
) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the rows `[n, d_in]` of a block of chunks, in the stored dtype, and their order `[<= n]`; the arguments alone decide it.

    Two buffers alternate: rows are valid until the next ones are requested, and a thread meanwhile fills the other buffer with stored
    bytes. Residuals are derived here and not in the thread, since training needs the cores. The thread ends with this iterator
    (exhausted, closed or collected), after at most the chunk that it is reading; its errors are raised here, in the order of chunks.
    """
    n_rows, chunk_rows, dtype = reader.n_rows(split), reader.chunk_rows, getattr(torch, reader.dtype)
    # numpy allocates huge pages where possible, which makes the first write several times faster
    memory = [np.empty((min(n_rows, mixing_chunks * chunk_rows), reader.d_in * dtype.itemsize), np.uint8) for _ in range(2)]
    buffers = cycle([torch.from_numpy(each).view(dtype) for each in memory])
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def fill(chunk: torch.Tensor, index: int) -> None:
        # numpy copies on this thread only and releases the GIL; as bytes, since numpy has no bfloat16
        np.copyto(chunk.view(torch.uint8).numpy(), reader.stored_chunk(split, index).view(torch.uint8).numpy())

    def started() -> Iterator[tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, Future[None]]]]]:
        """Start to read the chunks that are shuffled together; yield their rows, the order of the rows, and chunks with their reads."""
        to_skip = skipped_rows
        for epoch in range(epochs):
            generator = np.random.default_rng([seed, epoch])
            for indices in blocks(reader.n_chunks(split), mixing_chunks, generator):
                lengths = [min(chunk_rows, n_rows - index * chunk_rows) for index in indices]
                order = generator.permutation(sum(lengths))
                skipped = min(to_skip, len(order))
                to_skip -= skipped
                if skipped < len(order):
                    rows = next(buffers)[: len(order)]
                    reads = [(chunk, thread.submit(fill, chunk, i)) for chunk, i in zip(rows.split(lengths), indices, strict=True)]
                    yield rows, torch.from_numpy(order[skipped:]), reads

    pending = None
    try:
        for reading in chain(started(), (None,)):  # the next one is started before the pending one is given
            if pending:
                rows, order, reads = pending
                for chunk, read in reads:
                    read.result()
                    chunk.copy_(reader.derive(chunk))  # without a residual, `derive` returns the chunk itself and this does nothing
                yield rows, order
            pending = reading
    finally:
        thread.shutdown(cancel_futures=True)


class ActivationStore(ActivationReader):
    """A store on disk, open for reading. Raises SaeensError if there is none, or only an incomplete one.

    Rows are those of the store that was opened, or an error: see `HeldFolder` and `MappedShards`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            group = zarr.open_group(HeldFolder(path), mode="r")
            self.dtype = cast("StoredDtype", group.attrs["dtype"])
            self._arrays: dict[str, dict[str, Any]] = {}
            self._statistics = {}
            for split in ("train", "test"):
                if split not in group:  # residuals have no test split
                    continue
                members = cast("zarr.Group", group[split])
                self._arrays[split] = dict(members.arrays())
                self._statistics[split] = ActivationStatistics.from_json(cast("dict[str, Any]", members.attrs["statistics"]))
            activations = {split: arrays["activations"] for split, arrays in self._arrays.items() if "activations" in arrays}
            self.d_in, self.chunk_rows = next((array.shape[1], array.chunks[0]) for array in activations.values())
        except (OSError, KeyError, StopIteration) as error:
            raise SaeensError(f"{path} holds no activations, or only a part of them ({error}): compute them again") from None
        self._shards = {split: map_shards(array) for split, array in activations.items() if array.chunks[0] == self.chunk_rows}

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits of the store, `train` first."""
        return tuple(sorted(self._arrays, reverse=True))

    def n_rows(self, split: str) -> int:
        on_demand = "groups" in self._arrays.get(split, {})
        return self._array(split, "document" if on_demand else "activations").shape[0]

    def has_bytes(self, split: str) -> bool:
        """Return whether the rows of a split are stored, and not computed when they are read."""
        return "activations" in self._arrays.get(split, {})

    def groups(self, split: str) -> np.ndarray:
        """Return the groups of a split without bytes, as the module documents."""
        return self._array(split, "groups")[:]

    def document(self, split: str) -> np.ndarray:
        """Return the document of each row, `[n]` int32."""
        return self._array(split, "document")[:]

    def document_chunk(self, split: str, index: int) -> np.ndarray:
        """Return the document of each row of a chunk, `[<= chunk_rows]` int32."""
        return self._array(split, "document")[index * self.chunk_rows : (index + 1) * self.chunk_rows]

    def document_blocks(self, split: str) -> Iterator[np.ndarray]:
        """Yield `document` in stored blocks, each of the rows of 16 chunks."""
        array = self._array(split, "document")
        for start in range(0, array.shape[0], array.chunks[0]):
            yield array[start : start + array.chunks[0]]

    def position(self, split: str) -> np.ndarray:
        """Return the position of each row in its document, in tokens, `[n]` int32."""
        return self._array(split, "position")[:]

    def dropped(self, split: str) -> np.ndarray:
        """Return the rows that were dropped for their norm, int64 `[n]`, ascending: indices among the kept positions of the tokens."""
        return self._arrays[split]["dropped"][:] if "dropped" in self._arrays[split] else np.empty(0, np.int64)

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
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
