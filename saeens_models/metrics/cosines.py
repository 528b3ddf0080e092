"""Cosine similarities of the rows of dictionaries, in blocks.

A dictionary is ``W_dec`` `[n_features, d_in]`. Rows are scaled to unit norm, and rows that are zero or not finite raise ValueError.
Cosines are float32. A similarity matrix is computed in blocks and never kept as a whole.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

BLOCK_ROWS = 1024
"""Rows and columns of a block of cosines: 4 MiB, so that their maxima are found while they are in a cache."""


def unit_rows(W_dec: Tensor) -> Tensor:
    """Return the rows of W_dec `[n_features, d_in]` as float32 unit vectors.

    Raises ValueError for another number of dimensions and for rows that are zero or not finite.
    """
    if W_dec.ndim != 2 or 0 in W_dec.shape:
        raise ValueError(f"a dictionary must be [n_features, d_in], both positive; got {list(W_dec.shape)}")
    rows = W_dec.detach().float()
    norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    without_direction = torch.nonzero(~(torch.isfinite(norms) & (norms > 0)).flatten()).flatten()
    if len(without_direction):
        raise ValueError(
            f"{len(without_direction)} of {len(rows)} dictionary rows are zero or not finite and have no direction, the first is row "
            f"{int(without_direction[0])}: leave these features out before comparing directions"
        )
    return rows / norms


def unit_dictionaries(W_decs: Sequence[Tensor]) -> list[Tensor]:
    units = [unit_rows(W_dec) for W_dec in W_decs]
    widths = [unit.shape[1] for unit in units]
    if len(set(widths)) > 1:
        raise ValueError(f"dictionaries of different d_in cannot be compared; got {widths}")
    return units


def pairs_of_runs(runs: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of members of different runs. A member is a position in the concatenated list of all runs' members."""
    run_of = [run for run, members in enumerate(runs) for _ in members]
    return ((i, j) for i, j in combinations(range(len(run_of)), 2) if run_of[i] != run_of[j])


def best_of_pairs(W_decs: Sequence[Tensor], pairs: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Return, per dictionary, the largest cosine of its features to those of each dictionary, `[J, n_features]`; -inf if not paired."""
    units = unit_dictionaries(W_decs)
    best = [unit.new_full((len(units), len(unit)), -torch.inf) for unit in units]
    for i, j in pairs:
        best[i][j], best[j][i] = best_matches(units[i], units[j])
    return best


def of_prefix(best: Sequence[Tensor], n: int, first: int = 0) -> Tensor:
    """Return the largest cosines of the first n dictionaries' features to those of the n dictionaries from ``first`` on."""
    return torch.cat([of_member[first : first + n].amax(0) for of_member in best[:n]])


def best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each row of a to any row of b, and of each row of b to any row of a."""
    of_a, of_b = a.new_full((len(a),), -torch.inf), b.new_full((len(b),), -torch.inf)
    for rows, columns, cosines in cosine_blocks(a, b):
        of_a[rows] = torch.maximum(of_a[rows], cosines.amax(1))
        of_b[columns] = torch.maximum(of_b[columns], cosines.amax(0))
    return of_a, of_b


def best_matches_within(a: Tensor) -> Tensor:
    """Return the largest cosine of each row of a to any other row; -inf for a single row."""
    best = a.new_full((len(a),), -torch.inf)
    for rows, columns, cosines in cosine_blocks(a, a, upper_triangle=True):
        if rows == columns:
            cosines.fill_diagonal_(-torch.inf)
        best[rows] = torch.maximum(best[rows], cosines.amax(1))
        best[columns] = torch.maximum(best[columns], cosines.amax(0))
    return best


def cosine_blocks(a: Tensor, b: Tensor, upper_triangle: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the similarity matrix ``a @ b.T`` in square blocks, with their rows and columns. The next block overwrites a block."""
    buffer = a.new_empty(min(BLOCK_ROWS, len(a)), min(BLOCK_ROWS, len(b)))
    for i in range(0, len(a), BLOCK_ROWS):
        for j in range(i if upper_triangle else 0, len(b), BLOCK_ROWS):
            rows, columns = slice(i, min(i + BLOCK_ROWS, len(a))), slice(j, min(j + BLOCK_ROWS, len(b)))
            block = buffer[: rows.stop - i, : columns.stop - j]
            yield rows, columns, torch.mm(a[rows], b[columns].T, out=block)
