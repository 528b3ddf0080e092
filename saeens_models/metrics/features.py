"""Activity of each feature: density, mean activation, and its most active tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode, sparse_codes


class FeatureActivity(NamedTuple):
    """Activity of every feature of a dictionary over a set of tokens."""

    density: Tensor
    """float64 [n_features]: share of the tokens on which the feature fires."""
    mean_activation: Tensor
    """float64 [n_features]: mean activation over the tokens on which the feature fires; nan if it never fires."""
    top_tokens: Tensor
    """int64 [n_features, n_top]: tokens, counted from 0, with the largest activations, largest first; -1 if it fires on fewer tokens."""


class FeatureActivityMetric:
    """Streaming metric for ``FeatureActivity``: ``update(z)`` for each batch of codes, then ``compute()``.

    Keeps 16 + 12 ``n_top`` bytes per feature for any number of tokens. Of tokens with equal activations the first is kept, so that the
    result does not depend on the batches.
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
        """Return the activity over all batches. Raises ValueError before the first token."""
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
        best = most_active(feature, value, n_top)
        best.merge_into([self._top_values, self._top_tokens], [value[best.entry], token[best.entry]])


class MostActive(NamedTuple):
    """The largest entries of each feature among some entries of a code."""

    features: Tensor
    """int64 [m]: features with at least one entry, ascending."""
    entry: Tensor
    """int64 [e]: entries that are among the largest of their feature."""
    owner: Tensor
    """int64 [e]: feature of each entry, as an index into ``features``."""
    rank: Tensor
    """int64 [e]: rank of each entry within its feature, the largest first; of equal entries the first."""

    def merge_into(self, tops: Sequence[Tensor], entries: Sequence[Tensor]) -> None:
        """Merge these entries into earlier ones, in place.

        ``tops`` `[n_features, n_top, ...]` and ``entries`` `[e, ...]`: first the values, -inf if a feature has fewer than n_top, then other
        fields of the same entries.
        """
        both = []
        for top, of_entries in zip(tops, entries, strict=True):
            earlier = top[self.features]
            later = torch.full_like(earlier, -torch.inf) if top is tops[0] else torch.zeros_like(earlier)
            both.append(torch.cat([earlier, later.index_put_((self.owner, self.rank), of_entries)], dim=1))
        kept = both[0].argsort(dim=1, descending=True, stable=True)[:, : tops[0].shape[1]]
        for top, merged in zip(tops, both, strict=True):
            top[self.features] = merged[torch.arange(len(merged), device=kept.device)[:, None], kept]


def most_active(feature: Tensor, value: Tensor, n_top: int) -> MostActive:
    """Return the ``n_top`` largest entries of each feature, among entries with the given features and values `[n]`."""
    order = value.argsort(descending=True, stable=True)
    order = order[feature[order].argsort(stable=True)]  # sorted by feature, the largest entry of each first
    features, owner, counts = torch.unique_consecutive(feature[order], return_inverse=True, return_counts=True)
    rank = torch.arange(len(order), device=value.device) - (counts.cumsum(0) - counts)[owner]
    return MostActive(features, *(each[rank < n_top] for each in (order, owner, rank)))
