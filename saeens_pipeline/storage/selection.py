"""Rows of some documents alone, read out of a store of all activations: nothing is written a second time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics, ActivationStore, compute_statistics

if TYPE_CHECKING:
    import torch


class SelectedDocuments(ActivationReader):
    """The rows of one split of `origin` that are from the given documents `[n]`, in storage order.

    Rows of a document lie side by side, so that what is kept are the ends of runs of rows: 16 bytes for each, whatever the number of rows.
    Of a store that is mapped into memory only the rows that are asked for are read. Raises SaeensError where there are none.
    """

    def __init__(self, origin: ActivationStore, split: str, documents: np.ndarray) -> None:
        self.origin, self.split = origin, split
        self.d_in, self.dtype, self.chunk_rows = origin.d_in, origin.dtype, origin.chunk_rows
        self._starts, ends = _runs(origin.document_blocks(split), documents)
        self._selected = np.concatenate([[0], np.cumsum(ends - self._starts)])  # rows in front of each run, and all
        self._statistics: ActivationStatistics | None = None
        if not self._selected[-1]:
            raise SaeensError(f"{origin.path} has no {split} rows of the {len(documents):,} documents that were asked for")

    def n_rows(self, split: str) -> int:
        self._require(split)
        return int(self._selected[-1])

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        import torch

        first = index * self.chunk_rows
        return torch.cat(list(self._pieces(first, min(first + self.chunk_rows, self.n_rows(split)))))

    def statistics(self, split: str) -> ActivationStatistics:
        """Takes a pass over the rows the first time."""
        self._require(split)
        if self._statistics is None:
            self._statistics = compute_statistics(self, split)
        return self._statistics

    def _pieces(self, first: int, end: int) -> Iterator[torch.Tensor]:
        """The selected rows from `first` on, cut where a run or a chunk of the origin ends."""
        held, chunk = -1, None
        run = int(np.searchsorted(self._selected, first, side="right")) - 1
        while first < end:
            row = int(self._starts[run]) + first - int(self._selected[run])
            index, offset = divmod(row, self.chunk_rows)
            if chunk is None or index != held:
                held, chunk = index, self.origin.stored_chunk(self.split, index)
            piece = chunk[offset : offset + min(end, int(self._selected[run + 1])) - first]
            yield piece
            first += len(piece)
            run += first == self._selected[run + 1]

    def _require(self, split: str) -> None:
        if split != self.split:
            raise SaeensError(f"documents were selected from the {self.split} split of {self.origin.path}, not from {split}")


def _runs(blocks: Iterator[np.ndarray], documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where rows of these documents begin and end, `[n_runs]` each; `blocks` are the documents of all rows, in order."""
    starts, ends, row, inside = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0, False
    for block in blocks:
        selected = np.isin(block, documents)
        changes = np.flatnonzero(np.diff(selected, prepend=inside)) + row
        (ends if inside else starts).append(changes[::2])
        (starts if inside else ends).append(changes[1::2])
        row, inside = row + len(block), bool(selected[-1])
    if inside:
        ends.append(np.array([row]))
    return np.concatenate(starts), np.concatenate(ends)
