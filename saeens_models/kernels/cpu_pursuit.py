"""Matching pursuit on the CPU: the inner products of all atoms once, then token by token, on a team of threads.

When an atom is chosen, the residual's correlations with the atoms, ``c = W_dec r``, change by ``-value * (W_dec W_dec^T)[atom]``: one row
instead of a matrix product. The inner products are rounded to int16, which halves the memory to read. Atoms whose order the rounding
leaves open are compared in float32, so that the choice follows the definition.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels.team import Team

MOST_ATOMS = 2**14
"""Largest number of atoms whose inner products are kept, in ``2 * MOST_ATOMS ** 2`` bytes: 512 MiB."""
_BLOCK_TOKENS = 128
_GRAM_ROWS = 256
_MOST_SUMS = 4
"""Number of partial sums of gradients, each of the size of W_dec and computed by one thread."""


class Limits(NamedTuple):
    """When the pursuit of a token ends, as in the configuration of a matching pursuit SAE."""

    max_iterations: int
    residual_threshold: float
    stop_on_duplicate_support: bool


class Gram(NamedTuple):
    """The inner products of atoms, rounded."""

    products: np.ndarray
    """int16 `[d_sae, m]`, m the next multiple of the kernel's width; ``products * scale`` is the inner product."""
    scale: np.float32
    """Step of the rounding."""
    rounding: np.float32
    """Largest error of an inner product."""


class Pursuit(NamedTuple):
    """Matching pursuit of a batch: choices and residual."""

    indices: Tensor
    """int32 `[n, max_iterations]`: the atoms in the order of choice, an atom perhaps twice; -1 after the last choice."""
    values: Tensor
    """`[n, max_iterations]`: the values of the choices; 0 after the last choice."""
    residual: Tensor
    """Last residual `[n, d_in]`."""


class PursuitGradients(NamedTuple):
    """Loss of a batch, its gradients and its pursuit."""

    mse: Tensor
    """Scalar: squared residual summed over d_in, mean over tokens."""
    pursuit: Pursuit
    """Choices and residual of the batch."""
    W_dec: Tensor
    """Gradient of W_dec `[d_sae, d_in]`."""
    centre: Tensor
    """Gradient of the vector subtracted from every token `[d_in]`."""


def gram(team: Team, W_dec: Tensor) -> Gram:
    """Compute the inner products of the rows of ``W_dec`` `[d_sae, d_in]` (float32).

    Memory: two bytes per product, and a block of rows per thread.
    """
    compiled, d_sae = team.compiled_pursuit, len(W_dec)
    largest = W_dec.norm(dim=1).max().square().clamp_min(torch.finfo(torch.float32).tiny)
    scale = np.float32(largest) * np.float32(1.0001) / compiled.STEPS
    products = np.empty((d_sae, -(-d_sae // compiled.WIDTH) * compiled.WIDTH), np.int16)

    def fill(i: int) -> None:
        rows = slice(i * _GRAM_ROWS, min((i + 1) * _GRAM_ROWS, d_sae))
        exact = torch.mm(W_dec[rows], W_dec.t(), out=team.scratch("products", rows.stop - rows.start, d_sae))
        compiled.round_gram(exact.numpy(), scale, products[rows])

    team.run(fill, -(-d_sae // _GRAM_ROWS))
    return Gram(products, scale, np.float32(0.51) * scale)


def pursue(team: Team, centred: Tensor, W_dec: Tensor, inner: Gram, limits: Limits) -> Pursuit:
    """Run matching pursuit on ``centred`` `[n, d_in]` (float32, contiguous).

    The definition is that of :class:`~saeens_models.architectures.matching_pursuit.MatchingPursuitSAE`. Memory in addition to the
    result: the correlations of `_BLOCK_TOKENS` tokens per thread, twice.
    """
    n, d_sae, n_iterations = len(centred), len(W_dec), limits.max_iterations
    found = torch.empty(n, n_iterations, dtype=torch.int32), torch.empty(n, n_iterations), torch.empty_like(centred)
    stops = np.float32(limits.residual_threshold), limits.stop_on_duplicate_support

    def take(i: int) -> None:
        rows = slice(i * _BLOCK_TOKENS, min((i + 1) * _BLOCK_TOKENS, n))
        correlations = team.scratch("correlations", rows.stop - rows.start, inner.products.shape[1])
        correlations[:, d_sae:] = -torch.inf
        correlations[:, :d_sae] = torch.mm(centred[rows], W_dec.t(), out=team.scratch("products", rows.stop - rows.start, d_sae))
        given, to = (centred[rows].numpy(), correlations.numpy(), W_dec.numpy()), (each[rows].numpy() for each in found)
        team.compiled_pursuit.pursue(*given, *inner, *stops, *to)

    team.run(take, -(-n // _BLOCK_TOKENS))
    return Pursuit(*found)


def pursuit_gradients(team: Team, centred: Tensor, W_dec: Tensor, limits: Limits) -> PursuitGradients:
    """Compute the loss ``mean ||residual||^2`` of a batch ``centred`` `[n, d_in]` (float32, contiguous) and its gradients.

    Gradients flow through all choices. Memory in addition to the result: the inner products (:func:`gram`), and four tensors of the size of
    ``W_dec``, whose sums do not depend on the number of threads.
    """
    n = len(centred)
    found = pursue(team, centred, W_dec, gram(team, W_dec), limits)
    mse = found.residual.square().sum(dim=1).mean()
    n_sums = min(_MOST_SUMS, -(-n // _BLOCK_TOKENS))
    size = -(-n // n_sums)
    of_W_dec, of_centre = torch.zeros(n_sums, *W_dec.shape), torch.zeros(n_sums, W_dec.shape[1])
    left = found.residual.clone()

    def back(i: int) -> None:
        rows = slice(i * size, min((i + 1) * size, n))
        indices, values, residual = (each[rows].numpy() for each in (found.indices, found.values, left))
        to = of_W_dec[i].numpy(), of_centre[i].numpy()
        team.compiled_pursuit.pursue_back(W_dec.numpy(), indices, values, residual, np.float32(2 / n), *to)

    team.run(back, n_sums)
    return PursuitGradients(mse, found, of_W_dec.sum(dim=0), of_centre.sum(dim=0))
