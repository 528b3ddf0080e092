"""Rows of selected documents, read from the store of all activations without a second copy."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore


class SelectedDocuments(ActivationReader):
    """Rows of the given documents `[n]` in one split of `origin`, in storage order.

    The rows of a document are contiguous, so the selection is kept as runs of rows, 16 bytes each. From a memory-mapped store only the
    selected rows are read. Raises SaeensError if the documents have no rows.
    """

    def __init__(self, origin: ActivationStore, split: str, documents: np.ndarray) -> None:
        self.origin, self.split = origin, split
        self.d_in, self.dtype, self.chunk_rows = origin.d_in, origin.dtype, origin.chunk_rows
        self._starts, ends = _runs(origin.document_blocks(split), documents)
        self._selected = np.concatenate([[0], np.cumsum(ends - self._starts)])  # selected rows before each run, then their total
        self._statistics = {}
        if not self._selected[-1]:
            raise SaeensError(f"{origin.path} has no {split} rows of the {len(documents):,} selected documents")

    def n_rows(self, split: str) -> int:
        if split != self.split:
            raise SaeensError(f"documents were selected from the {self.split} split of {self.origin.path}, not from {split}")
        return int(self._selected[-1])

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        first = index * self.chunk_rows
        return torch.cat(list(self._pieces(first, min(first + self.chunk_rows, self.n_rows(split)))))

    def _pieces(self, first: int, end: int) -> Iterator[torch.Tensor]:
        """Yield the selected rows from `first` to `end`, cut at the ends of runs and of the origin's chunks."""
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


def _runs(blocks: Iterator[np.ndarray], documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and ends `[n_runs]` of the ranges of consecutive rows of these documents. `blocks` yields the document of every row."""
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
