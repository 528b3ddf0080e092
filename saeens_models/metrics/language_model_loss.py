"""Next-token loss of a language model whose activations are replaced by reconstructions."""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from saeens_models.metrics.paired_bootstrap import SumsByDocument

_ELEMENTS_PER_STEP = 2**24
"""Logits that are copied at a time."""

MIN_ABLATION_EFFECT = 0.05
"""Nats: if ablation changes the loss by less, the recovered share is noise."""


class NextTokenLoss(NamedTuple):
    """Summed cross-entropy of a language model over predictions; add batches with :meth:`plus`."""

    total: float
    """Sum over the predictions, in nats."""
    predictions: int
    """Number of predictions."""
    by_document: Tensor | None = None
    """float64 `[n_documents, 2]`: sum and number of the predictions in each document; None if they were not asked for."""

    @property
    def mean(self) -> float:
        """Nats per prediction. Raises ValueError without predictions."""
        if not self.predictions:
            raise ValueError("no token was predicted: windows need at least two tokens")
        return self.total / self.predictions

    def plus(self, other: Self) -> Self:
        """Return the loss over the predictions of both."""
        sums = [each.by_document for each in (self, other) if each.by_document is not None]
        return type(self)(self.total + other.total, self.predictions + other.predictions, sum(sums[1:], start=sums[0]) if sums else None)


class LossBatch(NamedTuple):
    """Activations of a language model at a hook on windows of text, and the loss as a function of their replacement."""

    x: Tensor
    """`[n, d_in]`: activations at the replaced positions."""
    loss: Callable[[Tensor], NextTokenLoss]
    """The language model's loss on these windows with rows `[n, d_in]` in place of ``x``."""


def next_token_loss(logits: Tensor, tokens: Tensor, is_text: Tensor, document: Tensor | None = None, n_documents: int = 0) -> NextTokenLoss:
    """Return the cross-entropy of logits `[b, L, vocabulary]` as predictions of the next token of tokens `[b, L]`, summed in float64.

    Only text is predicted: ``is_text`` `[b, L]` is false for padding. The mean equals the loss of transformers' models with the tokens
    as labels, and -100 for padding. ``document``, int64 `[b, L]`: the document of each token, 0 to ``n_documents`` - 1, for sums by the
    document of the predicted token.
    """
    window, position = is_text[:, 1:].nonzero(as_tuple=True)
    step = max(1, _ELEMENTS_PER_STEP // logits.shape[-1])
    total, by_document = 0.0, None if document is None else SumsByDocument(n_documents)
    for at in zip(window.split(step), position.split(step), strict=True):
        losses = F.cross_entropy(logits[at].float(), tokens[:, 1:][at], reduction="none").double()
        total += losses.sum().item()
        if by_document and document is not None:
            by_document.update(torch.stack([losses, torch.ones_like(losses)], 1), document[:, 1:][at])
    return NextTokenLoss(total, len(window), by_document.compute() if by_document and len(window) else None)


def ce_loss_recovered(clean: float, ablated: float, reconstructed: float) -> float | None:
    """Return ``(ablated - reconstructed) / (ablated - clean)``: the share of the loss from ablation that a reconstruction recovers.

    All three are mean next-token losses in nats: with the original activations, with zeros, and with the reconstruction. 1 is as good as
    the original activations, 0 as bad as zeros. None if ``ablated`` and ``clean`` differ by less than ``MIN_ABLATION_EFFECT``.
    """
    effect = ablated - clean
    return (ablated - reconstructed) / effect if abs(effect) >= MIN_ABLATION_EFFECT else None
