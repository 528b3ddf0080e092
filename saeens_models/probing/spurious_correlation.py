"""Spurious correlation removal (SCR): ablate the features of an attribute that a biased probe should not use. Defined by SAEBench 0.6.

A biased probe is trained on texts in which a target attribute and a spurious one coincide. The n features with the largest effect on a
probe for the spurious attribute, ``|(mean_pos - mean_neg) * (W_dec @ w_probe)|``, are zeroed, and the biased probe is tested on balanced
texts: ``SCR_n = (acc_ablated - acc_biased) / (acc_clean - acc_biased)``, where acc_clean is the accuracy of a target probe trained on
balanced texts (Karvonen et al. 2025, arXiv 2503.09532, after SHIFT of Marks et al. 2024, arXiv 2403.19647).

Probes are linear in the mean of a text's activations, and the SAE's error term is kept. Zeroing features therefore subtracts
``sum_f scale * mean(z_f) * (W_dec[f] @ w)`` from a probe's logit, and no activation is reconstructed.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from saeens_models.probing.pooling import Dictionary, PooledTexts

N_ABLATED = (2, 5, 10, 20, 50, 100, 500)
MIN_DENOMINATOR = 0.001
"""Smallest difference of accuracy between the clean and the biased probe; below it SCR is 0."""

EPOCHS, BATCH_TEXTS, LEARNING_RATE, L1 = 20, 16, 1e-3, 1e-3
_PAIRS = ((True, True), (True, False), (False, True), (False, False))


class Quadrants(NamedTuple):
    """Numbers of the texts with each pair of (target, spurious) attributes, int64: 2 q where both agree, q where they differ."""

    both: Tensor
    only_target: Tensor
    only_spurious: Tensor
    neither: Tensor

    def check(self) -> int:
        """Return the number q. Raises ValueError for sizes that do not fit."""
        q = len(self.only_target)
        if not q or [len(texts) for texts in self] != [2 * q, q, q, 2 * q]:
            raise ValueError(f"quadrants have 2 q, q, q and 2 q texts, q at least 1; got {[len(texts) for texts in self]}")
        return q

    @property
    def all(self) -> Tensor:
        """All 6 q texts, quadrant after quadrant."""
        return torch.cat(list(self))

    @property
    def balanced(self) -> Tensor:
        """Positions in ``all`` of q texts of each quadrant."""
        q = self.check()
        return torch.cat([torch.arange(q), torch.arange(2 * q, 5 * q)])

    @property
    def agreeing(self) -> Tensor:
        """Positions in ``all`` of the texts in which the attributes agree; the first half has both attributes."""
        q = self.check()
        return torch.cat([torch.arange(2 * q), torch.arange(4 * q, 6 * q)])

    @property
    def labels(self) -> Tensor:
        """bool `[4 q, 2]`: target and spurious attribute of the balanced texts."""
        return torch.tensor(_PAIRS).repeat_interleave(self.check(), dim=0)


class CorrelationTask(NamedTuple):
    """The texts of one pair of attributes."""

    train: Quadrants
    """Training texts."""
    test: Quadrants
    """Test texts."""


class CorrelationScore(NamedTuple):
    """Accuracy of the biased probe after zeroing the n features with the largest effect."""

    dictionary: Dictionary
    """Dictionary of the features."""
    reversed: bool
    """True if the target and the spurious attribute are exchanged."""
    n_ablated: int
    """Number of zeroed features; fewer if fewer have an effect. 0: the biased probe without ablation."""
    accuracy_biased: float
    """Accuracy of the biased probe."""
    accuracy_clean: float
    """Accuracy of the probe trained on balanced texts."""
    accuracy_ablated: float
    """Accuracy of the biased probe after the ablation."""
    worst_group_accuracy: float
    """Smallest accuracy of the biased probe after the ablation, over the four quadrants."""
    scr: float
    """``SCR_n``."""
    is_scr_metric: bool
    """True if SAEBench's ``scr_metric`` uses this direction: the one with the less accurate biased probe; in a tie neither."""


class LinearProbes(NamedTuple):
    """Linear probes, ``logit = x @ weight + bias``; a positive logit predicts the attribute."""

    weight: Tensor
    """`[d_in, n_probes]`"""
    bias: Tensor
    """`[n_probes]`"""


