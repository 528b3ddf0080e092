"""The inner loops of connectivity, compiled by numba at the first call and cached on disk."""

from typing import Any

import numba
import numpy as np

_compile: Any = numba.njit(nogil=True, cache=True)


@_compile
def set_bits(masks, feature, start):
    """Set the bits of each token's features in ``masks`` uint8 `[n_tokens, n_bytes]`, in the order of ``numpy.packbits``."""
    for token in range(len(masks)):
        for entry in range(start[token], start[token + 1]):
            masks[token, feature[entry] >> 3] |= np.uint8(0x80 >> (feature[entry] & 7))


@_compile
def or_masks(bits, masks, token, start, first_group, last_group, first_word, last_word):  # noqa: PLR0917 - numba takes no keywords
    """OR the masks of the tokens on which a feature fires into its row, for words ``first_word`` to ``last_word - 1``, for all features.

    ``bits`` uint64: the rows of groups ``first_group`` to ``last_group - 1``, 64 per group, each from the word of its own group to the
    end; ``masks`` uint64 `[n_tokens, n_words]`. Feature i fires on ``token[start[i]:start[i + 1]]``.
    """
    n_words = masks.shape[1]
    offset = 0
    for group in range(first_group, last_group):
        width = n_words - group
        first = max(first_word, group)
        for i in range(64):
            entry, last = start[group * 64 + i], start[group * 64 + i + 1]
            if entry < last and first < last_word:
                row = bits[offset + first - group : offset + last_word - group]
                while entry + 4 <= last:  # four masks per pass over the row
                    a = masks[token[entry], first:last_word]
                    b = masks[token[entry + 1], first:last_word]
                    c = masks[token[entry + 2], first:last_word]
                    d = masks[token[entry + 3], first:last_word]
                    for word in range(len(row)):
                        row[word] |= a[word] | b[word] | c[word] | d[word]
                    entry += 4
                while entry < last:
                    a = masks[token[entry], first:last_word]
                    for word in range(len(row)):
                        row[word] |= a[word]
                    entry += 1
            offset += width
