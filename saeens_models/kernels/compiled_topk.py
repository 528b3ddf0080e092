"""Exact TopK selection on the CPU, compiled as in :mod:`~saeens_models.kernels.compiled`: for rows, or for tokens of a matrix.

Numbers are compared by keys, integers of the same order. Keys of bfloat16 take half the memory of float32, and bisection over keys
takes few steps.
"""

import numpy as np

from saeens_models.kernels.compiled import _compile, _dot

_ROUNDING = np.float32(2**-8)
"""Twice the relative error of rounding to bfloat16: the other half covers the sum to which a bias is added."""
_TINY = np.float32(1e-36)
"""Added to squares: squares of the smallest numbers are 0 in float32, and error bounds must stay positive."""
_PARTS = 8
"""Smallest number of parts of a row; a group has one entry of each part."""
_MOST_PARTS, _GROUPS_PER_SELECTED = 32, 12
"""Largest number of parts, and smallest number of groups per selected entry. More parts make fewer groups with more entries each."""
_MOST_COUNTED = 2**15 - 1
"""The largest int16: keys of bfloat16 are counted in int16, so that as many counts as keys fit into a register."""
_LEAST_KEY = -(2**31)
STRIDE = 64
"""Numbers per iteration of a vectorised loop; the rest is processed one by one."""


@_compile
def _key(number):
    """Return the key of a float32, an int32: the larger of two numbers has the larger key."""
    bits = np.float32(number).view(np.int32)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


@_compile
def _number(key):
    """Return the float32 with this key."""
    bits = np.int32(key)
    return np.int32(bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)).view(np.float32)


@_compile
def _to_keys(bits, keys):
    """Write the keys of float32 numbers, given as int32, or of bfloat16 numbers, given as int16: the upper half of the float32's key."""
    but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    for i in range(len(keys)):
        keys[i] = bits[i] if bits[i] >= 0 else bits[i] ^ but_sign


@_compile
def _largest_keys(bits, keys):
    """Replace keys by the keys of numbers, given as in `_to_keys`, where these are larger."""
    but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    for i in range(len(keys)):
        key = bits.dtype.type(bits[i] if bits[i] >= 0 else bits[i] ^ but_sign)  # wider integers take three times as long
        keys[i] = key if key > keys[i] else keys[i]


@_compile
def _count(keys, threshold):
    least, n = np.int32(threshold), np.int32(0)
    for i in range(len(keys)):
        n = np.int32(n + np.int32(keys[i] >= least))
    return n


@_compile
def _bounds(memory, n, k, slack, guess):
    """Return two thresholds for the first n keys in memory (int32): at least k keys reach the lower one, fewer than k the upper one.

    Bisects from a guess until at most k + slack keys reach the lower bound, or until no integer lies between the bounds: keys between
    them are then equal. Fewer than `STRIDE` keys after the first n are overwritten.
    """
    end = (n + STRIDE - 1) // STRIDE * STRIDE
    lowest, highest = memory[0], memory[0]
    for i in range(n):
        lowest = memory[i] if memory[i] < lowest else lowest
        highest = memory[i] if memory[i] > highest else highest
    for i in range(n, end):
        memory[i] = _LEAST_KEY
    keys = memory[:end]
    low, high = np.int64(lowest), np.int64(highest)
    if _count(keys, high) >= k:
        return high, high + 1
    middle = guess
    while high - low > 1:
        if not low < middle < high:
            middle = (low + high) >> 1
        reached = _count(keys, middle)
        if reached < k:
            high = middle
        else:
            low = middle
            if reached <= k + slack:
                break
        middle = low
    return low, high


@_compile
def _reaching(keys, threshold, places):
    """Write the positions of keys that reach the threshold, and return their number."""
    n = np.uintp(0)
    for i in range(len(keys)):
        places[n] = i
        n += np.uintp(keys[i] >= threshold)
    return np.int64(n)


