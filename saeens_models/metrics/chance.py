"""Chance levels of stability, pw_mcc and shared fraction: those of dictionaries that have learned nothing.

A stability says something only beside the value that rows without any training reach, with as many rows and as many runs. Three kinds of
rows: isotropic random directions, random directions with the activations' covariance, and activations picked at random, centred.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.metrics.matching import match_features
from saeens_models.metrics.stability import stability

DRAWS = 3
_DRAWS_MATCHED_UP_TO = 1024
"""Features; larger dictionaries are matched in one draw: a mean over so many pairs has a small error, and takes seconds."""


class ChanceLevels(NamedTuple):
    """Means over draws of what independent dictionaries without training reach."""

    stability: float
    pw_mcc: float
    shared_fraction: float
    """Share of matched pairs with a signed cosine of at least the threshold. A random row is its own encoder."""


def chance_levels(draw: Callable[[], Sequence[Tensor]], *, match_up_to: int, threshold: float = 0.7) -> ChanceLevels:
    """Return the chance levels of dictionaries that ``draw`` returns: one `[n_features, d_in]` per run, independent in every call.

    Dictionaries of more than ``match_up_to`` features are not matched: pw_mcc and shared_fraction are nan.
    """
    stabilities, coefficients, shares = [], [], []
    for i in range(DRAWS):
        runs = draw()
        stabilities += stability(runs)
        if len(runs[0]) <= match_up_to and (i == 0 or len(runs[0]) <= _DRAWS_MATCHED_UP_TO):
            matching = match_features(runs[0], runs[1])
            coefficients.append(matching.mean_cosine)
            shares.append((matching.cosine >= threshold).double().mean().item())
    return ChanceLevels(*(sum(values) / len(values) if values else float("nan") for values in (stabilities, coefficients, shares)))


def isotropic_rows(n: int, d_in: int, generator: torch.Generator) -> Tensor:
    """Return n directions drawn uniformly: float32 `[n, d_in]`."""
    return torch.randn(n, d_in, generator=generator)


def rows_with_covariance(n: int, covariance: Tensor, generator: torch.Generator) -> Tensor:
    """Return n rows drawn from a normal distribution with mean zero and this covariance `[d_in, d_in]`: float32 `[n, d_in]`."""
    values, vectors = torch.linalg.eigh(covariance.double())
    factor = (vectors * values.clamp(min=0).sqrt()).float()
    return torch.randn(n, len(covariance), generator=generator) @ factor.T


def rows_of_disjoint_documents(documents: Tensor, n_runs: int, n: int, generator: torch.Generator) -> list[Tensor]:
    """Return, for each run, n positions drawn without replacement from documents of its own: int64 `[n]` each.

    documents: int64 `[n_rows]`, the document of each row. Documents are dealt to the runs at random, so that each has about as many rows.
    Raises ValueError if a run gets fewer than n rows.
    """
    _, of_row, sizes = documents.unique(return_inverse=True, return_counts=True)
    order = torch.randperm(len(sizes), generator=generator)
    middles = sizes[order].cumsum(0) - sizes[order] / 2
    run = torch.empty_like(order)
    run[order] = (middles * n_runs / len(documents)).long().clamp(max=n_runs - 1)
    runs = [torch.nonzero(run[of_row] == i).flatten() for i in range(n_runs)]
    smallest = min(len(rows) for rows in runs)
    if smallest < n:
        raise ValueError(
            f"{len(documents)} rows of {len(sizes)} documents, dealt to {n_runs} runs, leave one with {smallest} rows: {n} are needed"
        )
    return [rows[torch.randperm(len(rows), generator=generator)[:n]] for rows in runs]
