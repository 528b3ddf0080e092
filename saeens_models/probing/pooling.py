"""Texts as means over their tokens: of the activations, and of the codes of several dictionaries at once."""

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
    """The activations of some whole texts, text after text, at the tokens that count."""

    x: Tensor
    """`[n_tokens, d_in]`"""
    lengths: Tensor
    """int64 `[n_texts]`: tokens of each text, at least one"""


class TextBatches(Protocol):
    """All texts of a collection in a fixed order, a batch at a time. A batch may be asked for more than once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> TextBatch: ...


class Dictionary(NamedTuple):
    """What is probed: the first ``n_members`` members of an ensemble, or the activations themselves (``RAW``)."""

    name: str
    n_members: int
    columns: range
    """where its features lie among the columns of pooled texts"""
    scale: float
    """what its unscaled codes are multiplied by in the ensemble's reconstruction: 1 / n_members for bagging, otherwise 1"""
    ensemble: Ensemble | None
    """None for the activations, whose dictionary is the identity"""

    def decoded(self, w: Tensor) -> Tensor:
        """``W_dec @ w``: what each feature's direction adds to linear maps w `[d_in, n]`; `[n_features, n]`."""
        return w if self.ensemble is None else torch.cat([sae.W_dec.detach() @ w.to(sae.W_dec) for sae in self.ensemble])

    def directions(self, features: Tensor) -> Tensor:
        """The rows of the dictionary for some of its features, int64 `[n]`; `[n, d_in]` on the CPU."""
        if self.ensemble is None:
            return torch.eye(len(self.columns))[features]
        offsets = torch.tensor(self.ensemble.offsets)
        member = torch.bucketize(features, offsets[1:], right=True)
        rows = torch.empty(len(features), self.ensemble.d_in)
        for j, sae in enumerate(self.ensemble):
            rows[member == j] = sae.W_dec.detach()[(features[member == j] - offsets[j]).to(sae.W_dec.device)].float().cpu()
        return rows


class PooledTexts:
    """The texts of a collection as means over their tokens, all dictionaries in one pass over each batch.

    Iterating gives, batch after batch, the number of the first text and a dense float32 tensor `[n_texts, n_columns]`. Its columns are the
    unscaled features of each ensemble, in order, and then the d_in dimensions of the activations. Memory: a batch so made (ask for batches
    of ``texts_at_once``), 16 MiB of pre-activations or those of 64 tokens, the activations' means of all texts, and up to
    ``memory_budget`` bytes of pooled codes without their zeros; what does not fit into that is computed again by the next iteration.
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
        """Means over groups of texts, each int64 `[n]` of their numbers: float64 `[n_groups, n_columns]` on the CPU."""
        sums: Tensor | None = None
        for first, values in self:
            inside = torch.stack([_counts(group - first, len(values)) for group in groups]).to(values.device, torch.float64)
            of_batch = inside @ values.double()
            sums = of_batch if sums is None else sums + of_batch
        if sums is None:
            raise ValueError("there are no texts")
        return sums.cpu() / torch.tensor([[len(group)] for group in groups])

    def select(self, wanted: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Some columns of some texts: for each pair of texts int64 `[n]` and columns int64 `[m]`, float32 `[n, m]` on the CPU."""
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
    """How many texts a batch should have: so many that it is dense in 64 MiB, 4 to 64."""
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
    """Every size of every ensemble, and the activations last."""
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
    """How often each number below n_texts occurs."""
    return torch.bincount(texts[(texts >= 0) & (texts < n_texts)], minlength=n_texts)
