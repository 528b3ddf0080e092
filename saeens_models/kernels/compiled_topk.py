"""Machine code for the CPU, as in :mod:`~saeens_models.kernels.compiled`: which entries of a row, or features of a token, are the largest.

Numbers are compared by integers of the same order, their keys: those of bfloat16 take half the room of float32, and all of them can be
bisected in a few steps.
"""

from __future__ import annotations

import numpy as np

from saeens_models.kernels.compiled import _compile, _dot

_ROUNDING = np.float32(2**-8)
"""Relative error of a number that is rounded to bfloat16, twice over: the other half is for the sum that a bias is added to."""
_TINY = np.float32(1e-36)
"""Added to squares: those of the smallest numbers are 0 in float32, and would leave no room for their errors."""
_PARTS = 8
"""A row is cut into at least so many parts for its selection, and a group takes one entry of each."""
_MOST_PARTS, _GROUPS_PER_SELECTED = 32, 12
"""More parts leave fewer groups to choose from, and more entries in each that is chosen: how many, and how many groups have to remain."""
_MOST_COUNTED = 2**15 - 1
"""The largest int16: the keys of bfloat16 are counted in numbers of their size, so that as many fit into a register."""
_LEAST_KEY = -(2**31)
STRIDE = 64
"""Numbers that a vectorised loop takes at a time; what is left over it takes one by one."""


@_compile
def _key(number):
    """The bits of a float32 as an integer: of two numbers the larger one has the larger key."""
    bits = np.float32(number).view(np.int32)
    return bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)


@_compile
def _number(key):
    """The float32 that has this key."""
    bits = np.int32(key)
    return np.int32(bits if bits >= 0 else bits ^ np.int32(0x7FFFFFFF)).view(np.float32)


@_compile
def _to_keys(bits, keys):
    """The keys of float32 or bfloat16 numbers, which are given as int32 or int16. That of a bfloat16 is the upper half of its float32's."""
    but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    for i in range(len(keys)):
        keys[i] = bits[i] if bits[i] >= 0 else bits[i] ^ but_sign


@_compile
def _largest_keys(bits, keys):
    """The larger of the keys that are there and those of numbers given as in `_to_keys`."""
    but_sign = bits.dtype.type((1 << (8 * bits.itemsize - 1)) - 1)
    for i in range(len(keys)):
        key = bits.dtype.type(bits[i] if bits[i] >= 0 else bits[i] ^ but_sign)  # in wider numbers it takes three times as long
        keys[i] = key if key > keys[i] else keys[i]


@_compile
def _count(keys, threshold):
    least, n = np.int32(threshold), np.int32(0)
    for i in range(len(keys)):
        n = np.int32(n + np.int32(keys[i] >= least))
    return n


@_compile
def _bounds(memory, n, k, slack, guess):
    """Of the first n keys in memory, int32, one that at least k reach, and a larger one that fewer than k reach, by bisection from a guess.

    Ends when at most k + slack reach the lower one, or when nothing lies between the two: the keys between are equal. Less than
    `STRIDE` keys behind them are overwritten.
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
    """Write down where the threshold is reached; how often."""
    n = np.uintp(0)
    for i in range(len(keys)):
        places[n] = i
        n += np.uintp(keys[i] >= threshold)
    return np.int64(n)


@_compile
def n_groups(n, k):
    """Into how many groups of the same size n entries are put of which the k largest are searched: these lie in the groups with the k
    largest maxima. What is left over at the end has no group.
    """
    parts = _PARTS
    while parts < _MOST_PARTS and n >= 2 * parts * _GROUPS_PER_SELECTED * k:
        parts *= 2
    return n // parts if n // parts > 2 * k else n


@_compile
def _candidates(bits, k, guess, keys, places):
    """Where the entries of a row are that may be among the k largest, in the order of the row; and a key that at least k of them reach.

    The row is given as in `_to_keys`, in float32. The entries reach what k of the maxima of its groups reach, each of which has one entry
    in so many.
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
    """Entries that are no numbers, so that the loss shows it."""
    for i in range(first, len(indices)):
        indices[i] = i
        values[i] = np.nan


@_compile
def _select(candidates, scores, keys, k, indices, values):
    """The k candidates with the largest scores, whose keys are given; of equal ones the first."""
    n, n_selected = len(candidates), 0
    if n >= k:
        low, high = _bounds(keys, n, k, np.int64(0), np.int64(0))
        for i in range(n):
            if keys[i] >= high:
                indices[n_selected] = candidates[i]
                values[n_selected] = scores[i]
                n_selected += 1
        for i in range(n):
            if low <= keys[i] < high and n_selected < k:
                indices[n_selected] = candidates[i]
                values[n_selected] = scores[i]
                n_selected += 1
    _select_nothing(n_selected, indices, values)  # too few seem to reach a threshold that is not a number


