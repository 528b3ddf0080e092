"""Residuals of boosting rounds, r_{j+1} = r_j - g_j(r_j), stored or computed while they are read.

Both give the same bits: every round is applied to one storage chunk at a time, and its result is rounded to the stored dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from saeens_pipeline.storage.activation_writer import ActivationWriter, to_stored_dtype
from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics

Round = Callable[[torch.Tensor], torch.Tensor]
"""Function of a boosting round: r `[n, d_in]` float32 to r - g(r) of the same shape."""


class ResidualView(ActivationReader):
    """A residual that is computed on every read: the rows of `origin` minus the reconstructions by `rounds`, in order."""

    def __init__(self, origin: ActivationReader, rounds: Sequence[Round], *, name: str = "residual") -> None:
        self.origin, self.rounds, self.name = origin, tuple(rounds), name
        self.d_in, self.dtype, self.chunk_rows = origin.d_in, origin.dtype, origin.chunk_rows
        self._statistics = {}

    def n_rows(self, split: str) -> int:
        return self.origin.n_rows(split)

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        return self.origin.stored_chunk(split, index)

    def derive(self, rows: torch.Tensor) -> torch.Tensor:
        rows = self.origin.derive(rows)
        with torch.no_grad():
            for number, apply_round in enumerate(self.rounds, start=1):
                name = f"{self.name}, round {number} of {len(self.rounds)} on the fly,"
                rows = to_stored_dtype(apply_round(rows.float()), self.dtype, name)
        return rows


def write_residual(
    path: Path,
    reader: ActivationReader,
    split: str = "train",
    *,
    name: str,
    report: Callable[[int, int], None] = lambda rows, total_rows: None,
) -> ActivationStatistics:
    """Store one split of `reader`, a ResidualView; reading the store gives the same bits as reading the view.

    A killed call is resumed after its last complete shard. Memory: one shard and one chunk.
    Raises SaeensError for too little free disk and for values outside the range of the dtype.
    """
    n_rows = reader.n_rows(split)
    with ActivationWriter(
        path, reader.d_in, reader.dtype, {split: n_rows}, name=name, with_origin=False, chunk_rows=reader.chunk_rows, resume=True
    ) as writer:
        done = writer.resumed_rows[split]
        for index in range(done // reader.chunk_rows, reader.n_chunks(split)):  # shards are whole chunks
            rows = reader.read_chunk(split, index)
            writer.append(split, rows)
            done += len(rows)
            report(done, n_rows)
    return writer.statistics[split]
