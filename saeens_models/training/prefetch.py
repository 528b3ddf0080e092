"""Batches on the device that trains, each copied there while the device works on the one before."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing, nullcontext

import torch
from torch import Tensor


def on_device(batches: Iterable[Tensor], device: torch.device | str) -> Generator[Tensor]:
    """The batches, in their order, on ``device``; those that are there already are passed on as they are.

    To a CUDA device a batch is copied from pinned memory, on a stream of its own: the copy and the work that the device has been given
    run side by side. For that one batch more than what was taken from here is read, and no more; on other devices none. Closing this
    iterator closes ``batches``, where that is a generator. It is for one thread, whose current CUDA stream uses the batches.
    """
    to = torch.device(device)
    with closing(batches) if isinstance(batches, Generator) else nullcontext():
        if to.type == "cuda":
            yield from _copied_ahead(batches, to)
        else:
            for batch in batches:
                yield batch.to(to)


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
        batch.record_stream(current)  # else its memory could be given to a later copy while it is still read
        return batch

    ahead: Tensor | None = None
    for batch in batches:
        ready = None if ahead is None else usable(ahead)  # before the next copy begins, which it need not wait for
        ahead = copied(batch)
        if ready is not None:
            yield ready
    if ahead is not None:
        yield usable(ahead)
