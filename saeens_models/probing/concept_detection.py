"""Concept detection: k-sparse probing with one, two or five features, as defined by SAEBench 0.6.

For each label a binary probe separates its texts from as many texts of the other labels. A text's code is the mean over its tokens. A
logistic regression (L2, C = 1) gets the n features with the largest ``|mean(positive) - mean(negative)|`` on the training texts; its
accuracy on test texts is the score (Gurnee et al. 2023, arXiv 2305.01610; Karvonen et al. 2025, arXiv 2503.09532).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional as F

from saeens_models.probing.pooling import RAW, Dictionary, PooledTexts

N_FEATURES = (1, 2, 5)
NEAR_DUPLICATE_COSINE = 0.7
"""Features whose directions have at least this cosine count once in ``accuracy_distinct``; the threshold of ``diversity``."""
_RANKS_WALKED = 16  # ranked features per distinct feature that are searched; near-duplicates are seldom more numerous


class LabelledTexts(NamedTuple):
    """Texts of a binary probe, with labels."""

    texts: Tensor
    """int64 `[n]`: numbers of the texts."""
    positive: Tensor
    """bool `[n]`: labels."""


class ConceptProbe(NamedTuple):
    """The texts of one binary probe; half of each split is positive."""

    train: LabelledTexts
    """Training texts."""
    test: LabelledTexts
    """Test texts."""


class ConceptScore(NamedTuple):
    """Accuracy of a probe on the best features of one dictionary."""

    dictionary: Dictionary
    """Dictionary of the features."""
    n_features: int
    """Number of features of the probe."""
    scaled: bool
    """True if codes were multiplied by the dictionary's ``scale``, False for the members' own codes."""
    accuracy: float
    """Accuracy on the test texts."""
    n_distinct: int
    """Number of these features, with near-duplicates counted once."""
    accuracy_distinct: float | None
    """Accuracy with as many features of which none is a near-duplicate of a better one; None if there are too few."""


def one_against_the_others(texts: Mapping[str, Tensor], label: str, generator: torch.Generator) -> LabelledTexts:
    """Return all texts of a label and as many texts of the other labels, drawn evenly from each label.

    texts: for each label the numbers of its texts, int64. Raises ValueError without another label, and for too few texts of the others.
    """
    others = [numbers for other, numbers in texts.items() if other != label]
    if not others:
        raise ValueError(f"a probe for {label!r} needs texts of another label")
    positive = texts[label]
    share = math.ceil(len(positive) / len(others))
    negative = torch.cat([_shuffled(numbers, generator)[:share] for numbers in others])
    if len(negative) < len(positive):
        raise ValueError(f"{label!r} has {len(positive)} texts, so each of the other labels needs {share}, but some have fewer")
    negative = _shuffled(negative, generator)[: len(positive)]
    return LabelledTexts(torch.cat([positive, negative]), torch.arange(2 * len(positive)) < len(positive))


def detect_concepts(pooled: PooledTexts, probes: Sequence[ConceptProbe]) -> list[list[ConceptScore]]:
    """Return the scores of every dictionary for each probe.

    Probes have 1, 2 and 5 features, and for n members also n times as many, up to the number of features; for the activations also all
    dimensions. Bagging is also scored with scaled codes. Memory in addition to ``pooled``: two numbers per column and probe, and the
    values of the probes' features.
    """
    if not probes:
        return []
    groups = [probe.train.texts[probe.train.positive == side] for probe in probes for side in (True, False)]
    means = pooled.means(groups)
    differences = means[0::2] - means[1::2]
    choices = [[_Choice.among(dictionary, difference) for dictionary in pooled.dictionaries] for difference in differences]
    columns = [torch.cat([choice.columns for choice in of_probe]).unique() for of_probe in choices]
    texts = [torch.cat([probe.train.texts, probe.test.texts]) for probe in probes]
    values = pooled.select(list(zip(texts, columns, strict=True)))
    with threadpool_limits(1):  # for such small fits two threads take longer than one
        return [
            [score for choice in of_probe for score in choice.scores(_Trials(probe, found, of_columns))]
            for probe, of_probe, found, of_columns in zip(probes, choices, values, columns, strict=True)
        ]


def probe_accuracy(train: Tensor, train_positive: Tensor, test: Tensor, test_positive: Tensor) -> float:
    """Return the test accuracy of scikit-learn's logistic regression, as in SAEBench: intercept, L2, C = 1, at most 1000 iterations.

    train, test: `[n, n_features]`; labels bool `[n]`.
    """
    probe = LogisticRegression(C=1.0, max_iter=1000).fit(train.double().numpy(), train_positive.numpy())
    return float(probe.score(test.double().numpy(), test_positive.numpy()))


class _Choice(NamedTuple):
    """Candidate features of one dictionary for a probe, best first; numbers count from the dictionary's first feature."""

    dictionary: Dictionary
    best: Tensor
    distinct: Tensor
    """The best features without a near-duplicate among better ones."""
    duplicate: Tensor
    """bool: features of ``best`` that have a near-duplicate among better ones."""

    @classmethod
    def among(cls, dictionary: Dictionary, differences: Tensor) -> _Choice:
        of_dictionary = differences[dictionary.columns.start : dictionary.columns.stop].abs()
        order = of_dictionary.argsort(descending=True, stable=True)
        most = _numbers_of_features(dictionary)[-1]
        if dictionary.name == RAW:
            return cls(dictionary, order, order, torch.zeros(len(order), dtype=torch.bool))
        walked = order[: _RANKS_WALKED * most]
        duplicate = _near_duplicates(dictionary.directions(walked), most)
        return cls(dictionary, order[:most], walked[: len(duplicate)][~duplicate][:most], duplicate[:most])

    @property
    def columns(self) -> Tensor:
        return torch.cat([self.best, self.distinct]) + self.dictionary.columns.start

    def scores(self, trials: _Trials) -> list[ConceptScore]:
        dictionary, found = self.dictionary, []
        for scale in dict.fromkeys([1.0, dictionary.scale]):
            for n in _numbers_of_features(dictionary):
                best, distinct = (features[:n] + dictionary.columns.start for features in (self.best, self.distinct))
                accuracy, n_distinct = trials.accuracy(best, scale), n - int(self.duplicate[:n].sum())
                of_distinct = trials.accuracy(distinct, scale) if len(distinct) == n else None
                found.append(ConceptScore(dictionary, n, scale != 1.0, accuracy, n_distinct, of_distinct))
        return found


