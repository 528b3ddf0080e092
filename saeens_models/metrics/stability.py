"""Stability: reproducibility of features between runs that differ in their seed.

A run is a dictionary ``W_dec`` `[n_features, d_in]`, or the dictionaries of an ensemble's members. Directions are compared. Averages are
float64.
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from saeens_models.metrics.cosines import best_of_pairs, of_prefix, pairs_of_runs, unit_dictionaries

MAX_MATCHED_FEATURES = 8192
"""Largest dictionary for ``stability_matched``: time grows with the cube of the size, memory (float64) with its square."""


class Stability(NamedTuple):
    """Stability of each of several runs, in order, for ensembles of the first n members."""

    stability: list[float]
    """Result of ``stability``."""
    pairwise: list[float]
    """Result of ``stability_pairwise``."""
    reference: list[float]
    """Stability of the run's first member alone against the first n members of the other runs: nothing is ensembled on its side, and it has
    as many candidates. Its mean over the members of a run of n is that run's ``stability``."""
    of_last_member: list[float]
    """Stability of the run's n-th member alone against the n-th members of the other runs."""
    pairs: list[list[float]]
    """`[R, R]`: stability of each run against each other run alone, of which ``pairwise`` is the mean; nan on the diagonal."""


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
    best = best_of_pairs([W_dec for run in runs for W_dec in run], pairs_of_runs(runs))
    firsts = range(0, len(best), sizes[0])  # the first member of each run

    def against(a: int, first: int, n: int) -> list[Tensor]:
        """Return the largest cosines of the features of dictionary ``a`` to those of n members of each other run, from ``first`` on."""
        return [best[a][b + first : b + first + n].amax(0) for b in firsts if not b <= a < b + sizes[0]]

    found = []
    for n in range(1, sizes[0] + 1):
        of_runs = [torch.stack([of_prefix(best[a:], n, b) for b in firsts if b != a]) for a in firsts]
        found.append(
            Stability(
                stability=[_mean_cosine(cosines.amax(0)) for cosines in of_runs],
                pairwise=[_mean_cosine(cosines) for cosines in of_runs],
                reference=[_mean_cosine(torch.stack(against(a, 0, n)).amax(0)) for a in firsts],
                of_last_member=[_mean_cosine(torch.stack(against(a + n - 1, n - 1, 1)).amax(0)) for a in firsts],
                pairs=[[math.nan if b == a else _mean_cosine(of_prefix(best[a:], n, b)) for b in firsts] for a in firsts],
            )
        )
    return found


def stability_equal_candidates(W_decs: Sequence[Tensor], n_candidates: int, draws: int = 10, seed: int = 0) -> list[float]:
    """Return the mean ``stability`` of each run when every dictionary has ``n_candidates`` features, drawn without replacement.

    Stability grows with the number of features among which a partner is searched: an ensemble of n has n times as many. Here every
    dictionary has as many, on both sides. W_decs: one dictionary `[n_features, d_in]` per run. Raises ValueError for fewer features.
    """
    smallest = min((len(W_dec) for W_dec in W_decs), default=0)
    if not 0 < n_candidates <= smallest:
        raise ValueError(f"n_candidates must be between 1 and the {smallest} features of the smallest dictionary; got {n_candidates}")
    if all(len(W_dec) == n_candidates for W_dec in W_decs):
        return stability(W_decs)
    generator = torch.Generator().manual_seed(seed)
    totals = torch.zeros(len(W_decs), dtype=torch.float64)
    for _ in range(draws):
        rows = [torch.randperm(len(W_dec), generator=generator)[:n_candidates].to(W_dec.device) for W_dec in W_decs]
        totals += torch.tensor(stability([W_dec[drawn] for W_dec, drawn in zip(W_decs, rows, strict=True)]), dtype=torch.float64)
    return (totals / draws).tolist()


class FeatureStability(NamedTuple):
    """Counts of the other runs in which each feature of one run is found."""

    n_found: Tensor
    """int64 [n_features]: number of other runs with a feature of cosine at least the threshold."""
    best_cosine: Tensor
    """float32 [n_features]: largest cosine to any feature of any other run."""


def feature_stability(W_decs: Sequence[Tensor], threshold: float = 0.7) -> list[FeatureStability]:
    """Return, for each of at least two runs, in how many of the others each of its features is found.

    W_decs: one dictionary `[n_features, d_in]` per run. Memory: one float32 number per feature and run, and a block of cosines.
    """
    if len(W_decs) < 2:
        raise ValueError(f"stability compares runs and needs at least 2 dictionaries; got {len(W_decs)}")
    best = best_of_pairs(W_decs, combinations(range(len(W_decs)), 2))  # -inf for the run itself
    return [FeatureStability((of_run >= threshold).sum(0), of_run.amax(0)) for of_run in best]


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
    units = unit_dictionaries(W_decs)
    totals = [0.0] * len(units)
    for a, b in combinations(range(len(units)), 2):
        cosine = _mean_matched_cosine(units[a], units[b])
        totals[a] += cosine
        totals[b] += cosine
    return [total / (len(units) - 1) for total in totals]


def _mean_cosine(cosines: Tensor) -> float:
    return cosines.clamp(min=0).double().mean().item()


def _mean_matched_cosine(a: Tensor, b: Tensor) -> float:
    cosines = (a.double() @ b.double().T).cpu()
    distance = (2 - 2 * cosines).clamp(min=0).sqrt()
    matched_a, matched_b = linear_sum_assignment(distance.numpy())
    return cosines[matched_a, matched_b].mean().item()
