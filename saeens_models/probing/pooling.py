"""Pooled texts: means over the tokens of each text, of activations and of the codes of several dictionaries at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.sparse_code import SparseCode

RAW = "raw"
"""Name of the activations themselves, probed as if every dimension were a feature."""
DEFAULT_MEMORY_BUDGET = 2**31
_COLUMNS_AT_ONCE = 2**24
_ENCODER_BYTES = 2**24


class TextBatch(NamedTuple):
    """Activations of whole texts, text after text, without tokens that are not pooled."""

    x: Tensor
    """Activations `[n_tokens, d_in]`."""
    lengths: Tensor
    """int64 `[n_texts]`: number of tokens of each text, at least one."""


class TextBatches(Protocol):
    """All texts of a collection in a fixed order, in batches. A batch may be read more than once."""

    def __len__(self) -> int:
        """Return the number of batches."""
        ...

    def __getitem__(self, index: int) -> TextBatch:
        """Return a batch."""
        ...


class Dictionary(NamedTuple):
    """A set of features to probe: the first ``n_members`` members of an ensemble, or the activations themselves (``RAW``)."""

    name: str
    """Name of the ensemble, or ``RAW``."""
    n_members: int
    """Number of members."""
    columns: range
    """Columns of its features in pooled texts."""
    scale: float
    """Factor of unscaled codes in the ensemble's reconstruction: 1 / n_members for bagging, otherwise 1."""
    ensemble: Ensemble | None
    """The ensemble of these members; None for the activations, whose dictionary is the identity."""

    def decoded(self, w: Tensor) -> Tensor:
        """Return ``W_dec @ w`` `[n_features, n]`: the effect of each feature's direction on linear maps w `[d_in, n]`."""
        return w if self.ensemble is None else torch.cat([sae.W_dec.detach() @ w.to(sae.W_dec) for sae in self.ensemble])

    def directions(self, features: Tensor) -> Tensor:
        """Return the rows of the dictionary for features, int64 `[n]`: `[n, d_in]` on the CPU."""
        if self.ensemble is None:
            return torch.eye(len(self.columns))[features]
        offsets = torch.tensor(self.ensemble.offsets)
        member = torch.bucketize(features, offsets[1:], right=True)
        rows = torch.empty(len(features), self.ensemble.d_in)
        for j, sae in enumerate(self.ensemble):
            rows[member == j] = sae.W_dec.detach()[(features[member == j] - offsets[j]).to(sae.W_dec.device)].float().cpu()
        return rows


