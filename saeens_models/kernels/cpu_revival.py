"""The auxiliary loss on the CPU where each token takes a good part of the dead features: matrix products with a dense code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from saeens_models.kernels.team import Team

if TYPE_CHECKING:
    from saeens_models.kernels.cpu import Weights

_RANGE_FEATURES = 128


class DenseRevival:
    """The code of the dead features ``dead`` (indices), which decodes the error ``x_hat - x`` of `n` tokens, and its gradients.

    A token's code is its `k` largest pre-activations among the features, of either sign. ``scale`` is the gradient of the loss by
    ``error / 2``. Memory: two codes `[n, n_dead]`, one error, and twice the weights of the features.
    """

    def __init__(self, team: Team, weights: Weights, dead: Tensor, *, k: int, n_tokens: int, scale: float) -> None:
        self._team, self._dead, self._k, self._scale = team, dead, k, scale
        n_dead, d_in = len(dead), weights.W_enc.shape[1]

        def rows_of(name: str, weight: Tensor) -> Tensor:
            return torch.index_select(weight, 0, dead, out=team.scratch(f"{name} of dead", n_dead, *weight.shape[1:]))

        self._W_enc, self._b_enc, self._W_dec = (rows_of(name, getattr(weights, name)) for name in ("W_enc", "b_enc", "W_dec"))
        self._z, self._of_pre = (team.scratch(f"{name} of dead", n_tokens, n_dead) for name in ("z", "gradient of pre"))
        self._error = team.scratch("error of dead", n_tokens, d_in)
        self._of_W_enc, self._of_W_dec = (team.scratch(f"gradient of {name} of dead", n_dead, d_in) for name in ("W_enc", "W_dec"))
        self._of_b_enc = team.scratch("gradient of b_enc of dead", n_dead)
        self.ranges = [slice(first, min(first + _RANGE_FEATURES, n_dead)) for first in range(0, n_dead, _RANGE_FEATURES)]
        """Features whose gradients are computed at once. They do not depend on the threads."""

    def forward(self, rows: slice, x: Tensor, error: Tensor) -> float:
        """The squared error that remains of the tokens ``rows``; x is the encoder's input, both `[n, d_in]`."""
        from saeens_models.kernels import compiled

        z, of_pre, remaining = self._z[rows], self._of_pre[rows], self._error[rows]
        indices = self._team.scratch("indices of dead", len(z), self._k, dtype=torch.int32).numpy()
        values = self._team.scratch("values of dead", len(z), self._k).numpy()
        all_taken = self._k == len(self._dead)
        torch.mm(x, self._W_enc.t(), out=z)
        if all_taken:
            z.add_(self._b_enc)
        else:
            compiled.select_topk(z.numpy(), self._b_enc.numpy(), self._k, indices, values)
            compiled.spread(indices, values, z.numpy())
        torch.addmm(error, z, self._W_dec, out=remaining)
        torch.mm(remaining, self._W_dec.t(), out=of_pre).mul_(self._scale)
        if not all_taken:
            compiled.gather(indices, of_pre.numpy(), values)
            compiled.spread(indices, values, of_pre.numpy())
        return compiled.squares(remaining.numpy())

    def backward(self, features: slice, x: Tensor) -> None:
        """The gradients of a range of features, after ``forward`` of all tokens; x is the encoder's input `[n, d_in]`."""
        of_pre, z = self._of_pre[:, features], self._z[:, features]
        torch.mm(of_pre.t(), x, out=self._of_W_enc[features])
        torch.sum(of_pre, dim=0, out=self._of_b_enc[features])
        torch.mm(z.t(), self._error, out=self._of_W_dec[features]).mul_(self._scale)

    def add_to(self, gradients: Weights) -> None:
        """Add the gradients to those of all features."""
        from saeens_models.kernels import compiled

        dead, d_in = self._dead.numpy(), self._error.shape[1]
        W_enc, b_enc, W_dec = (gradient.numpy() for gradient in gradients[:3])
        of_W_enc, of_b_enc, of_W_dec = (own.numpy() for own in (self._of_W_enc, self._of_b_enc, self._of_W_dec))

        def add(i: int) -> None:
            features = self.ranges[i]
            compiled.add_rows(dead[features], of_W_enc[features], of_b_enc[features], of_W_dec[features], W_enc, b_enc, W_dec)

        self._team.run(add, len(self.ranges), work=4 * len(dead) * d_in)
