"""The weights of an SAE, or their gradients, in the form that kernels take."""

from typing import NamedTuple

from torch import Tensor

from saeens_models.kernels.team import Team


class Weights(NamedTuple):
    """The weights of an SAE, or their gradients, in their order in memory: W_enc is transposed, `[d_sae, d_in]`."""

    W_enc: Tensor
    """`[d_sae, d_in]`: feature by feature."""
    b_enc: Tensor
    """`[d_sae]`"""
    W_dec: Tensor
    """`[d_sae, d_in]`"""
    b_dec: Tensor
    """`[d_in]`"""


class BatchLoss(NamedTuple):
    """Loss, gradients and reconstruction of a batch."""

    mse: Tensor
    """Scalar: squared error summed over d_in, mean over tokens."""
    second_term: Tensor
    """Scalar, with its coefficient: the sparsity term, or the auxiliary loss of the dead features."""
    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""
    fire_counts: Tensor
    """Number of tokens on which each feature is active, `[d_sae]`."""
    gradients: Weights
    """Gradients of the weights, in memory of the team."""


def gradients_of(team: Team, weights: Weights) -> Weights:
    """Return memory of the team for the gradients of all weights; its content is undefined, and the next call returns the same memory."""
    return Weights(*(team.scratch(f"gradients of {name}", *each.shape) for name, each in zip(Weights._fields, weights, strict=True)))