def remove_correlations(pooled: PooledTexts, tasks: Sequence[CorrelationTask], seed: int) -> list[list[CorrelationScore]]:
    """Return the scores of every dictionary for each task, in both directions.

    ``N_ABLATED`` features are zeroed, and for ensembles also n_members times as many, up to the number of features. Codes are scaled as in
    the ensemble's reconstruction. ``seed`` decides the probes' initial weights and the order of texts. Memory in addition to ``pooled``:
    eight numbers per column and task, and a logit per test text and score.
    """
    if not tasks:
        return []
    raw = torch.tensor(pooled.dictionaries[-1].columns)
    balanced = [task.train.all[task.train.balanced] for task in tasks]
    means = pooled.means([quadrant for texts in balanced for quadrant in texts.chunk(4)]).view(len(tasks), 4, -1)
    activations = pooled.select([(quadrants.all, raw) for task in tasks for quadrants in task])
    ablations = [
        _Ablations(task, pooled.dictionaries, of_quadrants, (x_train, x_test), seed)
        for task, of_quadrants, x_train, x_test in zip(tasks, means, activations[0::2], activations[1::2], strict=True)
    ]
    for first, values in pooled:
        for of_task in ablations:
            of_task.update(first, values)
    return [list(of_task.scores()) for of_task in ablations]


def train_probes(x: Tensor, positive: Tensor, x_test: Tensor, positive_test: Tensor, seed: int) -> LinearProbes:
    """Train linear probes side by side, and return each at the first epoch of its best test accuracy, as SAEBench does.

    x: `[n, n_probes, d_in]`, positive: bool `[n, n_probes]`, and the same for test texts. 20 epochs of AdamW (learning rate 1e-3) in
    batches of 16 on the mean binary cross-entropy plus 1e-3 times the sum of absolute weights. Weights are initialised as in
    ``torch.nn.Linear``. All probes see the texts in the same order.
    """
    _, n_probes, d_in = x.shape
    generator = torch.Generator().manual_seed(seed)
    bound = d_in**-0.5
    weight = torch.nn.Parameter(torch.empty(n_probes, d_in).uniform_(-bound, bound, generator=generator))
    bias = torch.nn.Parameter(torch.empty(n_probes).uniform_(-bound, bound, generator=generator))
    optimizer = torch.optim.AdamW([weight, bias], lr=LEARNING_RATE)
    target = positive.float()
    best = LinearProbes(torch.empty(d_in, n_probes), torch.empty(n_probes))
    best_accuracy = torch.full((n_probes,), -1.0)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(x), generator=generator).split(BATCH_TEXTS):
            with torch.no_grad():
                inputs = x[chosen]
                error = ((torch.einsum("npd,pd->np", inputs, weight) + bias).sigmoid() - target[chosen]) / len(chosen)
                weight.grad = torch.einsum("np,npd->pd", error, inputs) + L1 * weight.sign()
                bias.grad = error.sum(0)
            optimizer.step()
        with torch.no_grad():
            logits = torch.einsum("npd,pd->np", x_test, weight) + bias
            accuracy = ((logits > 0) == positive_test).float().mean(0)
            better = accuracy > best_accuracy
            best_accuracy[better] = accuracy[better]
            best.weight[:, better], best.bias[better] = weight[better].T, bias[better]
    return best


def scr(accuracy_ablated: float, accuracy_biased: float, accuracy_clean: float) -> float:
    """Return ``(ablated - biased) / (clean - biased)``, or 0 if the denominator is below ``MIN_DENOMINATOR``."""
    possible = accuracy_clean - accuracy_biased
    return 0.0 if possible < MIN_DENOMINATOR else (accuracy_ablated - accuracy_biased) / possible


