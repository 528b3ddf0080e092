"""Shuffling of more rows than fit into memory: chunks in random order, and the rows of several chunks shuffled together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch


class ChunkReader(Protocol):
    """Source of chunks of rows; `storage.activations.ActivationReader` is one."""

    d_in: int
    chunk_rows: int

    @property
    def dtype(self) -> str: ...

    def n_rows(self, split: str) -> int: ...

    def stored_chunk(self, split: str, index: int) -> torch.Tensor: ...

    def derive(self, rows: torch.Tensor) -> torch.Tensor: ...


class MixedRows(NamedTuple):
    """Rows `[n, d_in]` of several chunks, in the stored dtype, and their shuffled `order` `[<= n]`."""

    rows: torch.Tensor
    order: torch.Tensor


class _Step(NamedTuple):
    """Chunks that are shuffled together: their indices and numbers of rows, and the order of all their rows, or the end of that order."""

    indices: list[int]
    lengths: list[int]
    order: torch.Tensor


class _Reading(NamedTuple):
    """A buffer while the thread fills it with the chunks of a step."""

    mixed: MixedRows
    chunks: Sequence[torch.Tensor]  # views of mixed.rows
    reads: Sequence[Future[None]]  # one per chunk


def mix_chunks(
    reader: ChunkReader, split: str, *, seed: int, epochs: int, mixing_chunks: int, skipped_rows: int = 0
) -> Generator[MixedRows]:
    """Yield the rows of `mixing_chunks` chunks at a time, every chunk once per epoch, in an order that the arguments alone decide.

    The first `skipped_rows` of this order are left out; chunks with no other rows are not read.

    Two buffers alternate: rows are valid until the next ones are requested, and a thread meanwhile fills the other buffer with stored
    bytes. Residuals are derived here and not in the thread, since training needs the cores. The thread ends with this iterator
    (exhausted, closed or collected), after at most the chunk that it is reading; its errors are raised here, in the order of chunks.
    """
    import torch

    dtype = getattr(torch, reader.dtype)
    buffer_rows = min(reader.n_rows(split), mixing_chunks * reader.chunk_rows)
    # numpy allocates huge pages where possible, which makes the first write several times faster
    memory = [np.empty((buffer_rows, reader.d_in * dtype.itemsize), np.uint8) for _ in range(2)]
    buffers = [torch.from_numpy(each).view(dtype) for each in memory]
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def fill(chunk: torch.Tensor, index: int) -> None:
        # numpy copies on this thread only and releases the GIL; as bytes, since numpy has no bfloat16
        np.copyto(chunk.view(torch.uint8).numpy(), reader.stored_chunk(split, index).view(torch.uint8).numpy())

    def start(buffer: torch.Tensor, step: _Step) -> _Reading:
        rows = buffer[: sum(step.lengths)]
        chunks = rows.split(step.lengths)
        reads = [thread.submit(fill, chunk, index) for chunk, index in zip(chunks, step.indices, strict=True)]
        return _Reading(MixedRows(rows, step.order), chunks, reads)

    def finish(reading: _Reading) -> MixedRows:
        for chunk, read in zip(reading.chunks, reading.reads, strict=True):
            read.result()
            chunk.copy_(reader.derive(chunk))  # without a residual, `derive` returns the chunk itself and this does nothing
        return reading.mixed

    all_steps = _steps(reader.n_rows(split), reader.chunk_rows, seed=seed, epochs=epochs, mixing_chunks=mixing_chunks)
    steps = _without_first_rows(all_steps, skipped_rows)
    started: deque[_Reading] = deque()
    try:
        for buffer, step in zip(cycle(buffers), steps, strict=False):
            started.append(start(buffer, step))
            if len(started) == len(buffers):
                yield finish(started.popleft())
        yield from map(finish, started)
    finally:
        thread.shutdown(cancel_futures=True)


def _steps(n_rows: int, chunk_rows: int, *, seed: int, epochs: int, mixing_chunks: int) -> Iterator[_Step]:
    import torch

    n_chunks = -(-n_rows // chunk_rows)
    for epoch in range(epochs):
        generator = np.random.default_rng([seed, epoch])
        chunk_order = generator.permutation(n_chunks)
        for first in range(0, n_chunks, mixing_chunks):
            indices = chunk_order[first : first + mixing_chunks].tolist()
            lengths = [min(chunk_rows, n_rows - index * chunk_rows) for index in indices]
            yield _Step(indices, lengths, torch.from_numpy(generator.permutation(sum(lengths))))


def _without_first_rows(steps: Iterator[_Step], n_rows: int) -> Iterator[_Step]:
    for step in steps:
        skipped = min(n_rows, len(step.order))
        n_rows -= skipped
        if skipped < len(step.order):
            yield step._replace(order=step.order[skipped:])
