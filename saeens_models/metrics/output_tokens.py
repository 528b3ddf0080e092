"""Which next tokens each feature speaks for and against when its direction is read as an output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_LOGITS_PER_STEP = 2**24


class OutputTokens(NamedTuple):
    """Of every feature of a dictionary; a logit is what one unit of the feature adds to it."""

    promoted: Tensor
    """int64 [n_features, n]: the tokens with the largest logits, the largest first"""
    promoted_logits: Tensor
    """float32 [n_features, n]"""
    suppressed: Tensor
    """int64 [n_features, n]: the tokens with the smallest logits, the smallest first"""
    suppressed_logits: Tensor
    """float32 [n_features, n]"""


@torch.no_grad()
def output_tokens(W_dec: Tensor, W_U: Tensor, n: int) -> OutputTokens:
    """``W_dec @ W_U.T`` for a dictionary `[n_features, d_model]` and an unembedding `[vocabulary, d_model]`, without the final norm.

    The direct path alone (nostalgebraist 2020): what later layers make of the feature is not in it. Memory: 64 MiB of logits, or those
    of one feature, and the result. Raises ValueError for sizes that do not fit together.
    """
    if W_dec.ndim != 2 or W_U.ndim != 2 or W_dec.shape[1] != W_U.shape[1] or not 1 <= n <= len(W_U):
        raise ValueError(f"{n} of the tokens of an unembedding {list(W_U.shape)} cannot be told for a dictionary {list(W_dec.shape)}")
    parts = []
    for rows in W_dec.split(max(1, _LOGITS_PER_STEP // len(W_U))):
        logits = rows.float() @ W_U.float().T
        most, least = logits.topk(n), logits.topk(n, largest=False)
        parts.append((most.indices, most.values, least.indices, least.values))
    return OutputTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))
