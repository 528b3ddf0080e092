"""What a reconstruction costs the language model: its next-token loss with the activations replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

_ELEMENTS_PER_STEP = 2**24
"""Logits that are copied at a time."""

MIN_ABLATION_EFFECT = 0.05
"""Nats: where ablation changes the loss by less, what is recovered of it is noise."""


class NextTokenLoss(NamedTuple):
    """Cross-entropy of a language model over some predictions. Adds up over batches."""

    total: float
    """sum over the predictions, in nats"""
    predictions: int

    @property
    def mean(self) -> float:
        """Nats per prediction. Raises ValueError where nothing was predicted."""
        if not self.predictions:
            raise ValueError("no token was predicted: windows need at least two tokens")
        return self.total / self.predictions

    def plus(self, other: NextTokenLoss) -> NextTokenLoss:
        """Of both together."""
        return NextTokenLoss(self.total + other.total, self.predictions + other.predictions)


class LossBatch(NamedTuple):
    """Some windows of text in a language model: the activations at a hook, and what others in their place do to its loss."""

    x: Tensor
    """`[n, d_in]`: activations of the positions that are replaced"""
    loss: Callable[[Tensor], NextTokenLoss]
    """the language model's loss on these windows with rows `[n, d_in]` in the place of ``x``"""


def next_token_loss(logits: Tensor, tokens: Tensor, is_text: Tensor) -> NextTokenLoss:
    """Cross-entropy of logits `[b, L, vocabulary]` as predictions of the next of tokens `[b, L]`; summed in float64.

    Only text is predicted: ``is_text`` `[b, L]` is false for padding. The mean equals what transformers' models return for labels
    that are the tokens, and -100 for padding.
    """
    window, position = is_text[:, 1:].nonzero(as_tuple=True)
    step = max(1, _ELEMENTS_PER_STEP // logits.shape[-1])
    total = 0.0
    for at in zip(window.split(step), position.split(step), strict=True):
        losses = F.cross_entropy(logits[at].float(), tokens[:, 1:][at], reduction="none")
        total += losses.double().sum().item()
    return NextTokenLoss(total, len(window))


def ce_loss_recovered(clean: float, ablated: float, reconstructed: float) -> float | None:
    """``(ablated - reconstructed) / (ablated - clean)``: the share of the ablation's loss that a reconstruction recovers.

    All three are mean next-token losses in nats: with the activations as they are, with zeros in their place, and with the
    reconstruction. 1 is as good as the activations, 0 as bad as zeros. None where ``ablated`` and ``clean`` differ by less than
    ``MIN_ABLATION_EFFECT``.
    """
    effect = ablated - clean
    return (ablated - reconstructed) / effect if abs(effect) >= MIN_ABLATION_EFFECT else None
