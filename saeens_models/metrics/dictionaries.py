"""How alike dictionaries are: stability between runs, diversity within one.

A dictionary is ``W_dec`` `[n_features, d_in]`. Everything here compares directions: rows are scaled to unit norm first, and a row
that is zero or not finite is refused, since it has none. Cosines are float32, averages float64; similarity matrices are worked
out in blocks and never held whole, except by ``stability_matched``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

import torch
from torch import Tensor

_COSINES_PER_BLOCK = 2**24

MAX_MATCHED_FEATURES = 8192
"""Largest dictionary that ``stability_matched`` takes: time grows with the cube of the size, memory (float64) with its square."""


def unit_rows(W_dec: Tensor) -> Tensor:
    """The rows of W_dec `[n_features, d_in]` as float32 unit vectors.

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
    """For each row of W_dec `[n_features, d_in]`, its largest cosine similarity to any row of any of the others: float32 [n_features]."""
    if not others:
        raise ValueError("there is no other dictionary to compare with: max_cosine needs at least one")
    units = _unit_dictionaries([W_dec, *others])
    return torch.stack([_best_matches(units[0], other)[0] for other in units[1:]]).amax(0)


def mean_max_cosine(W_dec: Tensor, others: Sequence[Tensor]) -> float:
    """Mean over the rows of W_dec of ``max_cosine`` (MMCS of Sharkey et al. 2022, against several dictionaries at once)."""
    return max_cosine(W_dec, others).double().mean().item()


def stability(W_decs: Sequence[Tensor]) -> list[float]:
    """Stability of each run: the mean over its features of ``max(0, largest cosine to any feature of any other run)``.

    W_decs: one dictionary `[n_features, d_in]` per run, at least two; sizes may differ. It grows with the number of runs, so
    report that number beside it. Source: Gadgil, Lin & Lee, Ensembling Sparse Autoencoders (arXiv 2505.16077).
    """
    best = _best_matches_of_runs(W_decs)
    return [torch.stack(list(of_run.values())).amax(0).clamp(min=0).double().mean().item() for of_run in best]


def stability_pairwise(W_decs: Sequence[Tensor]) -> list[float]:
    """As ``stability``, with each other run taken alone and the results averaged: does not grow with the number of runs."""
    best = _best_matches_of_runs(W_decs)
    return [torch.stack(list(of_run.values())).clamp(min=0).double().mean().item() for of_run in best]


def stability_matched(W_decs: Sequence[Tensor]) -> list[float]:
    """Stability under one-to-one matching: per run, the mean cosine of matched features, averaged over the other runs.

    Each pair of runs is matched so that the summed Euclidean distance between unit rows is least (Hungarian
    algorithm). W_decs: at least two dictionaries of equal size `[n_features, d_in]`.

    Raises ValueError for sizes that differ or exceed ``MAX_MATCHED_FEATURES``.
    """
    sizes = [len(W_dec) for W_dec in W_decs]
    if len(set(sizes)) > 1:
        raise ValueError(f"one-to-one matching needs dictionaries of one size; got {sizes} features")
    if sizes and sizes[0] > MAX_MATCHED_FEATURES:
        raise ValueError(
            f"one-to-one matching takes up to {MAX_MATCHED_FEATURES} features; got {sizes[0]}: use stability or stability_pairwise instead"
        )
    units = _unit_dictionaries(W_decs, at_least=2)
    totals = [0.0] * len(units)
    for a, b in combinations(range(len(units)), 2):
        cosine = _mean_matched_cosine(units[a], units[b])
        totals[a] += cosine
        totals[b] += cosine
    return [total / (len(units) - 1) for total in totals]


def diversity(W_dec: Tensor, threshold: float = 0.7) -> int:
    """Number of features whose largest cosine similarity to any other feature of the same dictionary is below the threshold.

    W_dec: `[n_features, d_in]`; only the feature itself is left out of the comparison. A lone feature is diverse.
    """
    unit = unit_rows(W_dec)
    count = 0
    for rows, cosines in _cosine_blocks(unit, unit):
        cosines.diagonal(offset=rows.start).fill_(-torch.inf)
        count += int((cosines.amax(1) < threshold).sum())
    return count


def _unit_dictionaries(W_decs: Sequence[Tensor], at_least: int = 1) -> list[Tensor]:
    if len(W_decs) < at_least:
        raise ValueError(f"stability compares runs and needs at least {at_least} dictionaries; got {len(W_decs)}")
    units = [unit_rows(W_dec) for W_dec in W_decs]
    widths = [unit.shape[1] for unit in units]
    if len(set(widths)) > 1:
        raise ValueError(f"dictionaries of different d_in cannot be compared; got {widths}")
    return units


def _best_matches_of_runs(W_decs: Sequence[Tensor]) -> list[dict[int, Tensor]]:
    """For each run, by other run: the largest cosine of each feature of the first to any feature of the second."""
    units = _unit_dictionaries(W_decs, at_least=2)
    best: list[dict[int, Tensor]] = [{} for _ in units]
    for a, b in combinations(range(len(units)), 2):
        best[a][b], best[b][a] = _best_matches(units[a], units[b])
    return best


def _best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Largest cosine of each row of a to any row of b, and of each row of b to any row of a."""
    of_a = a.new_empty(len(a))
    of_b = b.new_full((len(b),), -torch.inf)
    for rows, cosines in _cosine_blocks(a, b):
        of_a[rows] = cosines.amax(1)
        of_b = torch.maximum(of_b, cosines.amax(0))
    return of_a, of_b


def _cosine_blocks(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The similarity matrix ``a @ b.T``, some rows of a at a time."""
    step = max(1, _COSINES_PER_BLOCK // len(b))
    for first in range(0, len(a), step):
        rows = slice(first, min(first + step, len(a)))
        yield rows, a[rows] @ b.T


def _mean_matched_cosine(a: Tensor, b: Tensor) -> float:
    from scipy.optimize import linear_sum_assignment

    cosines = (a.double() @ b.double().T).cpu()
    distance = (2 - 2 * cosines).clamp(min=0).sqrt()
    matched_a, matched_b = linear_sum_assignment(distance.numpy())
    return cosines[matched_a, matched_b].mean().item()
