"""Similarity of features within an ensemble, and nearest features.

A dictionary is ``W_dec`` `[n_features, d_in]`. Directions are compared: see ``cosines``. Averages are float64.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations, islice
from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.metrics.cosines import (
    best_matches,
    best_matches_within,
    best_of_pairs,
    cosine_blocks,
    of_prefix,
    pairs_of_runs,
    unit_dictionaries,
    unit_rows,
)


def max_cosine(W_dec: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return the largest cosine similarity of each row of W_dec `[n_features, d_in]` to any row of the others: float32 [n_features]."""
    if not others:
        raise ValueError("there is no other dictionary to compare with: max_cosine needs at least one")
    unit, *units = unit_dictionaries([W_dec, *others])
    return torch.stack([best_matches(unit, other)[0] for other in units]).amax(0)


def mean_max_cosine(W_dec: Tensor, others: Sequence[Tensor]) -> float:
    """Return the mean of ``max_cosine`` over the rows of W_dec (MMCS of Sharkey et al. 2022, against several dictionaries at once)."""
    return max_cosine(W_dec, others).double().mean().item()


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
    best = best_of_pairs(W_decs, combinations(range(len(W_decs)), 2))
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
    nearest = iter([found.nearest() for found in _matches_of_pairs([W_dec for run in runs for W_dec in run], pairs_of_runs(runs))])
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
    best = best_of_pairs(W_decs, combinations(range(len(W_decs)), 2))
    cosines = [of_member.amax(0).double().mean().item() for of_member in best] if len(best) > 1 else None
    for j, W_dec in enumerate(W_decs):
        best[j][j] = best_matches_within(unit_rows(W_dec))
    diverse = [int((of_prefix(best, n) < threshold).sum()) for n in range(1, len(best) + 1)]
    return MemberComparison(diverse, cosines)


def _matches_of_pairs(W_decs: Sequence[Tensor], pairs: Iterable[tuple[int, int]]) -> list[MemberMatches]:
    """Return, per dictionary, the nearest features in each dictionary; -1 and -inf if they are not paired."""
    units = unit_dictionaries(W_decs)
    cosines = [unit.new_full((len(units), len(unit)), -torch.inf) for unit in units]
    found = [MemberMatches(torch.full_like(cosine, -1, dtype=torch.int64), cosine) for cosine in cosines]
    for i, j in pairs:
        (found[i].row[j], found[i].cosine[j]), (found[j].row[i], found[j].cosine[i]) = _nearest_rows(units[i], units[j])
    return found


def _nearest_rows(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the rows of b nearest to the rows of a, with their cosines, and the rows of a nearest to the rows of b."""
    found = [(unit.new_full((len(unit),), -1, dtype=torch.int64), unit.new_full((len(unit),), -torch.inf)) for unit in (a, b)]
    for rows, columns, cosines in cosine_blocks(a, b):
        for (row, cosine), mine, theirs, dim in zip(found, (rows, columns), (columns, rows), (1, 0), strict=True):
            best = cosines.max(dim)
            is_nearer = best.values > cosine[mine]
            row[mine] = torch.where(is_nearer, best.indices + theirs.start, row[mine])
            cosine[mine] = torch.where(is_nearer, best.values, cosine[mine])
    return found
