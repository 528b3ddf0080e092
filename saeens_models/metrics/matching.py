"""One-to-one matching of the features of two dictionaries, and the metrics that it gives: pw_mcc, shared fraction.

A dictionary is ``W_dec`` `[n_features, d_in]`. The matching maximises the sum of ``|cosine|``. Up to ``EXACT_UP_TO`` features it is
scipy's exact assignment. Above, it is the exact assignment on a graph of candidates: the nearest features of each feature. Its column
prices v prove how far it can be from the best matching: by duality, the best sum is at most
``sum_j v_j + sum_i max(0, max_j(|c_ij| - v_j))``, over all pairs. Pairs that violate the prices are added to the graph until the proof
is within ``TOLERANCE``.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from saeens_models.metrics.cosines import unit_dictionaries

EXACT_UP_TO = 1024
"""Features; the time of the exact assignment on all pairs grows with their cube."""
TOLERANCE = 1e-3
"""Mean ``|cosine|`` that the matching may lose compared with the best one before more candidates are added."""
_CANDIDATES = 16
_ADDED = 4
_MOST_PASSES = 6
_PANEL_ELEMENTS = 2**24
"""Elements of a panel of cosines: 64 MiB."""
_PAIRS = 2**16
"""Pairs whose cosines are computed at a time."""


class Matching(NamedTuple):
    """Pairs of features of two dictionaries: each feature of the smaller one, in order, has one partner of its own."""

    row_a: Tensor
    """int64 [m]: feature of the first dictionary; m is the size of the smaller dictionary."""
    row_b: Tensor
    """int64 [m]: its partner in the second dictionary."""
    cosine: Tensor
    """float32 [m]: signed cosine similarity."""
    bound: float
    """The mean ``|cosine|`` of the best matching is at most this. Equal to the mean of this one where it is exact."""

    @property
    def mean_cosine(self) -> float:
        """Mean ``|cosine|`` of the pairs: the MCC of arXiv 2505.20254."""
        return self.cosine.double().abs().mean().item()


def match_features(W_dec_a: Tensor, W_dec_b: Tensor) -> Matching:
    """Return the one-to-one matching of two dictionaries `[n_a, d_in]` and `[n_b, d_in]` that maximises the sum of ``|cosine|``.

    Exact up to ``EXACT_UP_TO`` features; above, see ``Matching.bound``. Memory above: 64 MiB of cosines, and about 1 kB per feature.
    Raises ValueError for different d_in, and for rows that are zero or not finite.
    """
    a, b = unit_dictionaries([W_dec_a, W_dec_b])
    if len(a) > len(b):
        row_b, row_a, cosine, bound = _match(b, a)
        order = row_a.argsort()
        return Matching(row_a[order], row_b[order], cosine[order], bound)
    return _match(a, b)


def pw_mcc(W_decs: Sequence[Tensor]) -> list[float]:
    """Return the pairwise dictionary mean correlation coefficient of each run: mean ``|cosine|`` of matched features, over other runs.

    W_decs: one dictionary `[n_features, d_in]` per run, at least two; sizes may differ. See ``match_features`` for large dictionaries. The
    mean over runs is the metric of Song et al., Position: Mechanistic Interpretability Should Prioritize Feature Consistency in SAEs
    (arXiv 2505.20254).
    """
    if len(W_decs) < 2:
        raise ValueError(f"pw_mcc compares runs and needs at least 2 dictionaries; got {len(W_decs)}")
    totals = [0.0] * len(W_decs)
    for i, j in combinations(range(len(W_decs)), 2):
        found = match_features(W_decs[i], W_decs[j]).mean_cosine
        totals[i] += found
        totals[j] += found
    return [total / (len(W_decs) - 1) for total in totals]


def shared_fraction(matching: Matching, W_enc_a: Tensor, W_enc_b: Tensor, threshold: float = 0.7) -> float:
    """Return the share of matched features that have a signed cosine of at least ``threshold`` in decoder and in encoder.

    matching: of the decoders. W_enc_a `[d_in, n_a]`, W_enc_b `[d_in, n_b]`: the encoders. Source: Paulo & Belrose, Sparse Autoencoders
    Trained on the Same Data Learn Different Features (arXiv 2501.16615), with the matching of the decoders.
    """
    columns = (W_enc_a.float()[:, matching.row_a], W_enc_b.float()[:, matching.row_b])
    encoder_cosine = torch.nn.functional.cosine_similarity(*columns, dim=0)
    return ((matching.cosine >= threshold) & (encoder_cosine >= threshold)).double().mean().item()


def _match(a: Tensor, b: Tensor) -> Matching:
    """Match unit rows a `[m, d_in]` with unit rows b `[n, d_in]`, m <= n."""
    if len(b) <= EXACT_UP_TO:
        cosines = (a @ b.T).cpu()
        return _matching(a, b, torch.from_numpy(linear_sum_assignment(cosines.abs().double().numpy(), maximize=True)[1]))
    graph = _Graph.of_nearest(a, b)
    for passes in range(1, _MOST_PASSES + 1):
        partner, prices = graph.assign()
        matching = _matching(a, b, torch.from_numpy(partner))
        gain, column = _largest_gains(a, b, torch.from_numpy(prices).to(a.device))
        bound = (prices.sum() + gain[:, 0].clip(0).sum()) / len(a)
        if bound - matching.mean_cosine <= TOLERANCE or passes == _MOST_PASSES:
            return matching._replace(bound=max(bound, matching.mean_cosine))
        of_partner = matching.cosine.abs().cpu().double().numpy() - prices[partner]
        row, place = np.nonzero(gain > of_partner[:, None] + 1e-6)
        graph = graph.with_pairs(a, b, row, column[row, place])
    raise AssertionError("the last pass returns")


def _matching(a: Tensor, b: Tensor, row_b: Tensor) -> Matching:
    """Return the matching of row i of a with row ``row_b[i]`` of b, with its own mean as the bound."""
    row_a, row_b = torch.arange(len(a), device=a.device), row_b.to(a.device)
    matching = Matching(row_a, row_b, _cosines(a, b, row_a, row_b), 0.0)
    return matching._replace(bound=matching.mean_cosine)


def _cosines(a: Tensor, b: Tensor, row_a: Tensor, row_b: Tensor) -> Tensor:
    """Return the cosines of pairs of unit rows."""
    pairs = zip(row_a.split(_PAIRS), row_b.split(_PAIRS), strict=True)
    return torch.cat([(a[i] * b[j]).sum(1) for i, j in pairs])


class _Graph(NamedTuple):
    """Candidate pairs of rows and columns, in order of row and column, each once, with their ``|cosine|``."""

    n_rows: int
    n_columns: int
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    weight: NDArray[np.float64]

    @classmethod
    def of_nearest(cls, a: Tensor, b: Tensor) -> "_Graph":
        """Return the graph of the nearest rows of each row, in both directions, and one pair per row so that a matching exists."""
        empty = cls(len(a), len(b), np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float64))
        every = np.arange(len(a))
        of_a, of_b = (_nearest(*each).cpu().numpy() for each in ((a, b), (b, a)))
        row = np.concatenate([every.repeat(of_a.shape[1]), of_b.flatten(), every])
        column = np.concatenate([of_a.flatten(), np.arange(len(b)).repeat(of_b.shape[1]), every])
        return empty.with_pairs(a, b, row, column)

    def with_pairs(self, a: Tensor, b: Tensor, row: NDArray[np.int64], column: NDArray[np.int64]) -> "_Graph":
        """Return the graph with more pairs."""
        key = np.unique(np.concatenate([self.row, row]) * self.n_columns + np.concatenate([self.column, column]))
        rows, columns = key // self.n_columns, key % self.n_columns
        cosines = _cosines(a, b, *(torch.from_numpy(each).to(a.device) for each in (rows, columns)))
        return self._replace(row=rows, column=columns, weight=cosines.abs().double().cpu().numpy())

    def assign(self) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return the partner of each row in the best assignment on the graph, and the least prices of the columns that prove it."""
        edges = csr_array((2.0 - self.weight, (self.row, self.column)), shape=(self.n_rows, self.n_columns))  # no weight of 0: no edge
        row, column = min_weight_full_bipartite_matching(edges)
        partner = np.empty(self.n_rows, np.int64)
        partner[row] = column
        of_partner = self.weight[
            np.searchsorted(self.row * self.n_columns + self.column, np.arange(self.n_rows) * self.n_columns + partner)
        ]
        # A column j costs at least what row i would gain by it: v_j >= w_ij - w_i,partner(i) + v_partner(i). Raised until this holds.
        by_column = np.argsort(self.column, kind="stable")
        gain, through = (self.weight - of_partner[self.row])[by_column], partner[self.row][by_column]
        columns, starts = np.unique(self.column[by_column], return_index=True)
        prices = np.zeros(self.n_columns)
        for _ in range(self.n_rows + 1):  # the longest path has this many edges
            raised = np.maximum(prices[columns], np.maximum.reduceat(gain + prices[through], starts))
            if np.max(raised - prices[columns]) < 1e-9:
                break
            prices[columns] = raised
        return partner, prices


def _panels(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Yield ``|a @ b.T|`` some rows at a time."""
    for rows in a.split(max(1, _PANEL_ELEMENTS // len(b))):
        yield (rows @ b.T).abs_()


def _nearest(a: Tensor, b: Tensor) -> Tensor:
    """Return the rows of b with the largest ``|cosine|`` to each row of a: int64 `[len(a), _CANDIDATES]`."""
    return torch.cat([panel.topk(min(_CANDIDATES, len(b)), 1, sorted=False).indices for panel in _panels(a, b)])


def _largest_gains(a: Tensor, b: Tensor, prices: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return, for each row of a, the largest ``|cosine| - price`` of columns, in falling order, and these columns."""
    found = [(panel - prices.float()).topk(min(_ADDED, len(b)), 1) for panel in _panels(a, b)]
    return torch.cat([each.values for each in found]).double().cpu().numpy(), torch.cat([each.indices for each in found]).cpu().numpy()
