"""Concept detection: is a concept found in one, two or five features? k-sparse probing, to the definitions of SAEBench 0.6.

For each label a binary probe tells its texts from as many of the other labels. A text's code is the mean over its tokens. The n features
with the largest ``|mean(positive) - mean(negative)|`` on the training texts are given to a logistic regression (L2, C = 1); its
accuracy on test texts counts (Gurnee et al. 2023, arXiv 2305.01610; Karvonen et al. 2025, arXiv 2503.09532).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saeens_models.probing.pooling import RAW, Dictionary, PooledTexts

N_FEATURES = (1, 2, 5)
NEAR_DUPLICATE_COSINE = 0.7
"""Features whose directions have at least this cosine are counted once in ``accuracy_distinct``; ``diversity`` draws the same line."""
_RANKS_WALKED = 16  # for each feature that is wanted; near-duplicates seldom come in larger numbers


class LabelledTexts(NamedTuple):
    """Numbers of texts, int64 `[n]`, and which of them are positive, bool `[n]`."""

    texts: Tensor
    positive: Tensor


class ConceptProbe(NamedTuple):
    """The texts of one binary probe, half of each split positive."""

    train: LabelledTexts
    test: LabelledTexts


class ConceptScore(NamedTuple):
    """What a probe on the best features of one dictionary achieves."""

    dictionary: Dictionary
    n_features: int
    """of the probe"""
    scaled: bool
    """codes were multiplied by the dictionary's ``scale``, otherwise they are the members' own"""
    accuracy: float
    """on the test texts"""
    n_distinct: int
    """of these features, those left when near-duplicates are counted once"""
    accuracy_distinct: float | None
    """of a probe on as many features of which none is a near-duplicate of a better one; None where there are not that many"""


def one_against_the_others(texts: Mapping[str, Tensor], label: str, generator: torch.Generator) -> LabelledTexts:
    """All texts of a label, and as many of the others: drawn evenly from each, and then down to the number wanted.

    texts: for each label the numbers of its texts, int64. Raises ValueError where there is no other label, or too few texts in the others.
    """
    others = [numbers for other, numbers in texts.items() if other != label]
    if not others:
        raise ValueError(f"a probe for {label!r} needs texts of another label")
    positive = texts[label]
    share = math.ceil(len(positive) / len(others))
    negative = torch.cat([_shuffled(numbers, generator)[:share] for numbers in others])
    if len(negative) < len(positive):
        raise ValueError(f"{label!r} has {len(positive)} texts, of which each of the other labels should have {share}, but some have fewer")
    negative = _shuffled(negative, generator)[: len(positive)]
    return LabelledTexts(torch.cat([positive, negative]), torch.arange(2 * len(positive)) < len(positive))


def detect_concepts(pooled: PooledTexts, probes: Sequence[ConceptProbe]) -> list[list[ConceptScore]]:
    """The scores of every dictionary for each probe.

    The number of features is 1, 2 and 5, and for n members n times that, as many as there are; of the activations also all of them.
    Bagging is scored with scaled codes, too. Memory beside that of ``pooled``: two numbers per column and probe, and the values of the
    features that any probe is given.
    """
    from threadpoolctl import threadpool_limits

    if not probes:
        return []
    groups = [probe.train.texts[probe.train.positive == side] for probe in probes for side in (True, False)]
    means = pooled.means(groups)
    differences = means[0::2] - means[1::2]
    choices = [[_Choice.among(dictionary, difference) for dictionary in pooled.dictionaries] for difference in differences]
    columns = [torch.cat([choice.columns for choice in of_probe]).unique() for of_probe in choices]
    texts = [torch.cat([probe.train.texts, probe.test.texts]) for probe in probes]
    values = pooled.select(list(zip(texts, columns, strict=True)))
    with threadpool_limits(1):  # two threads take longer than one to fit so little
        return [
            [score for choice in of_probe for score in choice.scores(_Trials(probe, found, of_columns))]
            for probe, of_probe, found, of_columns in zip(probes, choices, values, columns, strict=True)
        ]


def probe_accuracy(train: Tensor, train_positive: Tensor, test: Tensor, test_positive: Tensor) -> float:
    """Test accuracy of a logistic regression with intercept, L2, C = 1, at most 1000 iterations: scikit-learn's, as SAEBench's is.

    train, test: `[n, n_features]`; labels bool `[n]`.
    """
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(C=1.0, max_iter=1000).fit(train.double().numpy(), train_positive.numpy())
    return float(probe.score(test.double().numpy(), test_positive.numpy()))


class _Choice(NamedTuple):
    """The features of one dictionary that a probe may be given, the best first; numbers count from the dictionary's first feature."""

    dictionary: Dictionary
    best: Tensor
    distinct: Tensor
    """of the best, those without near-duplicates among the better ones"""
    duplicate: Tensor
    """bool, which of the best have a near-duplicate among the better ones"""

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
                found.append(
                    ConceptScore(
                        dictionary=dictionary,
                        n_features=n,
                        scaled=scale != 1.0,
                        accuracy=trials.accuracy(best, scale),
                        n_distinct=n - int(self.duplicate[:n].sum()),
                        accuracy_distinct=trials.accuracy(distinct, scale) if len(distinct) == n else None,
                    )
                )
        return found


class _Trials:
    """Logistic regressions of one probe, each fitted once."""

    def __init__(self, probe: ConceptProbe, values: Tensor, columns: Tensor) -> None:
        """values: of the probe's training texts and then its test texts at these columns, ascending."""
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
    there_are = len(dictionary.columns)
    numbers = {n * factor for n in N_FEATURES for factor in (1, dictionary.n_members)}
    return sorted({n for n in numbers if n <= there_are} | ({there_are} if dictionary.name == RAW else set()))


def _near_duplicates(directions: Tensor, n_distinct: int) -> Tensor:
    """Which rows, up to the one that completes n_distinct others, have a cosine of NEAR_DUPLICATE_COSINE to an earlier one that has not."""
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
