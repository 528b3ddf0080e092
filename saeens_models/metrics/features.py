"""What each feature does on its own: how often it fires, how strongly, and on which tokens most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode, sparse_codes


class FeatureActivity(NamedTuple):
    """Every feature of a dictionary over a set of tokens."""

    density: Tensor
    """float64 [n_features]: share of the tokens on which each fires"""
    mean_activation: Tensor
    """float64 [n_features]: mean of the code over the tokens on which it fires; nan for a feature that never does"""
    top_tokens: Tensor
    """int64 [n_features, n_top]: tokens, counted from 0, on which it is most active, the most active first; -1 where it fires on fewer"""


class FeatureActivityMetric:
    """``FeatureActivity`` over a stream of batches of codes: ``update(z)`` for each, then ``compute()``.

    Keeps 16 + 12 ``n_top`` bytes per feature, whatever the number of tokens. Of tokens with equal activations the first is kept, so that
    how tokens are batched does not matter.
    """

    def __init__(self, n_features: int, n_top: int, device: torch.device | str = "cpu") -> None:
        if min(n_features, n_top) < 1:
            raise ValueError(f"n_features and n_top must be at least 1; got {n_features} and {n_top}")
        self._tokens = 0
        self._counts = torch.zeros(n_features, dtype=torch.int64, device=device)
        self._sums = torch.zeros(n_features, dtype=torch.float64, device=device)
        self._top_values = torch.full((n_features, n_top), -torch.inf, device=device)
        self._top_tokens = torch.full((n_features, n_top), -1, device=device)

    @torch.no_grad()
    def update(self, z: Tensor | SparseCode) -> None:
        """Add a batch of codes z `[n, n_features]`, dense or sparse."""
        n_features = len(self._counts)
        check_code(z, n_features)
        for code in sparse_codes(z):
            self._counts += torch.bincount(code.feature, minlength=n_features)
            self._sums += torch.bincount(code.feature, code.value.double(), minlength=n_features)
            self._update_top(code)
            self._tokens += code.n_tokens

    def compute(self) -> FeatureActivity:
        """The activity over all batches so far. Raises ValueError before the first token."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: feature activity needs at least one")
        return FeatureActivity(self._counts.double() / self._tokens, self._sums / self._counts, self._top_tokens)

    def _update_top(self, code: SparseCode) -> None:
        n_top = self._top_values.shape[1]
        entries = (code.value > self._top_values[code.feature, -1]).nonzero().flatten()
        if not len(entries):
            return
        value, feature = code.value[entries].float(), code.feature[entries]
        token = torch.arange(code.n_tokens, device=value.device).repeat_interleave(code.start.diff())[entries] + self._tokens
        features, entry, owner, rank = most_active(feature, value, n_top)
        new_values = self._top_values.new_full((len(features), n_top), -torch.inf).index_put_((owner, rank), value[entry])
        new_tokens = self._top_tokens.new_full((len(features), n_top), -1).index_put_((owner, rank), token[entry])
        merged = torch.cat([self._top_values[features], new_values], dim=1).sort(dim=1, descending=True, stable=True)
        self._top_values[features] = merged.values[:, :n_top]
        self._top_tokens[features] = torch.cat([self._top_tokens[features], new_tokens], dim=1).gather(1, merged.indices[:, :n_top])


class MostActive(NamedTuple):
    """The largest entries of each feature among some entries of a code."""

    features: Tensor
    """int64 [m]: those that have any, ascending"""
    entry: Tensor
    """int64 [e]: the entries that are among the largest of their feature"""
    owner: Tensor
    """int64 [e]: whose each is, as an index into ``features``"""
    rank: Tensor
    """int64 [e]: its place among those of its feature, the largest first; of equal entries the first"""


def most_active(feature: Tensor, value: Tensor, n_top: int) -> MostActive:
    """The ``n_top`` largest entries of each feature, of entries with these features and values `[n]`."""
    order = value.argsort(descending=True, stable=True)
    order = order[feature[order].argsort(stable=True)]  # feature by feature, the most active token of each first
    features, owner, counts = torch.unique_consecutive(feature[order], return_inverse=True, return_counts=True)
    rank = torch.arange(len(order), device=value.device) - (counts.cumsum(0) - counts)[owner]
    return MostActive(features, *(each[rank < n_top] for each in (order, owner, rank)))
