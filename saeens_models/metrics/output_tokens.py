"""Next tokens that each feature promotes and suppresses through the unembedding."""

from typing import NamedTuple

import torch
from torch import Tensor

_LOGITS_PER_STEP = 2**24


class OutputTokens(NamedTuple):
    """Promoted and suppressed tokens of every feature of a dictionary. Logits are contributions of one unit of the feature."""

    promoted: Tensor
    """int64 [n_features, n]: tokens with the largest logits, largest first."""
    promoted_logits: Tensor
    """float32 [n_features, n]: their logits."""
    suppressed: Tensor
    """int64 [n_features, n]: tokens with the smallest logits, smallest first."""
    suppressed_logits: Tensor
    """float32 [n_features, n]: their logits."""


@torch.no_grad()
def output_tokens(W_dec: Tensor, W_U: Tensor, n: int) -> OutputTokens:
    """Return the n largest and smallest entries per row of ``W_dec @ W_U.T``, without the final norm.

    W_dec: a dictionary `[n_features, d_model]`; W_U: an unembedding `[vocabulary, d_model]`. This is the direct path (logit lens,
    nostalgebraist 2020), without the effect through later layers. Memory: 64 MiB of logits, or those of one feature, and the result.

    Raises ValueError for sizes that do not fit together.
    """
    if W_dec.ndim != 2 or W_U.ndim != 2 or W_dec.shape[1] != W_U.shape[1] or not 1 <= n <= len(W_U):
        raise ValueError(
            f"{n} output tokens need a dictionary and an unembedding of one width and at least {n} tokens; got {list(W_dec.shape)} and "
            f"{list(W_U.shape)}"
        )
    parts = []
    for rows in W_dec.split(max(1, _LOGITS_PER_STEP // len(W_U))):
        logits = rows.float() @ W_U.float().T
        most, least = logits.topk(n), logits.topk(n, largest=False)
        parts.append((most.indices, most.values, least.indices, least.values))
    return OutputTokens(*(torch.cat(column) for column in zip(*parts, strict=True)))