class _Trials:
    """Logistic regressions of one probe, each fitted once.

    values: codes of the probe's training texts, then of its test texts, at ``columns``, ascending.
    """

    def __init__(self, probe: ConceptProbe, values: Tensor, columns: Tensor) -> None:
        self._probe, self._columns = probe, columns
        self._train, self._test = values.split([len(probe.train.texts), len(probe.test.texts)])
        self._accuracies: dict[tuple[object, ...], float] = {}

    def accuracy(self, columns: Tensor, scale: float) -> float:
        chosen = torch.searchsorted(self._columns, columns.sort().values)
        key = (scale, *chosen.tolist())
        if key not in self._accuracies:
            train, test = (values[:, chosen] * scale for values in (self._train, self._test))
            self._accuracies[key] = probe_accuracy(train, self._probe.train.positive, test, self._probe.test.positive)
        return self._accuracies[key]


def _numbers_of_features(dictionary: Dictionary) -> list[int]:
    available = len(dictionary.columns)
    numbers = {n * factor for n in N_FEATURES for factor in (1, dictionary.n_members)}
    return sorted({n for n in numbers if n <= available} | ({available} if dictionary.name == RAW else set()))


def _near_duplicates(directions: Tensor, n_distinct: int) -> Tensor:
    """Return a mask of rows that are near-duplicates of an earlier distinct row; it ends at the n_distinct-th distinct row."""
    unit = F.normalize(directions, dim=1)
    is_near = (unit @ unit.T >= NEAR_DUPLICATE_COSINE).numpy()
    kept: list[int] = []
    duplicate: list[bool] = []
    for row in is_near:
        duplicate.append(bool(row[kept].any()))
        if not duplicate[-1]:
            kept.append(len(duplicate) - 1)
        if len(kept) == n_distinct:
            break
    return torch.tensor(duplicate)


def _shuffled(numbers: Tensor, generator: torch.Generator) -> Tensor:
    return numbers[torch.randperm(len(numbers), generator=generator)]
