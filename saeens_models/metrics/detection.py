"""How well somebody tells, given an explanation of a feature, the texts on which it fires from others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class DetectionScore(NamedTuple):
    """Answers to "does the feature fire on this text?", against what it does."""

    balanced_accuracy: float
    """mean of the true positive rate and of 1 - false positive rate; 0.5 is chance, whatever share of the texts is said to fit"""
    true_positive_rate: float
    """share of the texts on which it fires that are said to fit"""
    false_positive_rate: float
    """share of the others that are said to fit"""


def detection_score(said: Sequence[bool], fires: Sequence[bool]) -> DetectionScore:
    """The detection score of Paulo et al. (arXiv 2410.13928), as balanced accuracy; both `[n_texts]`, in the same order.

    Raises ValueError for other lengths, and unless the feature fires on some of the texts and not on others.
    """
    positive = [answer for answer, does in zip(said, fires, strict=True) if does]
    negative = [answer for answer, does in zip(said, fires, strict=True) if not does]
    if not positive or not negative:
        raise ValueError(f"a detection score needs texts on which the feature fires and others; got {len(positive)} and {len(negative)}")
    true_positive_rate, false_positive_rate = sum(positive) / len(positive), sum(negative) / len(negative)
    return DetectionScore((true_positive_rate + 1 - false_positive_rate) / 2, true_positive_rate, false_positive_rate)