def _examples(quadrants: Quadrants, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of the probes for the target, for the spurious attribute and for both; x: activations of all texts."""
    has_both = torch.arange(len(quadrants.agreeing)) < len(quadrants.agreeing) // 2
    balanced = x[quadrants.balanced]
    return torch.stack([balanced, balanced, x[quadrants.agreeing]], dim=1), torch.cat([quadrants.labels, has_both[:, None]], dim=1)


class _Ablation(NamedTuple):
    """The ablations of one dictionary in one direction."""

    dictionary: Dictionary
    reversed: bool
    numbers: list[int]
    """Numbers of zeroed features, ascending."""
    columns: Tensor
    """Columns of the features, the most effective first."""
    decoded: Tensor
    """Effect of each feature on the biased probe's logit, per unit of its code."""
    shifts: Tensor
    """`[n_texts, len(numbers)]`: effect of the zeroed features on the logit of each balanced test text."""


class _Ablations:
    """The ablations of one task: codes with features zeroed, and their scores.

    means: float64 `[4, n_columns]`, of the balanced training texts by quadrant; x: `[6 q, d_in]` of the training and of the test texts.
    """

    def __init__(
        self, task: CorrelationTask, dictionaries: Sequence[Dictionary], means: Tensor, x: tuple[Tensor, Tensor], seed: int
    ) -> None:
        x_train, x_test = x
        probes = train_probes(*_examples(task.train, x_train), *_examples(task.test, x_test), seed=seed)
        self._texts, self._labels = task.test.all[task.test.balanced], task.test.labels
        self._logits = x_test[task.test.balanced] @ probes.weight + probes.bias
        both, only_target, only_spurious, neither = means
        of_target, of_spurious = (both + only_target - only_spurious - neither) / 2, (both + only_spurious - only_target - neither) / 2
        self._ablations: list[_Ablation] = []
        for dictionary in dictionaries:
            decoded = dictionary.decoded(probes.weight).cpu()
            features = slice(dictionary.columns.start, dictionary.columns.stop)
            numbers = [0, *sorted({n * factor for n in N_ABLATED for factor in (1, dictionary.n_members)})]
            numbers = [n for n in numbers if n <= len(decoded)]
            for is_reversed, difference, probe in ((False, of_spurious, 1), (True, of_target, 0)):
                effects = (difference[features] * decoded[:, probe]).abs()
                order = effects.argsort(descending=True, stable=True)[: numbers[-1]]
                zeroed = order[effects[order] > 0]
                each = dictionary.scale * decoded[zeroed, 2]
                shifts = torch.zeros(len(self._texts), len(numbers))
                self._ablations.append(_Ablation(dictionary, is_reversed, numbers, zeroed + features.start, each, shifts))

    def update(self, first: int, values: Tensor) -> None:
        """Add the pooled texts from number ``first`` on, `[n_texts, n_columns]`."""
        here = ((self._texts >= first) & (self._texts < first + len(values))).nonzero().flatten()
        if not len(here):
            return
        of_test = values[(self._texts[here] - first).to(values.device)].cpu()
        for each in self._ablations:
            summed = F.pad((of_test[:, each.columns] * each.decoded).double().cumsum(1), (1, 0))
            each.shifts[here] = summed[:, [min(n, len(each.columns)) for n in each.numbers]].float()

    def scores(self) -> Iterator[CorrelationScore]:
        is_right = (self._logits > 0)[:, :, None] == self._labels[:, None, :]  # [n_texts, n_probes, 2 attributes]
        clean = [_accuracy(is_right[:, attribute, attribute]) for attribute in (0, 1)]
        biased = [_accuracy(is_right[:, 2, attribute]) for attribute in (0, 1)]
        for each in self._ablations:
            attribute = int(each.reversed)
            for number, shift in zip(each.numbers, each.shifts.T, strict=True):
                right = (self._logits[:, 2] - shift > 0) == self._labels[:, attribute]
                ablated = _accuracy(right)
                yield CorrelationScore(
                    dictionary=each.dictionary,
                    reversed=each.reversed,
                    n_ablated=number,
                    accuracy_biased=biased[attribute],
                    accuracy_clean=clean[attribute],
                    accuracy_ablated=ablated,
                    worst_group_accuracy=min(map(_accuracy, right.chunk(4))),
                    scr=scr(ablated, biased[attribute], clean[attribute]),
                    is_scr_metric=biased[attribute] < biased[1 - attribute],
                )


def _accuracy(is_right: Tensor) -> float:
    return is_right.double().mean().item()
