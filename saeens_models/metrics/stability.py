"""Stability: reproducibility of features between runs that differ in their seed.

A run is a dictionary ``W_dec`` `[n_features, d_in]`, or the dictionaries of an ensemble's members. Directions are compared. Averages are
float64.
"""

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
    best = best_of_pairs([W_dec for run in runs for W_dec in run], pairs_of_runs(runs))
    firsts = range(0, len(best), sizes[0])  # the first member of each run
    found = []
    for n in range(1, sizes[0] + 1):
        of_runs = [torch.stack([of_prefix(best[a:], n, b) for b in firsts if b != a]) for a in firsts]
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
