"""The inner loops of training steps on the CPU, compiled by numba at the first call and cached on disk.

Every function processes a range of rows, tokens or features and releases the interpreter lock. The order of its sums depends on the
data alone, so results have the same bits for any number of threads. No compiler flag assumes finite numbers.
"""

from typing import Any

import numba
import numpy as np

_settings: Any = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz", "arcp"}}
_compile_with_memory: Any = numba.njit(**_settings)
_without_memory: Any = {**_settings, "_nrt": False}
_compile: Any = numba.njit(**_without_memory)
"""For functions that allocate nothing: without reference counts, which for views of rows took as long as the computation."""


@_compile
def _fill(values, number):
    for i in range(len(values)):
        values[i] = number


@_compile
def _copy(to, values):
    for i in range(len(to)):
        to[i] = values[i]


@_compile
def _maximum(maxima, values):
    for i in range(len(maxima)):
        maxima[i] = values[i] if values[i] > maxima[i] else maxima[i]


@_compile
def _add(row, other):
    for i in range(len(row)):
        row[i] += other[i]


@_compile
def _add_scaled(total, row, factor):
    for i in range(len(total)):
        total[i] += factor * row[i]


@_compile
def _add_four_scaled(total, a, b, c, d, of_a, of_b, of_c, of_d):
    """Add four scaled rows to `total` in one pass: `total` is loaded once, and the four rows are fetched from memory together."""
    for i in range(len(total)):
        total[i] += of_a * a[i] + of_b * b[i] + of_c * c[i] + of_d * d[i]


@_compile
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_compile
def _four_dots(x, a, b, c, d):
    by_a, by_b, by_c, by_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(len(x)):
        by_a += x[i] * a[i]
        by_b += x[i] * b[i]
        by_c += x[i] * c[i]
        by_d += x[i] * d[i]
    return by_a, by_b, by_c, by_d


@_compile
def relu(values, indices):
    """Deactivate entries of a code that are not positive: value 0, index -1, which the functions below skip."""
    n, k = values.shape
    for b in range(n):
        for i in range(k):
            if values[b, i] <= 0:
                values[b, i] = 0
                indices[b, i] = -1


@_compile
def _decode_row(row, indices, values, W_dec):
    i, n = 0, len(indices)
    while i < n:
        if i + 4 <= n and min(indices[i], indices[i + 1], indices[i + 2], indices[i + 3]) >= 0:
            p, q, r, s = indices[i], indices[i + 1], indices[i + 2], indices[i + 3]
            _add_four_scaled(row, W_dec[p], W_dec[q], W_dec[r], W_dec[s], values[i], values[i + 1], values[i + 2], values[i + 3])
            i += 4
        else:
            if indices[i] >= 0:
                _add_scaled(row, W_dec[indices[i]], values[i])
            i += 1


@_compile
def decode(indices, values, W_dec, decoded):
    """Add `z W_dec` to decoded `[n, d]`, for the code z with the entries `indices`, `values` `[n, k]`."""
    for b in range(len(decoded)):
        _decode_row(decoded[b], indices[b], values[b], W_dec)


@_compile
def _gradients_of_row(error, indices, W_dec, scale, gradients, counts):
    """Compute the gradients of a token's code, and count its features."""
    for i in range(len(indices)):
        if indices[i] >= 0:
            gradients[i] = scale * _dot(error, W_dec[indices[i]])
            counts[indices[i]] += 1


@_compile
def subtract(rows, row, differences):
    """Subtract a row `[d]` from each of the rows `[n, d]`."""
    for b in range(len(rows)):
        given, to = rows[b], differences[b]
        for i in range(len(row)):
            to[i] = given[i] - row[i]