@_compile
def _add_bias(row, bias):
    """Add it in place. Returns the sum, which is not a number where one of the row is not."""
    total = np.float32(0)
    for i in range(len(row)):
        row[i] += bias[i]
        total += row[i]
    return total


@_compile
def select_topk(pre, bits, bias, keys, places, scores, indices, values):
    """Add the bias `[m]` to each row of pre `[n, m]`, in place, and select its k largest entries: indices, values `[n, k]`.

    `bits` is pre as int32: the same memory. keys `[m + STRIDE]`, places `[2 m]` and scores `[m]` are memory to work in.
    """
    (n, m), k, guess = pre.shape, indices.shape[1], np.int64(0)
    for b in range(n):
        row = pre[b]
        if np.isnan(_add_bias(row, bias)):  # its key may be the smallest
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
    """Round rows `[n, d]` to bfloat16, the first d of each row of rough, as int16: to nearest, of two the even one. Their norms `[n]`, and
    how far they are from what they are rounded to.
    """
    for b in range(len(rows)):
        row, to, square, square_off = rows[b], rough[b], _TINY, _TINY
        for i in range(len(row)):
            bits = np.float32(row[i]).view(np.int32)
            rounded = np.int32(bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16)
            rounded = rounded if row[i] == row[i] else np.int32(0x7FC0)  # what is not a number might be rounded to one
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
    """For each token a key that at least k of the maxima `[g, n]` reach, low `[n]`, by bisection of all at once.

    Ends when at most k + slack reach it, or when fewer than k reach any larger one, or `_MOST_COUNTED` if k is more.
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
    """By how much an exact number and its rough one may differ near a threshold: `error` before the rounding to bfloat16, and the share
    that is lost in it; 2 % more is for the share of the share.
    """
    return np.float32(1.02) * (error + _ROUNDING * abs(threshold))


@_compile
def _rough_key(number):
    """The key of a float32 in bfloat16, rounded down."""
    return _key(number) >> 16


@_compile
def _reaching_each(keys, thresholds, reaching):
    """Where keys reach their thresholds; how often."""
    n = np.uintp(0)
    for i in range(len(keys)):
        reaching[n] = i
        n += np.uintp(keys[i] >= thresholds[i])
    return np.int64(n)


@_compile
def _reaching_among(bits, thresholds, tokens, reaching):
    """Those of the tokens whose numbers, given as in `_to_keys`, reach their thresholds; how many."""
    n = np.uintp(0)
    for i in range(len(tokens)):
        token = np.uintp(tokens[i])
        reaching[n] = token
        n += np.uintp((bits[token] if bits[token] >= 0 else bits[token] ^ np.int16(0x7FFF)) >= thresholds[token])
    return np.int64(n)


@_compile
def _add_candidates(feature, bits, sure, tokens, x, weights, bias, candidates, scores, n_candidates, n_unsure):
    """Note a feature for tokens: its pre-activation where it reaches `sure`, else its key, from the end of the memory on."""
    capacity = candidates.shape[1]
    for i in range(len(tokens)):
        token = tokens[i]
        key = bits[token] if bits[token] >= 0 else bits[token] ^ np.int16(0x7FFF)
        if key >= sure[token]:
            n = n_candidates[token]
            n_candidates[token] = n + 1
            if n < capacity:  # one token at a time: equal ones then have the same bits
                candidates[token, n], scores[token, n] = feature, _dot(weights, x[token]) + bias
        else:
            n_unsure[token] += 1
            if n_unsure[token] <= capacity:
                candidates[token, capacity - n_unsure[token]], scores[token, capacity - n_unsure[token]] = feature, key


@_compile
def select_topk_exactly(rough, bias, x, errors, W_enc, memory, indices, values):
    """As `select_topk` for what is rough in bfloat16, given as int16: rough `[m, n]`, pre-activations with the bias of x `[n, d]`.

    Before they were rounded they were off by at most errors `[n]`. At least k of the largest rough ones are computed again in float32,
    and then all others that may be larger than the k-th of these. So the k are those of float32, in the order of summation of `_dot`; of
    equal ones any may be selected.

    Returns how many tokens have more candidates than there is memory for; they are the first of its ``tokens`` then.
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
