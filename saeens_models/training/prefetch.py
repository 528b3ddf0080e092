"""Copies of batches to the training device, concurrent with the work on the batch before."""

from collections.abc import Generator, Iterable
from contextlib import closing, nullcontext

import torch
from torch import Tensor


def on_device(batches: Iterable[Tensor], device: torch.device | str, dtype: torch.dtype | None = None) -> Generator[Tensor]:
    """Yield the batches, in order, on ``device``; batches that are there already are passed through.

    ``dtype``: batches are converted to it on ``device``, so that they cross to it in the dtype that they have.

    A batch for a CUDA device is copied from pinned memory on a separate stream, while the device computes. One batch is read ahead for
    that; on other devices none. Closing this iterator closes ``batches`` if that is a generator. Use it on one thread, whose current CUDA
    stream uses the batches.
    """
    to = torch.device(device)
    with closing(batches) if isinstance(batches, Generator) else nullcontext():
        for batch in _copied_ahead(batches, to) if to.type == "cuda" else (each.to(to) for each in batches):
            yield batch if dtype is None else batch.to(dtype)


def _copied_ahead(batches: Iterable[Tensor], device: torch.device) -> Generator[Tensor]:
    copies = torch.cuda.Stream(device)

    def copied(batch: Tensor) -> Tensor:
        if not batch.is_cpu:
            return batch.to(device)
        pinned = batch.pin_memory()
        with torch.cuda.stream(copies):
            return pinned.to(device, non_blocking=True)

    def usable(batch: Tensor) -> Tensor:
        current = torch.cuda.current_stream(device)
        current.wait_stream(copies)
        batch.record_stream(current)  # otherwise a later copy could reuse its memory while it is still read
        return batch

    ahead: Tensor | None = None
    for batch in batches:
        ready = None if ahead is None else usable(ahead)  # before the next copy begins, so that it does not wait for that
        ahead = copied(batch)
        if ready is not None:
            yield ready
    if ahead is not None:
        yield usable(ahead)