@_compile
def reconstruct(indices, values, W_dec, b_dec, x, scale, x_hat, error, gradients, counts, error_sum):
    """Apply :func:`relu` to a code z with entries `[n, k]`, decode it, and differentiate.

    Writes x_hat and error ``x_hat - x`` `[n, d]`, the error's sum over tokens, the gradients ``scale * error . W_dec[index]`` of z, and
    the number of tokens on which each feature is active, counts `[m]`. Returns the sum of the error's squares.
    """
    squares = 0.0
    relu(values, indices)
    _fill(counts, 0)
    _fill(error_sum, 0)
    for b in range(len(x)):
        decoded, row = x_hat[b], error[b]
        _copy(decoded, b_dec)
        _decode_row(decoded, indices[b], values[b], W_dec)
        for i in range(len(row)):
            row[i] = decoded[i] - x[b, i]
        _add(error_sum, row)
        squares += _dot(row, row)
        _gradients_of_row(row, indices[b], W_dec, scale, gradients[b], counts)
    return squares


@_compile
def reconstruct_error(features, W_dec, given, scale, indices, values, error, gradients, counts):
    """Decode and differentiate a code z of some features, which fits the error of another code: the error is ``given + z W_dec``.

    Results as in :func:`reconstruct`. Entries may be negative. Indices are positions in `features`, and are replaced by the features.
    """
    squares = 0.0
    _fill(counts, 0)
    for b in range(len(given)):
        row = error[b]
        for i in range(indices.shape[1]):
            indices[b, i] = features[indices[b, i]]
        _copy(row, given[b])
        _decode_row(row, indices[b], values[b], W_dec)
        squares += _dot(row, row)
        _gradients_of_row(row, indices[b], W_dec, scale, gradients[b], counts)
    return squares


@_compile
def first_places(counts, starts, ends):
    """Compute the positions of entries sorted by feature, then by block of tokens.

    Counts `[n_blocks, m]`: number of active tokens. Writes the position of each feature's first entry, starts `[m + 1]`, and of its first
    entry in each block, ends `[n_blocks, m]`.
    """
    n_blocks, m = counts.shape
    place = 0
    for feature in range(m):
        starts[feature] = place
        for block in range(n_blocks):
            ends[block, feature] = place
            place += counts[block, feature]
    starts[m] = place


@_compile
def sort_by_feature(indices, values, value_gradients, first_token, ends, tokens, by_feature, gradients_by_feature):
    """Sort the entries of some tokens by feature. `ends` `[m]`: output position of each feature's next entry; it is advanced."""
    n, k = values.shape
    for b in range(n):
        for i in range(k):
            feature = indices[b, i]
            if feature >= 0:
                place = ends[feature]
                ends[feature] = place + 1
                tokens[place] = first_token + b
                by_feature[place] = values[b, i]
                gradients_by_feature[place] = value_gradients[b, i]


@_compile
def weight_gradients(starts, tokens, values, value_gradients, x, error, scale, first, last, add, W, W_enc, b_enc, W_dec, of_mean):
    """Compute the weights' gradients for features first to last: sums over entries of `value_gradient * x` and `scale * value * error`.

    `add`: add them to the existing values. If of_mean `[d]` is not empty, the gradient of the vector that was subtracted from all x, before
    W `[m, d]` encoded them, is added to it.
    """
    for feature in range(first, last):
        encoder, decoder = W_enc[feature], W_dec[feature]
        if not add:
            _fill(encoder, 0)
            _fill(decoder, 0)
            b_enc[feature] = 0
        place, end = starts[feature], starts[feature + 1]
        if place == end:
            continue
        total = np.float32(0)
        while place + 4 <= end:
            p, q, r, s = tokens[place], tokens[place + 1], tokens[place + 2], tokens[place + 3]
            g, v = value_gradients[place : place + 4], values[place : place + 4]
            total += g[0] + g[1] + g[2] + g[3]
            _add_four_scaled(encoder, x[p], x[q], x[r], x[s], g[0], g[1], g[2], g[3])
            _add_four_scaled(decoder, error[p], error[q], error[r], error[s], scale * v[0], scale * v[1], scale * v[2], scale * v[3])
            place += 4
        while place < end:
            token = tokens[place]
            total += value_gradients[place]
            _add_scaled(encoder, x[token], value_gradients[place])
            _add_scaled(decoder, error[token], scale * values[place])
            place += 1
        b_enc[feature] += total
        if len(of_mean) > 0:
            _add_scaled(of_mean, W[feature], -total)


