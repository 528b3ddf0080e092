"""The inner loops of matching pursuit on the CPU, compiled as in `compiled`: a token's whole pursuit, and its backward pass."""

import numpy as np

from saeens_models.kernels.compiled import _add_scaled, _compile, _compile_with_memory, _copy, _dot, _fill, _maximum

LANES = 64
"""Number of maxima of a row: lane i holds the maximum of the entries i, i + 64, i + 128, ..."""
_STRIPS = 8
"""Entries per lane in a piece of a row: with longer pieces the processor fetches less of the row ahead."""
WIDTH = LANES * _STRIPS
"""Rows are padded to a multiple of this width."""
STEPS = np.float32(2**15 - 1)
"""Inner products of atoms are kept as int16; the largest one is about this many steps."""


@_compile
def _subtract_piece(correlations, gram, factor, maxima):
    for lane in range(LANES):
        top = maxima[lane]
        for strip in range(_STRIPS):
            place = strip * LANES + lane
            value = correlations[place] - factor * np.float32(gram[place])
            correlations[place] = value
            top = value if value > top else top
        maxima[lane] = top


@_compile
def _subtract(correlations, gram, factor, maxima):
    """Subtract `factor * gram` (int16) from the correlations, and write the maximum of each lane."""
    _fill(maxima, -np.inf)
    for first in range(0, len(correlations), WIDTH):
        _subtract_piece(correlations[first : first + WIDTH], gram[first : first + WIDTH], factor, maxima)


@_compile
def _largest(residual, W_dec, correlations, maxima, slack):
    """Return the atom with exactly the largest correlation with the residual, the first of equal ones, and this correlation.

    The given correlations have an error below `slack`: all that may be the largest are computed again.
    """
    d_sae = len(W_dec)
    top = maxima[0]
    for i in range(1, LANES):
        top = maxima[i] if maxima[i] > top else top
    least = top - np.float32(2) * slack
    best, value = -1, np.float32(0)
    for lane in range(LANES):
        if maxima[lane] >= least:
            for i in range(lane, d_sae, LANES):
                if correlations[i] >= least:
                    exact = _dot(residual, W_dec[i])
                    if best < 0 or exact > value or (exact == value and i < best):
                        best, value = i, exact
    return best, value


@_compile
def round_gram(products, scale, gram):
    """Write the products `[n, m]` in units of `scale`, rounded, into `gram` `[n, m']` (int16); the columns after them are set to 0."""
    n, m = products.shape
    inverse = np.float32(1) / scale
    for b in range(n):
        row, rounded = products[b], gram[b]
        for i in range(m):
            rounded[i] = np.int16(np.rint(row[i] * inverse))
        for i in range(m, len(rounded)):
            rounded[i] = 0


@_compile_with_memory
def pursue(centred, correlations, W_dec, gram, scale, rounding, residual_threshold, stop_on_duplicate, indices, values, residual):
    """Run matching pursuit on the rows of centred `[n, d]`: writes atoms in the order of choice, their values `[n, T]`, and the residual.

    correlations `[n, m]` are `centred @ W_dec.T`, padded with -inf to a multiple of WIDTH, and are overwritten. An entry of gram
    `[d_sae, m]` times `scale` has an error of at most `rounding`. Unused entries of `indices` are -1.
    """
    n, n_iterations = indices.shape
    maxima = np.empty(LANES, np.float32)
    for b in range(n):
        row, left, atoms, found = correlations[b], residual[b], indices[b], values[b]
        _copy(left, centred[b])
        _fill(atoms, -1)
        _fill(found, 0)
        _fill(maxima, -np.inf)
        for first in range(0, len(row), LANES):
            _maximum(maxima, row[first : first + LANES])
        # the matrix product sums in another order than _dot: its error grows with the norm
        slack = np.float32(1e-6) * np.sqrt(_dot(left, left))
        for t in range(n_iterations):
            atom, value = _largest(left, W_dec, row, maxima, slack)
            if atom < 0 or np.isnan(value):  # NaN reaches no threshold: the loss has to show it
                _fill(left, np.nan)
                break
            if value <= 0:
                break
            duplicate = False
            if stop_on_duplicate:
                for s in range(t):
                    duplicate = duplicate or atoms[s] == atom
            atoms[t] = atom
            found[t] = value
            _add_scaled(left, W_dec[atom], -value)
            if duplicate or (residual_threshold > 0 and np.sqrt(_dot(left, left)) < residual_threshold):
                break
            if t + 1 < n_iterations:
                slack += value * rounding
                _subtract(row, gram[atom], value * scale, maxima)


@_compile_with_memory
def pursue_back(W_dec, indices, values, residual, factor, of_W_dec, of_b_dec):
    """Add the gradients of `factor / 2 * |residual|^2`, summed over the tokens, with respect to W_dec and to -centred.

    The residual before a choice is the one after it plus the subtracted atom, so the backward pass stores nothing. Overwrites residual.
    """
    n, n_iterations = indices.shape
    gradient = np.empty(W_dec.shape[1], np.float32)
    for b in range(n):
        left = residual[b]
        for i in range(len(gradient)):
            gradient[i] = factor * left[i]
        for step in range(n_iterations):
            t = n_iterations - 1 - step
            atom = indices[b, t]
            if atom >= 0:
                direction, of_direction, value = W_dec[atom], of_W_dec[atom], values[b, t]
                along = _dot(direction, gradient)
                # the value is w . r before the choice, and the residual after it r - (w . r) w
                for i in range(len(left)):
                    left[i] += value * direction[i]
                    of_direction[i] -= value * gradient[i] + along * left[i]
                    gradient[i] -= along * direction[i]
        for i in range(len(gradient)):
            of_b_dec[i] -= gradient[i]
