"""Activations that are computed from tokens and language model when they are read: `keep_activations: test`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from saeens_pipeline.language_models.caching import batch_tokens_on, kept_activations
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.tokens import TokenStore
from saeens_pipeline.storage.activation_writer import to_stored_dtype
from saeens_pipeline.storage.activations import ActivationStore
from saeens_pipeline.storage.rolling_cache import RollingCache

_SPLIT = "train"


class ActivationsOnDemand(ActivationStore):
    """A store without the bytes of its training rows, which are computed again in the groups of windows in which they were computed first.

    On the same machine and device they have the bits that the store would have. One group is computed at a time, on the thread that reads
    ahead, and kept in `cache` if there is room. Rows are best read in storage order: a chunk costs the forward pass of its group.
    Memory: the language model, and a group of `GROUP_TOKENS` positions.
    """

    def __init__(self, path: Path, tokens: TokenStore, model: LanguageModel, where: tuple[str, int], cache: RollingCache) -> None:
        """Open the store at `path`; `where` is hook and layer."""
        super().__init__(path)
        self._tokens, self._model, self._cache = tokens, model, cache
        self._hook, self._layer = where
        windows, self._firsts = self.groups(_SPLIT).T
        self._windows = [*windows.tolist(), tokens.statistics.train.windows]
        self._dropped = self.dropped(_SPLIT)
        self._rows = self._firsts - np.searchsorted(self._dropped, self._firsts)  # the first stored row of each group
        self._held: tuple[int, torch.Tensor] | None = None

    def stored_chunk(self, split: str, index: int) -> torch.Tensor:
        if self.has_bytes(split):
            return super().stored_chunk(split, index)
        first, pieces = index * self.chunk_rows, list[torch.Tensor]()
        end = min(first + self.chunk_rows, self.n_rows(split))
        while first < end:
            group = int(np.searchsorted(self._rows, first, side="right")) - 1  # the last one that starts here: others are empty
            start = first - int(self._rows[group])
            pieces.append(self._group(group)[start : start + end - first])
            first += len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _group(self, number: int) -> torch.Tensor:
        """Return the stored rows of a group, in the stored dtype."""
        if self._held is None or self._held[0] != number:
            kept = self._cache.get(str(number), lambda: self._compute(number).view(torch.uint8).numpy())
            self._held = number, torch.from_numpy(kept).view(getattr(torch, self.dtype))
        return self._held[1]

    @torch.no_grad()
    def _compute(self, number: int) -> torch.Tensor:
        windows = self._tokens.windows(_SPLIT, self._windows[number], self._windows[number + 1])
        batch_tokens = batch_tokens_on(self._model.model.device)
        rows = kept_activations(self._model, windows, self._hook, [self._layer], batch_tokens)[self._layer]
        first = int(self._firsts[number])
        stays = np.ones(len(rows), bool)
        begin, end = np.searchsorted(self._dropped, (first, first + len(rows)))
        stays[self._dropped[begin:end] - first] = False
        stored = rows[torch.from_numpy(stays).to(rows.device)]
        return to_stored_dtype(stored, self.dtype, f"{self._hook} of layer {self._layer}").cpu()