@_compile
def squares(rows):
    """Return the sum of the squares of `[n, d]`."""
    total = 0.0
    for b in range(len(rows)):
        total += _dot(rows[b], rows[b])
    return total


@_compile
def remove_parallel(gradients, directions):
    """Remove from each gradient its part along a direction of norm 1, both `[n, d]`, in place.

    Returns the sum of the squares of the result.
    """
    total = 0.0
    for b in range(len(gradients)):
        _add_scaled(gradients[b], directions[b], -_dot(gradients[b], directions[b]))
        total += _dot(gradients[b], gradients[b])
    return total


@_compile
def adam(weights, gradients, means, squares, gradient_scale, step_size, beta1, beta2, correction, epsilon, unit_norm):
    """Take one step of Adam on rows `[n, d]` in place; `unit_norm`: then scale each row to norm 1.

    `step_size` is the learning rate over `1 - beta1^t`, `correction` is `1 / sqrt(1 - beta2^t)`.
    """
    for b in range(len(weights)):
        weight, gradient, mean, square = weights[b], gradients[b], means[b], squares[b]
        for i in range(len(weight)):
            of_weight = gradient_scale * gradient[i]
            mean[i] = beta1 * mean[i] + (np.float32(1) - beta1) * of_weight
            square[i] = beta2 * square[i] + (np.float32(1) - beta2) * of_weight * of_weight
            weight[i] -= step_size * mean[i] / (np.sqrt(square[i]) * correction + epsilon)
        if unit_norm:
            norm = np.sqrt(_dot(weight, weight))
            if norm > 0:
                for i in range(len(weight)):
                    weight[i] /= norm


@_compile
def jumprelu(pre, bias, threshold, half_bandwidth, z, sums, fires, counts):
    """Add the bias to pre-activations, feature by feature, pre `[m, n]`, in place, and write ``z = pre * (pre > threshold)`` `[m, n]`.

    All other arrays are `[m]`. sums: sum of z per feature; fires: number of active tokens; counts: number of tokens that contribute to a
    gradient, because they are active, near the threshold, or NaN. Returns the sum of the counts.
    """
    n_entries = 0
    for feature in range(len(pre)):
        given, row, of_feature, least = pre[feature], z[feature], bias[feature], threshold[feature]
        below = least - half_bandwidth
        total, n_active, n_without = np.float32(0), np.int32(0), np.int32(0)
        for i in range(len(row)):
            given[i] += of_feature
            active = given[i] > least
            row[i] = given[i] if active else given[i] * np.float32(0)  # NaN stays NaN
            total += row[i]
            n_active += np.int32(active)
            n_without += np.int32(row[i] == 0 and given[i] <= below)
        sums[feature], fires[feature], counts[feature] = total, n_active, len(row) - n_without
        n_entries += counts[feature]
    return n_entries


@_compile
def count_near(pre, threshold, half_bandwidth, counts):
    """Count the tokens whose pre-activation, `[m, n]`, is less than half a bandwidth from its threshold `[m]`, per feature, `[m]`."""
    for feature in range(len(pre)):
        given, least, n_near = pre[feature], threshold[feature], np.int32(0)
        for i in range(len(given)):
            n_near += np.int32(abs(given[i] - least) < half_bandwidth)
        counts[feature] = n_near


@_compile
def list_entries(pre, z, threshold, half_bandwidth, counts, starts, tokens, values):
    """List the entries that `jumprelu` counted, sorted by feature, then by token.

    Writes the position of each feature's first entry, starts `[m + 1]`, and the entries' tokens and codes.
    """
    place = 0
    for feature in range(len(pre)):
        starts[feature] = place
        if counts[feature] == 0:
            continue
        given, row, below = pre[feature], z[feature], threshold[feature] - half_bandwidth
        for i in range(len(row)):
            if not (row[i] == 0 and given[i] <= below):
                tokens[place] = i
                values[place] = row[i]
                place += 1
    starts[len(pre)] = place


