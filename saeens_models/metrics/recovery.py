"""Recovery: true features that a dictionary has, on activations whose features are known."""

from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.metrics.chance import isotropic_rows
from saeens_models.metrics.cosines import best_matches, unit_dictionaries

RECOVERY_THRESHOLD = 0.9
"""Least cosine of a dictionary row to a true feature that counts as found."""


class Recovery(NamedTuple):
    """True features found in a dictionary, and rows of the dictionary that are true features."""

    recovered_fraction: float
    """Share of true features with a dictionary row of cosine at least the threshold."""
    mean_max_cosine: float
    """Mean over true features of the largest cosine to a dictionary row."""
    precision: float
    """Share of dictionary rows with a true feature of cosine at least the threshold."""


def recovery(features: Tensor, W_dec: Tensor, threshold: float = RECOVERY_THRESHOLD) -> Recovery:
    """Return which true features a dictionary has. Cosines are signed, and a row may be the partner of several features.

    features: the true dictionary `[n_true_features, d_in]`; W_dec: `[n_rows, d_in]`. Recovery grows with the number of rows: compare at
    equal rows, see ``recovery_equal_rows``. Raises ValueError for empty dictionaries, and for rows that are zero or not finite.
    Source: Sharkey, Braun & Millidge 2022, Taking features out of superposition with sparse autoencoders (mean max cosine).
    """
    of_features, of_rows = best_matches(*unit_dictionaries([features, W_dec]))
    found, true = ((of >= threshold).double().mean().item() for of in (of_features, of_rows))
    return Recovery(found, of_features.double().mean().item(), true)


def recovery_equal_rows(
    features: Tensor, W_dec: Tensor, n_rows: int, *, draws: int = 10, seed: int = 0, threshold: float = RECOVERY_THRESHOLD
) -> Recovery:
    """Return the mean ``recovery`` of ``n_rows`` rows, drawn from W_dec without replacement. Raises ValueError for fewer rows."""
    if not 0 < n_rows <= len(W_dec):
        raise ValueError(f"n_rows must be between 1 and the {len(W_dec)} rows of the dictionary; got {n_rows}")
    if n_rows == len(W_dec):
        return recovery(features, W_dec, threshold)
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(W_dec), generator=generator)[:n_rows].to(W_dec.device) for _ in range(draws)]
    return _mean([recovery(features, W_dec[rows], threshold) for rows in drawn])


def recovery_by_chance(features: Tensor, n_rows: int, *, draws: int = 3, seed: int = 0, threshold: float = RECOVERY_THRESHOLD) -> Recovery:
    """Return the mean ``recovery`` of ``n_rows`` random directions, drawn uniformly."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [isotropic_rows(n_rows, features.shape[1], generator).to(features.device) for _ in range(draws)]
    return _mean([recovery(features, rows, threshold) for rows in drawn])


def _mean(found: list[Recovery]) -> Recovery:
    return Recovery(*(sum(values) / len(values) for values in zip(*found, strict=True)))