@_compile
def n_groups(n, k):
    """Return the number of groups for the selection of k of n entries: the k largest lie in the groups with the k largest maxima.

    Groups have equally many entries; a remainder at the end of the row has no group.
    """
    parts = _PARTS
    while parts < _MOST_PARTS and n >= 2 * parts * _GROUPS_PER_SELECTED * k:
        parts *= 2
    return n // parts if n // parts > 2 * k else n


@_compile
def _candidates(bits, k, guess, keys, places):
    """Return a row's candidates for its k largest entries, as ascending positions, and a key that at least k candidates reach.

    The row is float32, given as in `_to_keys`. Candidates reach a key that the maxima of at least k groups reach.
    """
    but_sign = np.int32(0x7FFFFFFF)
    size = n_groups(len(bits), k)
    grouped, maxima = len(bits) // size * size, keys[:size]
    _to_keys(bits, maxima)
    for start in range(size, grouped, size):
        _largest_keys(bits[start : start + size], maxima)
    threshold, _ = _bounds(keys, size, k, max(k // 4, _PARTS), guess)
    n_reaching = _reaching(maxima, threshold, places)
    if grouped == size == len(bits):
        return places[:n_reaching], threshold
    groups, candidates, n = places[:n_reaching], places[n_reaching:], np.uintp(0)
    for start in range(0, grouped, size):
        part = bits[start : start + size]
        for i in range(n_reaching):
            group = np.uintp(groups[i])
            candidates[n] = start + groups[i]
            n += np.uintp((part[group] if part[group] >= 0 else part[group] ^ but_sign) >= threshold)
    for place in range(grouped, len(bits)):
        candidates[n] = place
        n += np.uintp((bits[place] if bits[place] >= 0 else bits[place] ^ but_sign) >= threshold)
    return candidates[: np.int64(n)], threshold


@_compile
def _select_nothing(first, indices, values):
    """Fill the entries of a selection from position `first` on with NaN, if fewer than k entries were selected. The loss is then NaN."""
    for i in range(first, len(indices)):
        indices[i] = i
        values[i] = np.nan


@_compile
def _select(candidates, scores, keys, k, indices, values):
    """Select the k candidates with the largest scores, whose keys are given; of equal ones those of the lowest index.

    Overwrites the keys.
    """
    n, n_selected, n_equal = len(candidates), 0, 0
    if n >= k:
        low, high = _bounds(keys, n, k, np.int64(0), np.int64(0))
        for i in range(n):
            if keys[i] >= high:
                indices[n_selected] = candidates[i]
                values[n_selected] = scores[i]
                n_selected += 1
        for i in range(n):
            if low <= keys[i] < high:
                keys[n_equal] = -np.int32(candidates[i])
                n_equal += 1
        least = np.int64(_LEAST_KEY)
        if n_equal > k - n_selected:  # candidates may be in any order
            least, _ = _bounds(keys, n_equal, k - n_selected, np.int64(0), np.int64(0))
        for i in range(n):
            if low <= _key(scores[i]) < high and -candidates[i] >= least:
                indices[n_selected] = candidates[i]
                values[n_selected] = scores[i]
                n_selected += 1
    _select_nothing(n_selected, indices, values)  # too few candidates reach a threshold that is NaN


@_compile
def _add_bias(row, bias):
    """Add the bias to a row in place, and return the row's sum, which is NaN if an entry is."""
    total = np.float32(0)
    for i in range(len(row)):
        row[i] += bias[i]
        total += row[i]
    return total


@_compile
def select_topk(pre, bits, bias, keys, places, scores, indices, values):
    """Add the bias `[m]` to each row of pre `[n, m]`, in place, and select its k largest entries: indices, values `[n, k]`.

    `bits` is the memory of pre as int32. keys `[m + STRIDE]`, places `[2 m]` and scores `[m]` are scratch memory.
    """
    (n, m), k, guess = pre.shape, indices.shape[1], np.int64(0)
    for b in range(n):
        row = pre[b]
        if np.isnan(_add_bias(row, bias)):  # the key of NaN may be the smallest
            _select_nothing(0, indices[b], values[b])
            continue
        if k == m:
            for i in range(m):
                indices[b, i] = i
                values[b, i] = row[i]
            continue
        candidates, guess = _candidates(bits[b], k, guess, keys, places)
        for i in range(len(candidates)):
            scores[i] = row[candidates[i]]
            keys[i] = _key(scores[i])
        _select(candidates, scores, keys, k, indices[b], values[b])


@_compile
def round_rows(rows, rough, norms, distances):
    """Round rows `[n, d]` to bfloat16, to nearest even, into the first d columns of rough (as int16).

    Writes the norms `[n]` of the rows, and their distances `[n]` to the rounded rows.
    """
    for b in range(len(rows)):
        row, to, square, square_off = rows[b], rough[b], _TINY, _TINY
        for i in range(len(row)):
            bits = np.float32(row[i]).view(np.int32)
            rounded = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            rounded = rounded if row[i] == row[i] else np.int32(0x7FC0)  # the bits of NaN might be rounded to a number
            off = row[i] - np.int32(rounded << np.int32(16)).view(np.float32)
            square += row[i] * row[i]
            square_off += off * off
            to[i] = rounded
        norms[b], distances[b] = np.sqrt(square), np.sqrt(square_off)


@_compile
def _shrink(low, high, keys):
    for i in range(len(keys)):
        low[i] = keys[i] if keys[i] < low[i] else low[i]
        high[i] = keys[i] if keys[i] > high[i] else high[i]


@_compile
def _count_each(counts, keys, thresholds):
    for i in range(len(keys)):
        counts[i] = np.int16(counts[i] + np.int16((keys[i] >= thresholds[i]) & (counts[i] < np.int16(_MOST_COUNTED))))


@_compile
def _thresholds(maxima, k, slack, low, high, middle, counts):
    """Write for each token a key that at least k of the maxima `[g, n]` reach, low `[n]`, with one bisection for all tokens.

    Ends when at most k + slack maxima reach it, or when fewer than k (or `_MOST_COUNTED`, if k is more) reach any larger key.
    """
    size, n = maxima.shape
    for t in range(n):
        low[t], high[t] = maxima[0, t], maxima[0, t]
    for group in range(1, size):
        _shrink(low, high, maxima[group])
    while True:
        n_open = 0
        for t in range(n):
            n_open += np.int64(low[t] < high[t])
            middle[t] = (np.int32(low[t]) + np.int32(high[t]) + 1) >> 1
        if n_open == 0:
            return
        counts[:] = 0
        for group in range(size):
            _count_each(counts, maxima[group], middle)
        for t in range(n):
            if low[t] >= high[t]:
                continue
            if counts[t] < k:
                high[t] = middle[t] - 1
            else:
                low[t] = middle[t]
                high[t] = middle[t] if counts[t] <= k + slack else high[t]


@_compile
def _slack(threshold, error):
    """Return a bound on the difference of an exact number and its bfloat16 near a threshold.

    It is `error`, the bound before the rounding to bfloat16, plus the error of the rounding; 2 % are added for the rounding of `error`.
    """
    return np.float32(1.02) * (error + _ROUNDING * abs(threshold))


@_compile
def _rough_key(number):
    """Return the key of a float32 rounded down to bfloat16."""
    return _key(number) >> 16


@_compile
def _reaching_each(keys, thresholds, reaching):
    """Write the positions of keys that reach their thresholds, and return their number."""
    n = np.uintp(0)
    for i in range(len(keys)):
        reaching[n] = i
        n += np.uintp(keys[i] >= thresholds[i])
    return np.int64(n)


@_compile
def _reaching_among(bits, thresholds, tokens, reaching):
    """Write the tokens whose numbers, given as in `_to_keys`, reach their thresholds, and return the number of tokens."""
    n = np.uintp(0)
    for i in range(len(tokens)):
        token = np.uintp(tokens[i])
        reaching[n] = token
        n += np.uintp((bits[token] if bits[token] >= 0 else bits[token] ^ np.int16(0x7FFF)) >= thresholds[token])
    return np.int64(n)


@_compile
def _add_candidates(feature, bits, sure, tokens, x, weights, bias, candidates, scores, n_candidates, n_unsure):
    """Append a feature to the candidates of each token.

    A feature whose key reaches `sure` is stored at the front, with its pre-activation. Others are stored from the end, with their key.
    """
    capacity = candidates.shape[1]
    for i in range(len(tokens)):
        token = tokens[i]
        key = bits[token] if bits[token] >= 0 else bits[token] ^ np.int16(0x7FFF)
        if key >= sure[token]:
            n = n_candidates[token]
            n_candidates[token] = n + 1
            if n < capacity:  # one token at a time: equal tokens then have the same bits
                candidates[token, n], scores[token, n] = feature, _dot(weights, x[token]) + bias
        else:
            n_unsure[token] += 1
            if n_unsure[token] <= capacity:
                candidates[token, capacity - n_unsure[token]], scores[token, capacity - n_unsure[token]] = feature, key


@_compile
def select_topk_exactly(rough, bias, x, errors, W_enc, memory, indices, values):
    """Select the k largest pre-activations of tokens x `[n, d]`, given pre-activations in bfloat16: rough `[m, n]`, as int16, with bias.

    Before they were rounded, their errors were at most errors `[n]`. At least k of the largest are computed again in float32, then all
    others that may be larger than the k-th of these. The selection is therefore that of float32 pre-activations, summed in the order of
    `_dot`; of equal ones those of the lowest index are selected.

    Returns the number of tokens with more candidates than the memory holds; they are the first entries of the memory's ``tokens``.
    """
    maxima, candidates, scores, score_bits, n_candidates, n_unsure = memory[:6]
    sure, high, least, counts, tokens, some, reaching, keys = memory[6:]
    (m, n), k, size, capacity = rough.shape, indices.shape[1], len(maxima), candidates.shape[1]
    noted, parts = (candidates, scores, n_candidates, n_unsure), m // size
    for group in range(size):
        _to_keys(rough[group * parts], maxima[group])
        for feature in range(group * parts + 1, (group + 1) * parts):
            _largest_keys(rough[feature], maxima[group])
    _thresholds(maxima, k, max(k // 4, _PARTS), sure, high, least, counts)
    for t in range(n):
        threshold = _number(np.int32(sure[t]) << 16)
        least[t] = _rough_key(threshold - np.float32(2) * _slack(threshold, errors[t]))
        tokens[t], n_candidates[t], n_unsure[t] = t, 0, 0
    for group in range(size):
        n_some = _reaching_each(maxima[group], least, some)
        for feature in range(group * parts, (group + 1) * parts if n_some > 0 else 0):
            n_reaching = _reaching_among(rough[feature], least, some[:n_some], reaching)
            if n_reaching > 0:
                _add_candidates(feature, rough[feature], sure, reaching[:n_reaching], x, W_enc[feature], bias[feature], *noted)
    for feature in range(size * parts, m):
        n_reaching = _reaching_among(rough[feature], least, tokens[:n], reaching)
        _add_candidates(feature, rough[feature], sure, reaching[:n_reaching], x, W_enc[feature], bias[feature], *noted)
    n_left_out = 0
    for t in range(n):
        n_exact, n_others = n_candidates[t], n_unsure[t]
        if n_exact + n_others > capacity:
            tokens[n_left_out] = t
            n_left_out += 1
            continue
        if n_exact >= k:
            _to_keys(score_bits[t], keys[:n_exact])
            reached, _ = _bounds(keys, n_exact, k, k // 8, np.int64(0))
            threshold = _number(reached)
            low = _rough_key(threshold - _slack(threshold, errors[t]))
            for i in range(capacity - n_others, capacity):
                if scores[t, i] >= low:
                    feature = candidates[t, i]
                    candidates[t, n_exact], scores[t, n_exact] = feature, _dot(W_enc[feature], x[t]) + bias[feature]
                    n_exact += 1
        _to_keys(score_bits[t], keys[:n_exact])
        _select(candidates[t, :n_exact], scores[t], keys, k, indices[t], values[t])
    return n_left_out