class PooledTexts:
    """The texts of a collection as means over their tokens, with all dictionaries in one pass over each batch.

    Iteration yields for each batch the number of its first text and a dense float32 tensor `[n_texts, n_columns]`. The columns are the
    unscaled features of each ensemble, in order, and then the d_in dimensions of the activations. Memory: one dense batch (see
    ``texts_at_once`` for its size), 16 MiB of pre-activations or those of 64 tokens, the activations' means of all texts, and up to
    ``memory_budget`` bytes of sparse pooled codes; codes beyond the budget are computed again in the next iteration.
    """

    def __init__(self, ensembles: Mapping[str, Ensemble], batches: TextBatches, memory_budget: int = DEFAULT_MEMORY_BUDGET) -> None:
        self._ensembles = list(ensembles.values())
        self._batches = batches
        self._room = memory_budget
        self._kept: dict[int, _Pooled] = {}
        self.dictionaries = _dictionaries(ensembles)
        self.n_columns = self.dictionaries[-1].columns.stop

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        first = 0
        for index in range(len(self._batches)):
            pooled = self._kept.get(index)
            if pooled is None:
                pooled = self._pool(self._batches[index])
                if pooled.n_bytes <= self._room:
                    self._kept[index] = pooled
                    self._room -= pooled.n_bytes
            yield first, pooled.dense()
            first += len(pooled.x)

    def means(self, groups: Sequence[Tensor]) -> Tensor:
        """Return the means over groups of texts, float64 `[n_groups, n_columns]` on the CPU; a group is int64 `[n]`, numbers of texts."""
        sums: Tensor | None = None
        for first, values in self:
            inside = torch.stack([_counts(group - first, len(values)) for group in groups]).to(values.device, torch.float64)
            of_batch = inside @ values.double()
            sums = of_batch if sums is None else sums + of_batch
        if sums is None:
            raise ValueError("there are no texts")
        return sums.cpu() / torch.tensor([[len(group)] for group in groups])

    def select(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Return pooled values, float32 `[n, m]` on the CPU, for each pair of text numbers int64 `[n]` and columns int64 `[m]`."""
        found = [torch.empty(len(texts), len(columns)) for texts, columns in wanted]
        for first, values in self:
            for result, (texts, columns) in zip(found, wanted, strict=True):
                here = ((texts >= first) & (texts < first + len(values))).nonzero().flatten()
                rows = values[(texts[here] - first).to(values.device)]
                result[here] = rows[:, columns.to(values.device)].cpu()
        return found

    @torch.no_grad()
    def _pool(self, batch: TextBatch) -> _Pooled:
        n_texts, device = len(batch.lengths), batch.x.device
        lengths = batch.lengths.to(device)
        text = torch.arange(n_texts, device=device).repeat_interleave(lengths)
        codes = []
        for ensemble in self._ensembles:
            sums = [torch.zeros(n_texts * sae.config.d_sae, device=device) for sae in ensemble]
            rows_at_once = max(64, _ENCODER_BYTES // (4 * max(sae.config.d_sae for sae in ensemble)))
            for rows, text_of_row in zip(batch.x.split(rows_at_once), text.split(rows_at_once), strict=True):
                for summed, prefix in zip(sums, ensemble.prefix_reconstructions(rows), strict=True):
                    place = text_of_row.repeat_interleave(prefix.code.start.diff()) * prefix.code.n_features + prefix.code.feature
                    summed.index_add_(0, place, prefix.code.value.float())
            codes += [summed.view(n_texts, -1) for summed in sums]
        code = SparseCode.from_dense(torch.cat(codes, dim=1) / lengths[:, None])
        x = torch.zeros(n_texts, batch.x.shape[1], device=device).index_add_(0, text, batch.x.float()) / lengths[:, None]
        return _Pooled(code, x)


def texts_at_once(ensembles: Mapping[str, Ensemble]) -> int:
    """Return the number of texts per batch, 4 to 64, so that a dense batch takes about 64 MiB."""
    return min(64, max(4, _COLUMNS_AT_ONCE // sum(ensemble.n_features for ensemble in ensembles.values())))


class _Pooled(NamedTuple):
    code: SparseCode
    x: Tensor

    @property
    def n_bytes(self) -> int:
        return sum(values.numel() * values.element_size() for values in (*self.code[1:], self.x))

    def dense(self) -> Tensor:
        values = self.x.new_zeros(len(self.x), self.code.n_features + self.x.shape[1])
        row = torch.arange(len(self.x), device=self.x.device).repeat_interleave(self.code.start.diff())
        values[row, self.code.feature] = self.code.value
        values[:, self.code.n_features :] = self.x
        return values


def _dictionaries(ensembles: Mapping[str, Ensemble]) -> list[Dictionary]:
    """Return the dictionaries of every size of every ensemble, and the activations last."""
    found: list[Dictionary] = []
    first = 0
    for name, ensemble in ensembles.items():
        prefixes = [ensemble[:n] for n in range(1, len(ensemble) + 1)]
        found += [
            Dictionary(name, len(prefix), range(first, first + prefix.n_features), prefix.member_weight, prefix) for prefix in prefixes
        ]
        first += ensemble.n_features
    d_in = next(iter(ensembles.values())).d_in
    return [*found, Dictionary(RAW, 1, range(first, first + d_in), 1.0, None)]


def _counts(texts: Tensor, n_texts: int) -> Tensor:
    """Count the occurrences of each number below n_texts."""
    return torch.bincount(texts[(texts >= 0) & (texts < n_texts)], minlength=n_texts)
