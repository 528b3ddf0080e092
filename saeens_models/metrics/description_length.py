r"""Description length: how many bits per token it takes to send the code of a dictionary that the receiver has.

.. math:: \mathrm{bits} = \sum_i H(p_i) + \bar{L_0} \cdot H(q), \qquad q = \mathrm{round}(z_i \lVert W_{dec,i} \rVert / \Delta)

The first term says which features fire, each on its own: :math:`p_i` is the share of tokens on which feature i fires and H(p) the
entropy of a coin. The second sends, for each of the :math:`L_0` features that fire, its magnitude in steps of :math:`\Delta`: H(q) is the
entropy of q over all firings. Features are coded independently, as in Ayonrinde, Pearce & Sharkey, MDL-SAEs (arXiv 2410.11179). There
each feature has a code book of its own; here all share one. The shared entropy is never smaller than the mean of the features' own, and
those of features that fire on few tokens cannot be estimated: from n firings at most log2(n) bits are found, so that wide dictionaries
would look cheap for no other reason than that their features are rare.

z is the code as the members give it. An ensemble's weight 1/J scales all magnitudes alike and carries no information, but would bring
them closer to the step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode, sparse_codes

MAX_STEPS = 2**13
"""Magnitudes beyond so many steps are counted as this one: a bound on memory. At a precision of 1/256 it is 32 mean norms."""
_BINS = 2 * MAX_STEPS + 1
DEFAULT_PRECISION = 2**-8
"""Of magnitudes, as a share of the activations' mean norm. Rounding then moves a reconstruction by about sqrt(L0) / 900 of that norm."""


class DescriptionLengthMetric:
    """``description_length`` over a stream of batches of codes: ``update(z)`` for each, then ``compute()``.

    Keeps one count per feature, and per member a histogram of 16385 magnitudes, whatever the number of tokens.
    """

    def __init__(self, norms: Tensor | Sequence[Tensor], step: float) -> None:
        """``norms``: of the decoder's rows, `[n_features]`, of one dictionary or of each member's; ``step``: of magnitudes, in the
        activations' unit."""
        members = [norms] if isinstance(norms, Tensor) else list(norms)
        if not members or any(each.ndim != 1 or not len(each) for each in members):
            raise ValueError("norms must be [n_features] with n_features > 0, for each member")
        if not step > 0:
            raise ValueError(f"step must be positive; got {step}")
        self._widths = torch.tensor([len(each) for each in members])
        self._norms = torch.cat(members).detach()
        first_bins = torch.arange(len(members), device=self._norms.device) * _BINS
        self._zero = first_bins.repeat_interleave(self._widths.to(first_bins.device)) + MAX_STEPS  # where the bin of q = 0 is
        self._step = step
        self._tokens = 0
        self._fired = torch.zeros(len(self._norms), dtype=torch.int64, device=self._norms.device)
        self._magnitudes = torch.zeros(len(members) * _BINS, dtype=torch.int64, device=self._norms.device)

    @torch.no_grad()
    def update(self, z: Tensor | SparseCode) -> None:
        """Add a batch of unscaled codes z `[n, n_features]`, dense or sparse, the members' side by side."""
        check_code(z, len(self._norms))
        for code in sparse_codes(z):
            steps = (code.value * self._norms[code.feature] / self._step).round().clamp(-MAX_STEPS, MAX_STEPS).long()
            self._fired += torch.bincount(code.feature, minlength=len(self._fired))
            self._magnitudes += torch.bincount(self._zero[code.feature] + steps, minlength=len(self._magnitudes))
            self._tokens += code.n_tokens

    def compute(self) -> float:
        """Bits per token over all batches so far. Raises ValueError before the first token."""
        return self.compute_prefixes()[-1]

    def compute_prefixes(self) -> list[float]:
        """Bits per token of the code of the first n members, for n = 1 .. J."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: description length needs at least one")
        p = self._fired.double().cpu() / self._tokens
        which = torch.stack([part.sum() for part in (_bits(p) + _bits(1 - p)).split(self._widths.tolist())]).cumsum(0)
        magnitudes = self._magnitudes.double().cpu().view(-1, _BINS).cumsum(0)
        firings = magnitudes.sum(1)
        entropy = _bits(magnitudes / firings[:, None].clamp(min=1)).sum(1)
        return (which + firings / self._tokens * entropy).tolist()


def description_length(z: Tensor | SparseCode | Iterable[Tensor | SparseCode], W_dec: Tensor, step: float) -> float:
    """Bits per token to send codes z `[n, n_features]`, or an iterable of such batches, of a dictionary `[n_features, d_in]`.

    The module has the definition. z is the unscaled code (``ensemble.encode(x, scaled=False)``). ``step`` is the precision of
    magnitudes ``z_i * ||W_dec_i||``, in the unit of the activations: the same for everything that is to be compared, such as
    ``DEFAULT_PRECISION`` times their mean norm. Raises ValueError for no tokens, and for a code and a dictionary that do not fit.
    """
    metric = DescriptionLengthMetric(torch.linalg.vector_norm(W_dec, dim=1), step)
    for batch in [z] if isinstance(z, Tensor | SparseCode) else z:
        metric.update(batch)
    return metric.compute()


def _bits(p: Tensor) -> Tensor:
    """``-p * log2(p)``, and 0 where p is 0."""
    return -torch.special.xlogy(p, p) / math.log(2)
