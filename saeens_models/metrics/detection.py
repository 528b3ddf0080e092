"""Detection score: how well an explanation of a feature predicts the texts on which the feature fires."""

from collections.abc import Sequence
from typing import NamedTuple


class DetectionScore(NamedTuple):
    """Accuracy of a language model's predictions: on which texts is a feature active?"""

    balanced_accuracy: float
    """Mean of the true positive rate and of 1 - false positive rate; 0.5 is chance, for any share of positive predictions."""
    true_positive_rate: float
    """Share of positive predictions among texts on which the feature fires."""
    false_positive_rate: float
    """Share of positive predictions among the other texts."""


def detection_score(said: Sequence[bool], fires: Sequence[bool]) -> DetectionScore:
    """Return the detection score of Paulo et al. (arXiv 2410.13928) as balanced accuracy.

    said: predictions `[n_texts]`; fires: activity `[n_texts]`, in the same order. Raises ValueError for different lengths, and unless the
    feature fires on some of the texts and not on others.
    """
    positive = [answer for answer, does in zip(said, fires, strict=True) if does]
    negative = [answer for answer, does in zip(said, fires, strict=True) if not does]
    if not positive or not negative:
        raise ValueError(f"a detection score needs texts on which the feature fires and others; got {len(positive)} and {len(negative)}")
    true_positive_rate, false_positive_rate = sum(positive) / len(positive), sum(negative) / len(negative)
    return DetectionScore((true_positive_rate + 1 - false_positive_rate) / 2, true_positive_rate, false_positive_rate)
