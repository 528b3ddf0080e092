"""Mixing and reading ahead: the seed determines the order, and the reading thread always ends."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable

import child_process
import numpy as np
import pytest
import torch

from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics
from saeens_pipeline.storage.residuals import ResidualView

D_IN, CHUNK_ROWS = 2, 4


class _Rows(ActivationReader):
    """Row i is (i, i). Records which thread read which chunk; `before` may be used to fail."""

    d_in, dtype, chunk_rows = D_IN, "float32", CHUNK_ROWS

    def __init__(self, n_rows: int, before: Callable[[int], None] = lambda index: None) -> None:
        self._rows = torch.arange(n_rows).float()[:, None].expand(-1, D_IN)
        self._before = before
        self.read: list[tuple[int, str]] = []

    def n_rows(self, split: str) -> int:
        return len(self._rows)

    def statistics(self, split: str) -> ActivationStatistics:
        pytest.fail("mixing asks for no statistics")

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        self._before(index)
        self.read.append((index, threading.current_thread().name))
        return self._rows[index * CHUNK_ROWS : (index + 1) * CHUNK_ROWS].contiguous()


def _reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.mark.parametrize("n_rows", [1, 4, 50, 64])
@pytest.mark.parametrize("mixing_chunks", [1, 3, 40])
def test_order_of_rows_is_two_permutations_of_the_seeded_generator(n_rows, mixing_chunks):
    expected: list[int] = []
    for epoch in range(2):
        generator = np.random.default_rng([7, epoch])
        chunks = np.array_split(np.arange(n_rows), range(CHUNK_ROWS, n_rows, CHUNK_ROWS))
        chunk_order = generator.permutation(len(chunks))
        for start in range(0, len(chunks), mixing_chunks):
            rows = np.concatenate([chunks[index] for index in chunk_order[start : start + mixing_chunks]])
            expected += rows[generator.permutation(len(rows))].tolist()
    batches = _Rows(n_rows).batches("train", 9, seed=7, epochs=2, mixing_chunks=mixing_chunks)
    assert torch.cat(list(batches))[:, 0].tolist() == expected


def test_returned_batches_are_not_overwritten():
    stream = _Rows(64).batches("train", 8, seed=0, epochs=3, mixing_chunks=2)
    given, as_given = zip(*((batch, batch.clone()) for batch in stream), strict=True)
    assert all(torch.equal(batch, copy) for batch, copy in zip(given, as_given, strict=True))


def test_chunks_are_read_ahead_by_another_thread_by_at_most_one_buffer():
    reader = _Rows(200)
    stream = reader.batches("train", 12, seed=0, mixing_chunks=3)  # a batch is a buffer
    for n_batches in range(1, 10):
        next(stream)
        assert 3 * n_batches <= len(reader.read) <= 3 * (n_batches + 1)
    stream.close()
    assert {name for _, name in reader.read} == {"read-ahead_0"}


def test_residuals_are_computed_in_the_consumers_thread():
    computed_by = set()

    def halve(rows: torch.Tensor) -> torch.Tensor:
        computed_by.add(threading.current_thread())
        return rows / 2

    reader = _Rows(50)
    view = ResidualView(reader, [halve])
    found = torch.cat(list(view.batches("train", 9, seed=3, mixing_chunks=3)))
    assert torch.equal(found, torch.cat(list(reader.batches("train", 9, seed=3, mixing_chunks=3))) / 2)
    assert computed_by == {threading.main_thread()}


def test_the_reading_thread_ends_with_the_iterator():
    stream = _Rows(50).batches("train", 4, seed=0, mixing_chunks=2)
    next(stream)
    assert _reading_threads()
    assert len(list(stream)) == 12
    assert not _reading_threads()


def test_the_reading_thread_ends_when_the_iterator_is_closed_or_deleted():
    stream = _Rows(50).batches("train", 4, seed=0, mixing_chunks=2)
    next(stream)
    stream.close()
    assert not _reading_threads()
    stream = _Rows(50).batches("train", 4, seed=0, mixing_chunks=2)
    next(stream)
    del stream
    assert not _reading_threads()


def test_the_reading_thread_ends_when_the_consumer_raises():
    def consume() -> None:
        for _ in _Rows(50).batches("train", 4, seed=0, mixing_chunks=2):
            raise RuntimeError("loss is NaN")

    with pytest.raises(RuntimeError, match="loss is NaN"):
        consume()
    assert not _reading_threads()


def test_an_error_while_reading_ahead_is_raised_with_its_traceback_at_its_chunk():
    fails_at = int(np.random.default_rng([0, 0]).permutation(10)[5])  # in the third buffer of two chunks

    def a_bad_disk(index: int) -> None:
        if index == fails_at:
            raise OSError("bad sector")

    stream = _Rows(40, a_bad_disk).batches("train", 8, seed=0, mixing_chunks=2)
    assert len([next(stream), next(stream)]) == 2
    with pytest.raises(OSError, match="bad sector") as error:
        next(stream)
    assert "a_bad_disk" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]
    assert not _reading_threads()


def consume_until_interrupted() -> None:
    """Press Ctrl-C while the first buffer is read, long after the thread has started; called in a child process."""
    awaited = int(np.random.default_rng([0, 0]).permutation(100)[40])

    def interrupt(index: int) -> None:
        if index == awaited:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    try:
        list(_Rows(400, interrupt).batches("train", 4, seed=0, mixing_chunks=50))
    except KeyboardInterrupt:
        child_process.tell(interrupted=True, reading_threads=_reading_threads())


@pytest.mark.slow
def test_ctrl_c_while_waiting_for_the_disk_ends_the_reading_thread():
    observed = child_process.finish(child_process.start(consume_until_interrupted))
    assert observed == {"interrupted": True, "reading_threads": []}


@pytest.mark.parametrize("how", [{"batch_tokens": 0}, {"batch_tokens": 4, "mixing_chunks": 0}])
def test_sizes_below_one_are_refused(how):
    with pytest.raises(ValueError, match="both are at least 1"):
        next(_Rows(4).batches("train", seed=0, **how))
