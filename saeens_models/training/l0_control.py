"""The control of a sparsity coefficient towards a number of active features, for architectures without a term for it."""

from math import exp, log

import torch

ADJUSTED_FRACTION = 0.8
"""Share of the training in which the coefficient is adjusted; in the rest it stays."""
_SMOOTHED_STEPS = 0.02
_INTEGRAL = 15.0
_PROPORTIONAL = 0.5
_LARGEST_ERROR = 0.3


class L0Control:
    """Factor of the sparsity coefficient of one SAE: ``exp(integral + proportional * e)``.

    ``e`` is the logarithm of smoothed L0 over target, at most 0.3 in magnitude: L0 falls by itself at first, and a coefficient that
    overshoots kills features. The integral is 15 times that of ``e`` over the training.
    """

    def __init__(self, target: float, total_tokens: int) -> None:
        self._target, self._total_tokens = target, total_tokens
        self.state = torch.tensor([log(target), 0.0, 0.0], dtype=torch.float64)
        """Logarithm of the smoothed L0, integral, and logarithm of the factor; saved in checkpoints."""

    @property
    def factor(self) -> float:
        """Factor of the next step's coefficient."""
        return exp(float(self.state[2]))

    def update(self, l0: float, tokens: int, end: int) -> None:
        """Adjust the factor after a step of so many ``tokens``, with this L0, that ended at token ``end``."""
        if end > ADJUSTED_FRACTION * self._total_tokens:
            return
        smoothed, integral, _ = self.state.tolist()
        share = tokens / self._total_tokens
        smoothed += min(share / _SMOOTHED_STEPS, 1.0) * (log(max(l0, 1e-3)) - smoothed)
        error = min(max(smoothed - log(self._target), -_LARGEST_ERROR), _LARGEST_ERROR)
        integral += _INTEGRAL * share * error
        self.state[:] = torch.tensor([smoothed, integral, integral + _PROPORTIONAL * error])
