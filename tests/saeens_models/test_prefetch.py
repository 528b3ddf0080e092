"""Batches copied to a device: order, read-ahead and waits. A record of calls stands for CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from saeens_models.training import on_device


class Reading:
    """A stream that records the number of batches read, and its end."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.n_read, self.closed = batches, 0, False

    def __iter__(self) -> Iterator[Any]:
        try:
            for batch in self.batches:
                self.n_read += 1
                yield batch
        finally:
            self.closed = True


current_streams = ["main"]
"""By name; the last one is that of this moment."""


class Batch:
    """A numbered batch of a stream: on the CPU, pinned, or on the device."""

    def __init__(self, number: int, calls: list[str], place: str = "cpu") -> None:
        self.number, self.calls, self.place = number, calls, place
        self.is_cpu = place != "device"

    def pin_memory(self) -> Batch:
        return Batch(self.number, self.calls, "pinned")

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Batch:
        assert device == torch.device("cuda", 1)
        if self.place == "device":
            return self
        assert self.place == "pinned" and non_blocking  # any other copy waits for the device
        self.calls.append(f"copy {self.number} on {current_streams[-1]}")
        return Batch(self.number, self.calls, "device")

    def record_stream(self, stream: Stream) -> None:
        self.calls.append(f"{self.number} is used on {stream.name}")


class Stream:
    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    def wait_stream(self, other: Stream) -> None:
        self.calls.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Record of the calls to CUDA, in order."""
    calls: list[str] = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current_streams.append(stream.name)
        yield
        current_streams.pop()

    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream("copies", calls))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream("main", calls))
    return calls


def on_played_gpu(batches: Any) -> Any:
    return on_device(batches, "cuda:1")


def test_batches_on_the_cpu_are_read_when_requested():
    reading = Reading([torch.full((2, 3), float(number)) for number in range(3)])
    for number, batch in enumerate(on_device(iter(reading), "cpu")):
        assert batch is reading.batches[number]
        assert reading.n_read == number + 1
    assert reading.n_read == 3


def test_batches_keep_their_dtype_on_the_device():
    batches = [torch.zeros(2, 3, dtype=torch.float16), torch.zeros(1, 3)]
    found = list(on_device(batches, "meta"))
    assert [(batch.device.type, batch.dtype, len(batch)) for batch in found] == [("meta", torch.float16, 2), ("meta", torch.float32, 1)]


def test_batches_are_converted_where_they_arrive():
    moved: list[torch.dtype] = []

    class Half(torch.Tensor):
        def to(self, *args: Any, **kwargs: Any) -> Any:
            moved.append(self.dtype)
            return super().to(*args, **kwargs)

    batches = [torch.zeros(2, 3, dtype=torch.float16).as_subclass(Half)]
    (found,) = on_device(batches, "meta", torch.float32)
    assert (found.device.type, found.dtype) == ("meta", torch.float32)
    assert moved == [torch.float16] * 2  # to the device, and there to float32


def test_on_cuda_exactly_one_batch_is_copied_ahead(calls):
    reading = Reading([Batch(number, calls) for number in range(4)])
    for number, batch in enumerate(on_played_gpu(iter(reading))):
        assert (batch.number, batch.place) == (number, "device")
        assert reading.n_read == min(number + 2, 4)
        calls.append(f"work on {number}")
    used = [["main waits for copies", f"{number} is used on main"] for number in range(4)]
    copies, work = [f"copy {number} on copies" for number in range(4)], [f"work on {number}" for number in range(4)]
    assert calls == [
        copies[0],
        *used[0],  # before the next copy: the work does not wait for that
        copies[1],
        work[0],
        *used[1],
        copies[2],
        work[1],
        *used[2],
        copies[3],
        work[2],
        *used[3],
        work[3],
    ]


def test_batches_already_on_cuda_are_not_copied(calls):
    batches = [Batch(number, calls, "device") for number in range(3)]
    found = list(on_played_gpu(batches))
    assert all(a is b for a, b in zip(found, batches, strict=True))
    assert not any("copy" in call for call in calls)


@pytest.mark.parametrize("n", [0, 1])
def test_short_streams_on_cuda_are_complete(calls, n):
    assert [batch.number for batch in on_played_gpu([Batch(number, calls) for number in range(n)])] == list(range(n))


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_a_stream_is_closed_with_its_consumer(calls, device):
    reading = Reading([torch.zeros(1)] * 5 if device == "cpu" else [Batch(number, calls) for number in range(5)])
    source = iter(reading)
    batches = on_device(source, device)
    next(batches)
    assert not reading.closed
    batches.close()
    assert reading.closed


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_an_error_of_the_stream_reaches_the_consumer(calls, device):
    def failing() -> Iterator[Any]:
        yield torch.zeros(1) if device == "cpu" else Batch(0, calls)
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(on_device(failing(), device))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_batches_arrive_unchanged_on_a_gpu():
    batches = list(torch.randn(200_000, 16, generator=torch.Generator().manual_seed(0)).split(30_000))
    sums: list[Tensor] = []
    for batch, own in zip(on_device(batches, "cuda"), batches, strict=True):
        assert batch.is_cuda
        sums.append((batch.cpu() == own).all())
    assert all(sums)
