"""The encoder of TopK SAEs on the CPU: the largest pre-activations of each token, in float32 or, if faster, first in bfloat16."""

import numpy as np
import torch
from torch import Tensor

from saeens_models.kernels.products import linear, multiplies_bfloat16
from saeens_models.kernels.team import Team
from saeens_models.kernels.weights import Weights

_ROUNDED_FEATURES = 512
"""Features per task that rounds weights to bfloat16."""
_BIAS_COLUMNS = 32
"""Columns added to weights in bfloat16, the first of which is the bias: as many as the processor multiplies at a time."""
_SPARE_CANDIDATES = 64
"""A token may have d_sae / 8 candidates, and at least ``2 k + _SPARE_CANDIDATES``."""
_ROUGH_PRODUCTS = 2**27
"""Multiplications of an encoder from which bfloat16 pays for the exact second pass. Measured: with 2^26 the whole step takes as long as
in float32 on a Xeon with AMX, and a tenth longer on a Zen 5; with 2^33 half as long on the Xeon."""


class Encoder:
    """Encodes blocks of tokens. `rough`: pre-activations are computed in bfloat16, and the largest ones then exactly in float32.

    Encoders created on one thread share the memory for W_enc in bfloat16: only the last one can be used.
    """

    def __init__(self, team: Team, weights: Weights, rough: bool) -> None:
        self._team, self._weights = team, weights
        self._b_enc = weights.b_enc.numpy()
        self._W_rough: Tensor | None = None
        if rough:
            W_enc, (d_sae, d_in) = weights.W_enc, weights.W_enc.shape
            W_rough = self._W_rough = team.kept("rough W_enc", _rough_rows, d_sae, d_in)
            W_rough[:, d_in] = weights.b_enc
            rows, rounded, norms = W_enc.numpy(), _bits(W_rough), np.empty((2, d_sae), np.float32)

            def round_some(i: int) -> None:
                features = slice(i * _ROUNDED_FEATURES, (i + 1) * _ROUNDED_FEATURES)
                team.compiled_topk.round_rows(rows[features], rounded[features], norms[0, features], norms[1, features])

            team.run(round_some, -(-d_sae // _ROUNDED_FEATURES), work=4 * W_enc.numel())
            norm, distance = norms.max(axis=1)
            summation = np.float32(2 * (d_in + 1) * np.finfo(np.float32).eps)
            self._norm, self._rounding = norm, distance + summation * norm
            self._of_bias = np.float32(float(weights.b_enc.abs().max()) * 2**-8)

    def encode(self, x: Tensor, indices: np.ndarray, values: np.ndarray) -> None:
        """Write the k largest pre-activations of a block of tokens and their features, `[n, k]`, before the ReLU."""
        if self._W_rough is None:
            select_topk(self._team, linear(x, self._weights.W_enc), self._b_enc, indices, values)
        else:
            self._encode_exactly(x, self._W_rough, indices, values)

    def _encode_exactly(self, x: Tensor, W_rough: Tensor, indices: np.ndarray, values: np.ndarray) -> None:
        """Select by pre-activations in bfloat16, and compute those that may be among the largest in float32.

        The weights are the first factor of the product, which then takes two thirds of the time. With x' and w' in bfloat16, the error
        of the computed ``x'.w'`` is at most ``|x - x'| |w| + |x'| (|w - w'| + summation |w|)``, plus the error of the bias.
        """
        compiled_topk = self._team.compiled_topk
        (n, d_in), d_sae, k = x.shape, len(W_rough), indices.shape[1]
        memory = self._team.kept("selection of rough features", _exact_selection, n, d_sae, k)
        x_rough = self._team.kept("rough x", _rough_rows, n, d_in)
        x_rough[:, d_in] = 1  # the column of the bias
        x_rows, (x_norms, off) = x.numpy(), self._team.scratch("norms of x", 2, n).numpy()
        compiled_topk.round_rows(x_rows, _bits(x_rough), x_norms, off)
        errors = off * self._norm + (x_norms + off) * self._rounding + self._of_bias
        rough = self._team.scratch("rough pre-activations", d_sae, n, dtype=torch.bfloat16)
        torch.mm(W_rough, x_rough.t(), out=rough)
        W_enc = self._weights.W_enc.numpy()
        n_left_out = compiled_topk.select_topk_exactly(_bits(rough), self._b_enc, x_rows, errors, W_enc, memory, indices, values)
        if n_left_out > 0:
            tokens = memory[10][:n_left_out]  # as the kernel unpacks it
            their_indices, their_values = indices[tokens], values[tokens]
            pre = linear(x[torch.from_numpy(tokens)], self._weights.W_enc)
            select_topk(self._team, pre, self._b_enc, their_indices, their_values)
            indices[tokens], values[tokens] = their_indices, their_values


def select_topk(team: Team, pre: Tensor, bias: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
    """Write the k largest entries of each row of ``pre + bias`` `[n, m]` to ``indices`` and ``values`` `[n, k]`. ``pre`` is overwritten."""
    memory = team.kept("selection", _selection, len(bias))
    team.compiled_topk.select_topk(pre.numpy(), pre.view(torch.int32).numpy(), bias, *memory, indices, values)


def _selection(team: Team, name: str, m: int) -> tuple[np.ndarray, ...]:
    """Return memory to select from a row of m entries: keys int32 `[m + STRIDE]`, places int32 `[2 m]`, scores `[m]`."""
    sizes = {"keys": m + team.compiled_topk.STRIDE, "places": 2 * m}
    integers = [team.scratch(f"{part} of {name}", size, dtype=torch.int32).numpy() for part, size in sizes.items()]
    return *integers, team.scratch(f"scores of {name}", m).numpy()


def _exact_selection(team: Team, name: str, *shape: int) -> tuple[np.ndarray, ...]:
    """Return memory to select features for n tokens, in the kernel's order; compiled code on disk refers to named tuples by name."""
    n, d_sae, k = shape
    capacity = min(d_sae, max(d_sae // 8, 2 * k + _SPARE_CANDIDATES))

    def part(part: str, *shape: int, dtype: torch.dtype) -> np.ndarray:
        return team.scratch(f"{part} of {name}", *shape, dtype=dtype).numpy()

    scores = part("scores", n, capacity, dtype=torch.float32)
    return (
        part("maxima", team.compiled_topk.n_groups(d_sae, k), n, dtype=torch.int16),
        part("candidates", n, capacity, dtype=torch.int32),
        scores,
        scores.view(np.int32),
        *(part(each, n, dtype=torch.int64) for each in ("n_candidates", "n_unsure")),
        *(part(each, n, dtype=torch.int16) for each in ("sure", "high", "least", "counts")),
        *(part(each, n, dtype=torch.int64) for each in ("tokens", "some", "reaching")),
        part("keys", capacity + team.compiled_topk.STRIDE, dtype=torch.int32),
    )


def _rough_rows(team: Team, name: str, n: int, d: int) -> Tensor:
    """Return memory for rows in bfloat16, with ``_BIAS_COLUMNS`` zero columns after them."""
    rows = team.scratch(name, n, d + _BIAS_COLUMNS, dtype=torch.bfloat16)
    rows[:, d:] = 0
    return rows


def _bits(rough: Tensor) -> np.ndarray:
    """Return the bit patterns of bfloat16 numbers as int16: numpy has no bfloat16."""
    return rough.view(torch.int16).numpy()


def bfloat16_pays(n_tokens: int, weights: Weights) -> bool:
    """Return True if an encoder of so many tokens is faster with pre-activations in bfloat16 first."""
    return n_tokens * weights.W_enc.numel() >= _ROUGH_PRODUCTS and multiplies_bfloat16()