@_compile
def decode_entries(starts, tokens, values, W_dec, b_dec, x, x_hat, error):
    """Decode entries sorted by feature into x_hat and error ``x_hat - x`` `[n, d]`. Returns the sum of the error's squares."""
    for b in range(len(x)):
        _copy(x_hat[b], b_dec)
    for feature in range(len(W_dec)):
        for place in range(starts[feature], starts[feature + 1]):
            if values[place] != 0:
                _add_scaled(x_hat[tokens[place]], W_dec[feature], values[place])
    total = 0.0
    for b in range(len(x)):
        given, decoded, off = x[b], x_hat[b], error[b]
        for i in range(len(off)):
            off[i] = decoded[i] - given[i]
        total += _dot(off, off)
    return total


@_compile
def entry_gradients(
    pre, threshold, starts, tokens, error, W_dec, scale, of_code, half_bandwidth, of_activity, gradients, sums, threshold_gradients
):
    """Compute `jumprelu_gradients` for entries sorted by feature, from the error `[n, d]` of their reconstruction."""
    for feature in range(len(W_dec)):
        given, least, more, direction = pre[feature], threshold[feature], of_code[feature], W_dec[feature]
        total, of_threshold = np.float32(0), np.float32(0)
        place, end = starts[feature], starts[feature + 1]
        while place + 4 <= end:
            p, q, r, s = tokens[place], tokens[place + 1], tokens[place + 2], tokens[place + 3]
            to = gradients[place : place + 4]
            to[0], to[1], to[2], to[3] = _four_dots(direction, error[p], error[q], error[r], error[s])
            place += 4
        while place < end:
            gradients[place] = _dot(direction, error[tokens[place]])
            place += 1
        for entry in range(starts[feature], end):
            over = given[tokens[entry]] - least
            gradient = scale * gradients[entry] + more
            of_threshold += gradient * least + of_activity if abs(over) < half_bandwidth else np.float32(0)
            gradients[entry] = gradient if over > 0 else np.float32(0)
            total += gradients[entry]
        sums[feature] = total
        threshold_gradients[feature] = -of_threshold / (np.float32(2) * half_bandwidth) if half_bandwidth > 0 else np.float32(0)


@_compile
def jumprelu_gradients(pre, threshold, of_z, scale, of_code, half_bandwidth, of_activity, gradients, sums, threshold_gradients):
    """Turn the gradients of z, `[m, n]` and without their scale, into those of pre, and sum them and those of the thresholds `[m]`.

    `of_code` `[m]` is the part of z's gradient from an L1 term; `of_activity` is the gradient of the activity ``[pre > threshold]`` from
    an L0 term.
    """
    for feature in range(len(pre)):
        given, row, to, least, more = pre[feature], of_z[feature], gradients[feature], threshold[feature], of_code[feature]
        total, of_threshold = np.float32(0), np.float32(0)
        for i in range(len(row)):
            over = given[i] - least
            gradient = scale * row[i] + more
            of_threshold += gradient * least + of_activity if abs(over) < half_bandwidth else np.float32(0)
            to[i] = gradient if over > 0 else np.float32(0)
            total += to[i]
        sums[feature] = total
        threshold_gradients[feature] = -of_threshold / (np.float32(2) * half_bandwidth) if half_bandwidth > 0 else np.float32(0)


@_compile
def compare(decoded, b_dec, x, x_hat, error):
    """Write x_hat `[n, d]`, given the decoded code without b_dec, `[d, n]`, and its error ``x_hat - x``.

    Returns the sum of the error's squares.
    """
    total = 0.0
    for b in range(len(x)):
        given, to, off = x[b], x_hat[b], error[b]
        for i in range(len(b_dec)):
            to[i] = decoded[i, b] + b_dec[i]
            off[i] = to[i] - given[i]
        total += _dot(off, off)
    return total
