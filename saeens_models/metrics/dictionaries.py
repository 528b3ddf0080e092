"""Similarity of dictionaries: stability between runs, diversity within a run, nearest features.

A dictionary is ``W_dec`` `[n_features, d_in]`. All functions compare directions: rows are scaled to unit norm first, and rows that are
zero or not finite raise ValueError. Cosines are float32, averages float64. Similarity matrices are computed in blocks and never kept as
a whole, except by ``stability_matched``.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, islice
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_BLOCK_ROWS = 1024
"""Rows and columns of a block of cosines: 4 MiB, so that their maxima are found while they are in a cache."""

MAX_MATCHED_FEATURES = 8192
"""Largest dictionary for ``stability_matched``: time grows with the cube of the size, memory (float64) with its square."""


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


def max_cosine(W_dec: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return the largest cosine similarity of each row of W_dec `[n_features, d_in]` to any row of the others: float32 [n_features]."""
    if not others:
        raise ValueError("there is no other dictionary to compare with: max_cosine needs at least one")
    unit, *units = _unit_dictionaries([W_dec, *others])
    return torch.stack([_best_matches(unit, other)[0] for other in units]).amax(0)


def mean_max_cosine(W_dec: Tensor, others: Sequence[Tensor]) -> float:
    """Return the mean of ``max_cosine`` over the rows of W_dec (MMCS of Sharkey et al. 2022, against several dictionaries at once)."""
    return max_cosine(W_dec, others).double().mean().item()


class Stability(NamedTuple):
    """Stability of each of several runs, in order."""

    stability: list[float]
    """Result of ``stability``."""
    pairwise: list[float]
    """Result of ``stability_pairwise``."""


def stability(W_decs: Sequence[Tensor]) -> list[float]:
    """Return the stability of each run: the mean over its features of ``max(0, largest cosine to any feature of any other run)``.

    W_decs: one dictionary `[n_features, d_in]` per run, at least two; sizes may differ. Stability grows with the number of runs, so
    report that number with it. Source: Gadgil, Lin & Lee, Ensembling Sparse Autoencoders (arXiv 2505.16077).
    """
    return stability_of_prefixes([[W_dec] for W_dec in W_decs])[0].stability


def stability_pairwise(W_decs: Sequence[Tensor]) -> list[float]:
    """Return ``stability`` against each other run alone, averaged over the other runs: it does not grow with the number of runs."""
    return stability_of_prefixes([[W_dec] for W_dec in W_decs])[0].pairwise


def stability_of_prefixes(runs: Sequence[Sequence[Tensor]]) -> list[Stability]:
    """Return ``stability`` and ``stability_pairwise`` of the ensembles of the first n members, for n = 1 .. J.

    runs: at least two, each the dictionaries of its J members in order. Two members are compared once for all sizes.
    Memory: J float32 numbers per feature and other run, and a block of cosines.
    """
    if len(runs) < 2:
        raise ValueError(f"stability compares runs and needs at least 2 dictionaries; got {len(runs)}")
    sizes = [len(run) for run in runs]
    if len(set(sizes)) > 1 or 0 in sizes:
        raise ValueError(f"runs must have equally many members, at least one; got {sizes}")
    best = _best_of_pairs([W_dec for run in runs for W_dec in run], _pairs_of_runs(runs))
    firsts = range(0, len(best), sizes[0])  # the first member of each run
    found = []
    for n in range(1, sizes[0] + 1):
        of_runs = [torch.stack([_of_prefix(best[a:], n, b) for b in firsts if b != a]) for a in firsts]
        found.append(Stability([_mean_cosine(cosines.amax(0)) for cosines in of_runs], [_mean_cosine(cosines) for cosines in of_runs]))
    return found


def stability_matched(W_decs: Sequence[Tensor]) -> list[float]:
    """Return the stability under one-to-one matching: per run, the mean cosine of matched features, averaged over the other runs.

    The matching of two runs minimises the summed Euclidean distance between unit rows (Hungarian algorithm). W_decs: at least two
    dictionaries of equal size `[n_features, d_in]`.

    Raises ValueError for sizes that differ or exceed ``MAX_MATCHED_FEATURES``.
    """
    sizes = [len(W_dec) for W_dec in W_decs]
    if len(set(sizes)) > 1:
        raise ValueError(f"one-to-one matching needs dictionaries of one size; got {sizes} features")
    if sizes and sizes[0] > MAX_MATCHED_FEATURES:
        raise ValueError(
            f"one-to-one matching takes up to {MAX_MATCHED_FEATURES} features; got {sizes[0]}: use stability or stability_pairwise instead"
        )
    if len(W_decs) < 2:
        raise ValueError(f"stability compares runs and needs at least 2 dictionaries; got {len(W_decs)}")
    units = _unit_dictionaries(W_decs)
    totals = [0.0] * len(units)
    for a, b in combinations(range(len(units)), 2):
        cosine = _mean_matched_cosine(units[a], units[b])
        totals[a] += cosine
        totals[b] += cosine
    return [total / (len(units) - 1) for total in totals]


