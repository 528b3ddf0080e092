"""Contexts of each feature: the places in a text where it is most active, and a histogram of its activations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from saeens_models.metrics.features import most_active
from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode, sparse_codes

_BITS = 5
HISTOGRAM_BINS = 2**_BITS
"""With a power of two as their width, at least half of the bins are in use."""
_NEVER = -(2**30)  # the exponent of a feature that has not fired


class FeatureContexts(NamedTuple):
    """Contexts of every feature of a dictionary: the places of a windowed text on which the feature is most active."""

    place: Tensor
    """int64 [n_features, n_contexts]: places of the largest activations, largest first; -1 if the feature fires in fewer windows."""
    activations: Tensor
    """float32 [n_features, n_contexts, 2 * radius + 1]: activations from ``radius`` places before to ``radius`` after; 0 outside the
    window, and at places without a code."""
    histogram: Tensor
    """int64 [n_features, HISTOGRAM_BINS]: tokens with an activation in [i, i + 1) times ``bin_width``; zeros are not counted."""
    bin_width: Tensor
    """float64 [n_features]: the smallest power of two with which the bins cover all activations; 0 for a feature that never fires."""


class FeatureContextsMetric:
    """Streaming metric for ``FeatureContexts``: ``update(z, place)`` for each batch of codes, then ``compute()``.

    A token's place counts all positions of the text, also positions without a code. A window is ``window`` places, the first of which is a
    multiple of ``window``. A feature has at most one context per window, around its maximum there (the first of equal ones), so that a
    feature that fires on every token does not show one sentence many times.

    Memory: ``n_contexts * (12 + 4 * (2 * radius + 1)) + 8 * HISTOGRAM_BINS + 8`` bytes per feature for any number of tokens, and the code
    of the incomplete window. The result does not depend on the batches.
    """

    def __init__(self, n_features: int, window: int, n_contexts: int, radius: int, device: torch.device | str = "cpu") -> None:
        if min(n_features, window, n_contexts) < 1 or radius < 0:
            sizes = f"{n_features}, {window}, {n_contexts}, {radius}"
            raise ValueError(f"n_features, window and n_contexts must be at least 1, radius at least 0; got {sizes}")
        self._window, self._radius = window, radius
        self._top_values = torch.full((n_features, n_contexts), -torch.inf, device=device)
        self._top_places = torch.full((n_features, n_contexts), -1, device=device)
        self._top_contexts = torch.zeros(n_features, n_contexts, 2 * radius + 1, device=device)
        self._histogram = torch.zeros(n_features, HISTOGRAM_BINS, dtype=torch.int64, device=device)
        self._exponents = torch.full((n_features,), _NEVER, dtype=torch.int64, device=device)  # activations are below 2 ** this
        none = torch.empty(0, dtype=torch.int64, device=device)
        self._waiting = _Text(SparseCode(n_features, none.new_zeros(1), none, torch.empty(0, device=device)), none)
        self._last_place = -1

    @torch.no_grad()
    def update(self, z: Tensor | SparseCode, place: Tensor) -> None:
        """Add a batch of codes z >= 0 `[n, n_features]`, dense or sparse, of tokens at ``place`` `[n]`, which ascend over all batches."""
        check_code(z, len(self._exponents))
        ascending = torch.cat([place.new_tensor([self._last_place]), place]).diff() > 0
        if place.shape != z.shape[:1] or not ascending.all():
            raise ValueError(f"place must be [{z.shape[0]}] and ascend over all batches; got {list(place.shape)}")
        if not len(place):
            return
        self._last_place = int(place[-1])
        first, place = 0, place.to(self._exponents)
        for code in sparse_codes(z):
            text = self._waiting.followed_by(_Text(code, place[first : first + code.n_tokens]))
            first += code.n_tokens
            complete = int(torch.searchsorted(text.place, text.place[-1:] // self._window * self._window))
            self._take(text.part(0, complete))
            self._waiting = text.part(complete, len(text.place))

    @torch.no_grad()
    def compute(self) -> FeatureContexts:
        """Return the contexts over all batches; the last batch ends the text. Raises ValueError before the first token."""
        if self._last_place < 0:
            raise ValueError("no tokens were seen: contexts need at least one")
        self._take(self._waiting)
        self._waiting = self._waiting.part(0, 0)
        width = torch.ldexp(torch.ones_like(self._exponents, dtype=torch.float64), self._exponents - _BITS)
        return FeatureContexts(
            self._top_places, self._top_contexts, self._histogram, width.where(self._exponents > _NEVER, torch.zeros_like(width))
        )

    def _take(self, text: _Text) -> None:
        """Add complete windows to the histogram and the contexts."""
        if not len(text.code.feature):
            return
        token = torch.arange(text.code.n_tokens, device=text.place.device).repeat_interleave(text.code.start.diff())
        order = (text.code.feature * text.code.n_tokens + token).argsort()  # sorted by feature, then by token
        entries = _Entries(text.place, token[order], text.code.feature[order], text.code.value[order].float())
        self._count(entries.feature, entries.value)
        self._update_top(entries)

    def _count(self, feature: Tensor, value: Tensor) -> None:
        exponents = self._exponents.scatter_reduce(0, feature, value.frexp().exponent.long(), "amax")  # value < 2 ** exponent
        grown = (exponents > self._exponents).nonzero().flatten()
        shift = (exponents - self._exponents)[grown].clamp(max=_BITS)  # a shift by _BITS moves all counts into the first bin
        bins = torch.arange(HISTOGRAM_BINS, device=value.device).expand(len(grown), -1)
        wider = torch.zeros_like(self._histogram[grown]).scatter_add_(1, bins >> shift[:, None], self._histogram[grown])
        self._histogram[grown], self._exponents = wider, exponents
        place = torch.ldexp(value.double(), _BITS - exponents[feature]).long()
        self._histogram.view(-1).index_add_(0, feature * HISTOGRAM_BINS + place, torch.ones_like(place))

    def _update_top(self, entries: _Entries) -> None:
        window = entries.place[entries.token] // self._window
        of_window = entries.feature * (window.max() + 1) + window
        best = most_active(of_window, entries.value, 1).entry  # one per feature and window
        best = best[entries.value[best] > self._top_values[entries.feature[best], -1]]
        if not len(best):
            return
        most = most_active(entries.feature[best], entries.value[best], self._top_values.shape[1])
        best = best[most.entry]
        found = entries.value[best], entries.place[entries.token[best]], entries.around(best, self._radius, self._window)
        most.merge_into([self._top_values, self._top_places, self._top_contexts], found)


class _Text(NamedTuple):
    """Codes of tokens, and their places."""

    code: SparseCode
    place: Tensor

    def followed_by(self, other: _Text) -> _Text:
        code, after = self.code, other.code
        start = torch.cat([code.start, after.start[1:] + code.start[-1]])
        feature, value = torch.cat([code.feature, after.feature]), torch.cat([code.value, after.value.to(code.value)])
        return _Text(SparseCode(code.n_features, start, feature, value), torch.cat([self.place, other.place]))

    def part(self, first: int, end: int) -> _Text:
        """Return the tokens ``first`` to ``end - 1``, as views."""
        return _Text(self.code.part(first, end), self.place[first:end])


class _Entries(NamedTuple):
    """Entries of a code, sorted by feature, then by token."""

    place: Tensor
    """int64 [n_tokens]: places of all tokens."""
    token: Tensor
    """int64 [e]: position of each entry's token in ``place``."""
    feature: Tensor
    """int64 [e]: feature of each entry."""
    value: Tensor
    """float32 [e]: value of each entry."""

    def around(self, chosen: Tensor, radius: int, window: int) -> Tensor:
        """Return activations of the ``chosen`` entries' features `[m]` around them in the same window, `[m, 2 * radius + 1]`."""
        centre = self.place[self.token[chosen]]
        places = centre[:, None] + torch.arange(-radius, radius + 1, device=centre.device)
        token = torch.searchsorted(self.place, places).clamp(max=len(self.place) - 1)
        is_there = (self.place[token] == places) & (places // window == centre[:, None] // window)
        wanted = self.feature[chosen][:, None] * len(self.place) + token
        keys = self.feature * len(self.place) + self.token
        entry = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return self.value[entry].where(is_there & (keys[entry] == wanted), torch.zeros_like(self.value[:1]))
