"""Machine code for the CPU, compiled by numba when first called and kept on disk: the inner loops of a TopK training step.

Every function works on a range of rows, tokens or features, releases the interpreter lock, and sums in an order that depends on the
data alone: whoever calls them from several threads gets the same bits for any number of threads. No flag assumes finite numbers.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

_compile: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp"})

_PARTS = 8
"""A row is cut into so many parts for its selection, and a group takes one entry of each."""


@_compile
def _count(values, threshold):
    n = np.int32(0)
    for i in range(len(values)):
        n += np.int32(values[i] >= threshold)
    return n


@_compile
def _bounds(values, k, slack):
    """By bisection a value that at least k entries reach, and a larger one that fewer than k reach.

    Ends when at most k + slack reach the lower one, or when nothing lies between the two: the entries between are equal.
    """
    low, high = values[0], values[0]
    for i in range(len(values)):
        low = values[i] if values[i] < low else low
        high = values[i] if values[i] > high else high
    if _count(values, high) >= k:
        return high, np.float32(np.inf)
    while True:
        middle = np.float32(0.5) * low + np.float32(0.5) * high
        if not low < middle < high:
            return low, high
        reached = _count(values, middle)
        if reached < k:
            high = middle
        else:
            low = middle
            if reached <= k + slack:
                return low, high


@_compile
def _maximum(maxima, values):
    for i in range(len(maxima)):
        maxima[i] = values[i] if values[i] > maxima[i] else maxima[i]


@_compile
def _reaching(values, threshold, places):
    """Write down where the threshold is reached; how often."""
    n = 0
    for i in range(len(values)):
        places[n] = i
        n += np.int64(values[i] >= threshold)
    return n


@_compile
def _candidates(row, k, margin, scores, places):
    """Where the entries are that may be among the k largest, and all that are less than a margin below them; `scores` are these entries.

    The k largest lie in the groups whose maxima reach what k of the maxima reach: few are left to choose from.
    """
    n_groups = len(row) // _PARTS
    n = 0
    if n_groups <= 2 * k:
        candidates = places
        n = _reaching(row, np.float32(-np.inf), candidates)
    else:
        grouped = _PARTS * n_groups
        maxima = scores[:n_groups]
        maxima[:] = row[:n_groups]
        for start in range(n_groups, grouped, n_groups):
            _maximum(maxima, row[start : start + n_groups])
        threshold, _ = _bounds(maxima, k, max(k // 4, _PARTS))
        threshold -= margin
        n_reaching = _reaching(maxima, threshold, places)
        candidates = places[n_reaching:]
        for i in range(n_reaching):
            for place in range(places[i], grouped, n_groups):
                candidates[n] = place
                n += np.int64(row[place] >= threshold)
        for place in range(grouped, len(row)):
            candidates[n] = place
            n += np.int64(row[place] >= threshold)
    for i in range(n):
        scores[i] = row[candidates[i]]
    return candidates[:n]


@_compile
def _select(candidates, scores, k, indices, values):
    """The k candidates with the largest scores; of equal ones the first."""
    n, n_selected = len(candidates), 0
    if n >= k:
        scores = scores[:n]
        low, high = _bounds(scores, k, 0)
        for i in range(n):
            if scores[i] >= high:
                indices[n_selected] = candidates[i]
                values[n_selected] = scores[i]
                n_selected += 1
        for i in range(n):
            if low <= scores[i] < high and n_selected < k:
                indices[n_selected] = candidates[i]
                values[n_selected] = scores[i]
                n_selected += 1
    for i in range(n_selected, k):  # what is not a number reaches nothing: the loss has to show it
        indices[i] = i
        values[i] = np.nan


@_compile
def _add(row, other):
    for i in range(len(row)):
        row[i] += other[i]


@_compile
def _largest_magnitude(row):
    """Of floats without their sign bits, whose bits as integers have the same order: a maximum that is found in vectors."""
    bits = row.view(np.int32)
    largest = np.zeros(1, np.int32)
    for i in range(len(bits)):
        largest[0] = max(largest[0], bits[i] & np.int32(0x7FFFFFFF))
    return largest.view(np.float32)[0]


@_compile
def select_topk(pre, bias, k, indices, values):
    """Add the bias `[m]` to each row of pre `[n, m]`, in place, and select its k largest entries: indices, values `[n, k]`."""
    n, m = pre.shape
    scores, places = np.empty(m, np.float32), np.empty(2 * m + 1, np.int32)
    for b in range(n):
        _add(pre[b], bias)
        candidates = _candidates(pre[b], k, np.float32(0), scores, places)
        _select(candidates, scores, k, indices[b], values[b])


@_compile
def select_topk_exactly(pre, bias, error, rounding, x, W_enc, k, indices, values):
    """As `select_topk` for pre that is computed roughly.

    Each entry is off by at most the `error` `[n]` of its row, and the share `rounding` of itself. The k largest are then among those
    that are at most twice that below the k-th largest rough one. These are computed again in float32, `x . W_enc[index]` for
    x `[n, d]` and W_enc `[m, d]`, and the k largest of them are selected.
    """
    n, m = pre.shape
    scores, places = np.empty(m, np.float32), np.empty(2 * m + 1, np.int32)
    for b in range(n):
        margin = np.float32(2) * (error[b] + rounding * _largest_magnitude(pre[b]))
        _add(pre[b], bias)
        candidates = _candidates(pre[b], k, margin, scores, places)
        n_left = 0
        if len(candidates) >= k:
            least = _bounds(scores[: len(candidates)], k, 0)[0] - margin
            for i in range(len(candidates)):
                if scores[i] >= least:
                    feature = candidates[i]
                    candidates[n_left] = feature
                    scores[n_left] = _dot(x[b], W_enc[feature]) + bias[feature]
                    n_left += 1
        _select(candidates[:n_left], scores, k, indices[b], values[b])


@_compile
def _add_scaled(total, row, factor):
    for i in range(len(total)):
        total[i] += factor * row[i]


@_compile
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@_compile
def relu(values, indices):
    """Take what is not positive out of a code: value 0, index -1, which everything below passes over."""
    n, k = values.shape
    for b in range(n):
        for i in range(k):
            if values[b, i] <= 0:
                values[b, i] = 0
                indices[b, i] = -1


@_compile
def count(indices, counts):
    """How many tokens each feature is active on, into counts `[m]`."""
    counts[:] = 0
    for feature in indices.flat:
        if feature >= 0:
            counts[feature] += 1


@_compile
def _decode_row(row, indices, values, W_dec):
    for i in range(len(indices)):
        if indices[i] >= 0:
            _add_scaled(row, W_dec[indices[i]], values[i])


@_compile
def decode(indices, values, W_dec, decoded):
    """Add `z W_dec` to decoded `[n, d]`, for the code z that is given by its entries `[n, k]`."""
    for b in range(len(decoded)):
        _decode_row(decoded[b], indices[b], values[b], W_dec)


@_compile
def decode_error(indices, values, W_dec, error, scale, value_gradients):
    """Add `z W_dec` to error `[n, d]`. Returns the sum of its squares; the gradients of z are `scale * error . W_dec[index]`."""
    squares = 0.0
    for b in range(len(error)):
        row = error[b]
        _decode_row(row, indices[b], values[b], W_dec)
        squares += _dot(row, row)
        for i in range(indices.shape[1]):
            if indices[b, i] >= 0:
                value_gradients[b, i] = scale * _dot(row, W_dec[indices[b, i]])
    return squares


@_compile
def sort_by_feature(indices, values, value_gradients, first_token, ends, tokens, by_feature, gradients_by_feature):
    """Write the entries of some tokens feature by feature, those of a feature from its place in `ends` `[m]` on, which moves along."""
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
def weight_gradients(starts, tokens, values, value_gradients, x, gradient, scale, first, last, W_enc, b_enc, W_dec):
    """Add to the gradients of features first to last what their entries say: `value_gradient * x` and `scale * value * gradient`."""
    for feature in range(first, last):
        encoder, decoder = W_enc[feature], W_dec[feature]
        for place in range(starts[feature], starts[feature + 1]):
            token = tokens[place]
            b_enc[feature] += value_gradients[place]
            _add_scaled(encoder, x[token], value_gradients[place])
            _add_scaled(decoder, gradient[token], scale * values[place])


@_compile
def squares(rows):
    """Sum of the squares of `[n, d]`."""
    total = 0.0
    for b in range(len(rows)):
        total += _dot(rows[b], rows[b])
    return total


@_compile
def remove_parallel(gradients, directions):
    """Remove from each gradient its part along a direction of norm 1, both `[n, d]`, in place."""
    for b in range(len(gradients)):
        _add_scaled(gradients[b], directions[b], -_dot(gradients[b], directions[b]))


@_compile
def adam(weights, gradients, means, squares, gradient_scale, step_size, beta1, beta2, correction, epsilon, unit_norm):
    """One step of Adam on rows `[n, d]` in place, and then, if asked, each row scaled to norm 1.

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
def gate(pre, bias, threshold, z, sums, fires):
    """Add the bias to pre `[n, m]`, in place, and let through to z what exceeds the threshold, all but pre `[m]`.

    sums, fires `[m]`: of each feature the sum of z, and on how many tokens it is active.
    """
    n, m = pre.shape
    sums[:] = 0
    fires[:] = 0
    for b in range(n):
        given, row = pre[b], z[b]
        for i in range(m):
            given[i] += bias[i]
            active = given[i] > threshold[i]
            row[i] = given[i] if active else given[i] * np.float32(0)  # what is not a number stays so
            sums[i] += row[i]
            fires[i] += np.int32(active)


@_compile
def gate_gradients(pre, threshold, gradients, scale, of_code, half_bandwidth, of_activity, threshold_gradients):
    """Turn `gradients` of z, without their scale, into those of pre, in place; and add up those of the thresholds `[m]`.

    `of_code` `[m]` is what a sparsity term adds to the gradient of z; `of_activity` is its gradient to whether a feature is active.
    """
    n, m = pre.shape
    threshold_gradients[:] = 0
    for b in range(n):
        given, row = pre[b], gradients[b]
        for i in range(m):
            over = given[i] - threshold[i]
            of_z = scale * row[i] + of_code[i]
            if abs(over) < half_bandwidth:
                threshold_gradients[i] -= (of_z * threshold[i] + of_activity) / (np.float32(2) * half_bandwidth)
            row[i] = of_z if over > 0 else np.float32(0)