def diversity(W_dec: Tensor, threshold: float = 0.7) -> int:
    """Return the number of features whose largest cosine similarity to any other feature of the dictionary is below the threshold.

    W_dec: `[n_features, d_in]`. A feature is not compared with itself; a single feature counts.
    """
    return compare_members([W_dec], threshold).diversity[0]


def new_features(W_decs: Sequence[Tensor], threshold: float = 0.7) -> list[int]:
    """Return the number of new features of each member of an ensemble, in order.

    A feature is new if its largest cosine to any feature of an earlier member is below the threshold; all features of the first member are
    new. W_decs: the members' dictionaries `[d_sae, d_in]`; sizes may differ. Similar features within one member all count.
    """
    best = _best_of_pairs(W_decs, combinations(range(len(W_decs)), 2))
    return [int((of_member[: j + 1].amax(0) < threshold).sum()) for j, of_member in enumerate(best)]


class NearestFeatures(NamedTuple):
    """The nearest feature among all other members, for each feature of one member."""

    member: Tensor
    """int64 [d_sae]: member of the nearest feature, from 0."""
    row: Tensor
    """int64 [d_sae]: row of the nearest feature in that member's dictionary."""
    cosine: Tensor
    """float32 [d_sae]: cosine similarity."""


class MemberMatches(NamedTuple):
    """The nearest feature in each of the J members of the ensemble, for each feature of one member."""

    row: Tensor
    """int64 [J, d_sae]: row of the nearest feature in that member's dictionary, the first of equals; -1 for the member itself."""
    cosine: Tensor
    """float32 [J, d_sae]: cosine similarity; -inf for the member itself."""

    def nearest(self) -> NearestFeatures:
        """Return the nearest feature among all members."""
        best = self.cosine.max(0)
        return NearestFeatures(best.indices, self.row.gather(0, best.indices[None])[0], best.values)


def matches_in_other_members(W_decs: Sequence[Tensor]) -> list[MemberMatches]:
    """Return, for each of at least two members, the nearest feature of each of its features in each other member.

    W_decs: the members' dictionaries `[d_sae, d_in]` in order. Two members are compared once. Memory: 12 J bytes per feature, a block
    of cosines, and the unit rows.
    """
    if len(W_decs) < 2:
        raise ValueError(f"there is no other member to compare with: got {len(W_decs)} dictionaries")
    return _matches_of_pairs(W_decs, combinations(range(len(W_decs)), 2))


class NearestInOtherRuns(NamedTuple):
    """The nearest feature among all other runs, for each feature of one run: members stacked, n_features in all."""

    run: Tensor
    """int64 [n_features]: run of the nearest feature, from 0."""
    member: Tensor
    """int64 [n_features]: member of that run, from 0."""
    row: Tensor
    """int64 [n_features]: row of the nearest feature in that member's dictionary."""
    cosine: Tensor
    """float32 [n_features]: cosine similarity. ``stability`` is its mean, with negative cosines as 0."""


def nearest_in_other_runs(runs: Sequence[Sequence[Tensor]]) -> list[NearestInOtherRuns]:
    """Return, for each of at least two runs, the nearest feature of each of its features in the other runs; the first of equals.

    runs: for each run the dictionaries of its members `[d_sae, d_in]` in order; sizes may differ. Two members are compared once. Memory: 12
    bytes per feature and member of any run, a block of cosines, and the unit rows.
    """
    if len(runs) < 2:
        raise ValueError(f"there is no other run to compare with: got {len(runs)} dictionaries")
    nearest = iter([found.nearest() for found in _matches_of_pairs([W_dec for run in runs for W_dec in run], _pairs_of_runs(runs))])
    columns = [[torch.cat(column) for column in zip(*islice(nearest, len(run)), strict=True)] for run in runs]
    origin = torch.tensor([(run, member) for run, members in enumerate(runs) for member in range(len(members))])
    run, member = origin.unbind(1)
    return [NearestInOtherRuns(run.to(which)[which], member.to(which)[which], row, cosine) for which, row, cosine in columns]


class MemberComparison(NamedTuple):
    """Similarity of the features of an ensemble's members."""

    diversity: list[int]
    """``diversity`` of the stacked dictionaries of the first n members, for n = 1 .. J."""
    mean_max_cosine: list[float] | None
    """``mean_max_cosine`` of each member to all others; None for an ensemble of one."""


def compare_members(W_decs: Sequence[Tensor], threshold: float = 0.7) -> MemberComparison:
    """Compute ``diversity`` at every size and ``mean_max_cosine`` of every member, comparing each two members once.

    W_decs: the members' dictionaries `[d_sae, d_in]` in order. Memory: J float32 numbers per feature, and a block of cosines.
    """
    best = _best_of_pairs(W_decs, combinations(range(len(W_decs)), 2))
    cosines = [of_member.amax(0).double().mean().item() for of_member in best] if len(best) > 1 else None
    for j, W_dec in enumerate(W_decs):
        best[j][j] = _best_matches_within(unit_rows(W_dec))
    diverse = [int((_of_prefix(best, n) < threshold).sum()) for n in range(1, len(best) + 1)]
    return MemberComparison(diverse, cosines)


