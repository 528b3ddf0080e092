r"""Description length: bits per token to send the code of a dictionary that the receiver knows.

.. math:: \mathrm{bits} = \sum_i H(p_i) + \bar{L_0} \cdot H(q), \qquad q = \mathrm{round}(z_i \lVert W_{dec,i} \rVert / \Delta)

The first term sends the set of active features, each feature independently: :math:`p_i` is the share of tokens on which feature i fires,
and H(p) the entropy of a biased coin. The second term sends the magnitudes of the :math:`L_0` active features in steps of
:math:`\Delta`: H(q) is the entropy of q over all firings. Features are coded independently, as in Ayonrinde, Pearce & Sharkey, MDL-SAEs
(arXiv 2410.11179). There each feature has its own code book; here all features share one. The shared entropy is never smaller than the
mean of the features' own entropies, and those of rare features cannot be estimated: n firings give at most log2(n) bits, so that wide
dictionaries would look cheap only because their features are rare.

z is the unscaled code. An ensemble's weight 1/J scales all magnitudes alike and carries no information, but would bring them closer to the
step.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from saeens_models.metrics.sparsity import check_code
from saeens_models.sparse_code import SparseCode, sparse_codes

MAX_STEPS = 2**13
"""Magnitudes are clipped to so many steps, which bounds memory: 32 mean norms at a precision of 1/256."""
_BINS = 2 * MAX_STEPS + 1
DEFAULT_PRECISION = 2**-8
"""Step of magnitudes relative to the activations' mean norm. Rounding moves a reconstruction by about sqrt(L0) / 900 of that norm."""


class DescriptionLengthMetric:
    """Streaming metric for ``description_length``: ``update(z)`` for each batch of codes, then ``compute()``.

    ``norms``: norms of the decoder rows, `[n_features]`, of one dictionary or of each member's. ``step``: step of magnitudes, in the
    activations' unit. Keeps one count per feature, and a histogram of 16385 magnitudes per member, for any number of tokens.
    """

    def __init__(self, norms: Tensor | Sequence[Tensor], step: float) -> None:
        members = [norms] if isinstance(norms, Tensor) else list(norms)
        if not members or any(each.ndim != 1 or not len(each) for each in members):
            raise ValueError("norms must be [n_features] with n_features > 0, for each member")
        if not step > 0:
            raise ValueError(f"step must be positive; got {step}")
        self._widths = torch.tensor([len(each) for each in members])
        self._norms = torch.cat(members).detach()
        first_bins = torch.arange(len(members), device=self._norms.device) * _BINS
        self._zero = first_bins.repeat_interleave(self._widths.to(first_bins.device)) + MAX_STEPS  # the bin of q = 0
        self._step = step
        self._tokens = 0
        self._fired = torch.zeros(len(self._norms), dtype=torch.int64, device=self._norms.device)
        self._magnitudes = torch.zeros(len(members) * _BINS, dtype=torch.int64, device=self._norms.device)

    @torch.no_grad()
    def update(self, z: Tensor | SparseCode) -> None:
        """Add a batch of unscaled codes z `[n, n_features]`, dense or sparse, with the members' codes side by side."""
        check_code(z, len(self._norms))
        for code in sparse_codes(z):
            steps = (code.value * self._norms[code.feature] / self._step).round().clamp(-MAX_STEPS, MAX_STEPS).long()
            self._fired += torch.bincount(code.feature, minlength=len(self._fired))
            self._magnitudes += torch.bincount(self._zero[code.feature] + steps, minlength=len(self._magnitudes))
            self._tokens += code.n_tokens

    def compute(self) -> float:
        """Return the bits per token over all batches. Raises ValueError before the first token."""
        return self.compute_prefixes()[-1]

    def compute_prefixes(self) -> list[float]:
        """Return the bits per token of the code of the first n members, for n = 1 .. J. Raises ValueError before the first token."""
        if self._tokens == 0:
            raise ValueError("no tokens were seen: description length needs at least one")
        p = self._fired.double().cpu() / self._tokens
        which = torch.stack([part.sum() for part in (_bits(p) + _bits(1 - p)).split(self._widths.tolist())]).cumsum(0)
        magnitudes = self._magnitudes.double().cpu().view(-1, _BINS).cumsum(0)
        firings = magnitudes.sum(1)
        entropy = _bits(magnitudes / firings[:, None].clamp(min=1)).sum(1)
        return (which + firings / self._tokens * entropy).tolist()


def description_length(z: Tensor | SparseCode | Iterable[Tensor | SparseCode], W_dec: Tensor, step: float) -> float:
    r"""Return the bits per token to send codes z `[n, n_features]`, or an iterable of such batches.

    .. math:: \sum_i H(p_i) + \bar{L_0} \cdot H(q), \qquad q = \mathrm{round}(z_i \lVert W_{dec,i} \rVert / \Delta)

    with the entropies H of the activity of each feature and of the magnitudes q (MDL-SAEs, arXiv 2410.11179). W_dec is the dictionary
    `[n_features, d_in]`, z the unscaled code (``ensemble.encode(x, scaled=False)``). ``step`` is :math:`\Delta`, in the unit of the
    activations: use the same for all codes to be compared, such as ``DEFAULT_PRECISION`` times the activations' mean norm.

    Raises ValueError for no tokens, and for a code and a dictionary that do not fit.
    """
    metric = DescriptionLengthMetric(torch.linalg.vector_norm(W_dec, dim=1), step)
    for batch in [z] if isinstance(z, Tensor | SparseCode) else z:
        metric.update(batch)
    return metric.compute()


def _bits(p: Tensor) -> Tensor:
    """Return ``-p * log2(p)``, and 0 for p = 0."""
    return -torch.special.xlogy(p, p) / math.log(2)
