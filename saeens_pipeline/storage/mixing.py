"""Shuffling more rows than memory holds: chunks in random order, and the rows of several chunks at a time shuffled together."""

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
    """Chunks of rows to mix, as `storage.activations.ActivationReader` gives them."""

    d_in: int
    chunk_rows: int

    @property
    def dtype(self) -> str: ...

    def n_rows(self, split: str) -> int: ...

    def stored_chunk(self, split: str, index: int) -> torch.Tensor: ...

    def derive(self, rows: torch.Tensor) -> torch.Tensor: ...


class MixedRows(NamedTuple):
    """Rows `[n, d_in]` of several chunks, in the stored dtype, and the `order` `[<= n]` in which to take them."""

    rows: torch.Tensor
    order: torch.Tensor


class _Step(NamedTuple):
    """Chunks that are mixed together: which, how many rows each has, and the order of the rows of all, or the end of that order."""

    indices: list[int]
    lengths: list[int]
    order: torch.Tensor


class _Reading(NamedTuple):
    """A buffer that is being filled with the chunks of a step."""

    mixed: MixedRows
    chunks: Sequence[torch.Tensor]  # views of mixed.rows
    reads: Sequence[Future[None]]  # one per chunk


def mix_chunks(
    reader: ChunkReader, split: str, *, seed: int, epochs: int, mixing_chunks: int, skipped_rows: int = 0
) -> Generator[MixedRows]:
    """The rows of `mixing_chunks` chunks at a time, every chunk once per epoch, in an order that depends on the arguments alone.

    The first `skipped_rows` of that order are left out; chunks that are not needed without them are not read.

    Two buffers take turns: what is given is valid until the next is asked for, and meanwhile a thread fills the other with stored
    bytes. What a residual makes of them is computed here and not there, since training has the cores. The thread ends with this
    iterator (exhausted, closed or collected), after at most the chunk that it is reading; what it raises is raised here, when the
    turn of that chunk has come.
    """
    import torch

    dtype = getattr(torch, reader.dtype)
    buffer_rows = min(reader.n_rows(split), mixing_chunks * reader.chunk_rows)
    # numpy's memory comes in huge pages where it may: filling it for the first time is several times faster
    memory = [np.empty((buffer_rows, reader.d_in * dtype.itemsize), np.uint8) for _ in range(2)]
    buffers = [torch.from_numpy(each).view(dtype) for each in memory]
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")

    def fill(chunk: torch.Tensor, index: int) -> None:
        # numpy copies on this thread alone, and lets others run meanwhile; as bytes, since it has no bfloat16
        np.copyto(chunk.view(torch.uint8).numpy(), reader.stored_chunk(split, index).view(torch.uint8).numpy())

    def start(buffer: torch.Tensor, step: _Step) -> _Reading:
        rows = buffer[: sum(step.lengths)]
        chunks = rows.split(step.lengths)
        reads = [thread.submit(fill, chunk, index) for chunk, index in zip(chunks, step.indices, strict=True)]
        return _Reading(MixedRows(rows, step.order), chunks, reads)

    def finish(reading: _Reading) -> MixedRows:
        for chunk, read in zip(reading.chunks, reading.reads, strict=True):
            read.result()
            chunk.copy_(reader.derive(chunk))  # of itself, where nothing is derived: does nothing
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