def _unit_dictionaries(W_decs: Sequence[Tensor]) -> list[Tensor]:
    units = [unit_rows(W_dec) for W_dec in W_decs]
    widths = [unit.shape[1] for unit in units]
    if len(set(widths)) > 1:
        raise ValueError(f"dictionaries of different d_in cannot be compared; got {widths}")
    return units


def _pairs_of_runs(runs: Sequence[Sequence[Tensor]]) -> Iterator[tuple[int, int]]:
    """Yield the pairs of members of different runs. A member is a position in the concatenated list of all runs' members."""
    run_of = [run for run, members in enumerate(runs) for _ in members]
    return ((i, j) for i, j in combinations(range(len(run_of)), 2) if run_of[i] != run_of[j])


def _best_of_pairs(W_decs: Sequence[Tensor], pairs: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Return, per dictionary, the largest cosine of its features to those of each dictionary, `[J, n_features]`; -inf if not paired."""
    units = _unit_dictionaries(W_decs)
    best = [unit.new_full((len(units), len(unit)), -torch.inf) for unit in units]
    for i, j in pairs:
        best[i][j], best[j][i] = _best_matches(units[i], units[j])
    return best


def _matches_of_pairs(W_decs: Sequence[Tensor], pairs: Iterable[tuple[int, int]]) -> list[MemberMatches]:
    """Return, per dictionary, the nearest features in each dictionary; -1 and -inf if they are not paired."""
    units = _unit_dictionaries(W_decs)
    cosines = [unit.new_full((len(units), len(unit)), -torch.inf) for unit in units]
    found = [MemberMatches(torch.full_like(cosine, -1, dtype=torch.int64), cosine) for cosine in cosines]
    for i, j in pairs:
        (found[i].row[j], found[i].cosine[j]), (found[j].row[i], found[j].cosine[i]) = _nearest_rows(units[i], units[j])
    return found


def _of_prefix(best: Sequence[Tensor], n: int, first: int = 0) -> Tensor:
    """Return the largest cosines of the first n dictionaries' features to those of the n dictionaries from ``first`` on."""
    return torch.cat([of_member[first : first + n].amax(0) for of_member in best[:n]])


def _mean_cosine(cosines: Tensor) -> float:
    return cosines.clamp(min=0).double().mean().item()


def _best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest cosine of each row of a to any row of b, and of each row of b to any row of a."""
    of_a, of_b = a.new_full((len(a),), -torch.inf), b.new_full((len(b),), -torch.inf)
    for rows, columns, cosines in _cosine_blocks(a, b):
        of_a[rows] = torch.maximum(of_a[rows], cosines.amax(1))
        of_b[columns] = torch.maximum(of_b[columns], cosines.amax(0))
    return of_a, of_b


def _nearest_rows(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of b nearest to the rows of a, with their cosines, and the rows of a nearest to the rows of b."""
    found = [(unit.new_full((len(unit),), -1, dtype=torch.int64), unit.new_full((len(unit),), -torch.inf)) for unit in (a, b)]
    for rows, columns, cosines in _cosine_blocks(a, b):
        for (row, cosine), mine, theirs, dim in zip(found, (rows, columns), (columns, rows), (1, 0), strict=True):
            best = cosines.max(dim)
            is_nearer = best.values > cosine[mine]
            row[mine] = torch.where(is_nearer, best.indices + theirs.start, row[mine])
            cosine[mine] = torch.where(is_nearer, best.values, cosine[mine])
    return found


def _best_matches_within(a: Tensor) -> Tensor:
    """Return the largest cosine of each row of a to any other row; -inf for a single row."""
    best = a.new_full((len(a),), -torch.inf)
    for rows, columns, cosines in _cosine_blocks(a, a, upper_triangle=True):
        if rows == columns:
            cosines.fill_diagonal_(-torch.inf)
        best[rows] = torch.maximum(best[rows], cosines.amax(1))
        best[columns] = torch.maximum(best[columns], cosines.amax(0))
    return best


def _cosine_blocks(a: Tensor, b: Tensor, upper_triangle: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield the similarity matrix ``a @ b.T`` in square blocks, with their rows and columns. The next block overwrites a block."""
    buffer = a.new_empty(min(_BLOCK_ROWS, len(a)), min(_BLOCK_ROWS, len(b)))
    for i in range(0, len(a), _BLOCK_ROWS):
        for j in range(i if upper_triangle else 0, len(b), _BLOCK_ROWS):
            rows, columns = slice(i, min(i + _BLOCK_ROWS, len(a))), slice(j, min(j + _BLOCK_ROWS, len(b)))
            block = buffer[: rows.stop - i, : columns.stop - j]
            yield rows, columns, torch.mm(a[rows], b[columns].T, out=block)


def _mean_matched_cosine(a: Tensor, b: Tensor) -> float:
    cosines = (a.double() @ b.double().T).cpu()
    distance = (2 - 2 * cosines).clamp(min=0).sqrt()
    matched_a, matched_b = linear_sum_assignment(distance.numpy())
    return cosines[matched_a, matched_b].mean().item()
