"""Marginal gains and suggested sizes against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from saeens_models.metrics import Gain, diversity, is_worthwhile, new_features, suggested_size


def test_new_features_are_below_the_threshold_to_all_earlier_members():
    first = torch.tensor([[1.0, 0, 0], [0, 2, 0]])
    second = torch.tensor([[1.0, 1, 0], [0, 0, 3], [1, 0.1, 0]])  # cosines to the nearest: 0.71, 0, 0.995
    third = torch.tensor([[0.0, -1, 0], [0, 0.1, 5]])  # an opposite direction is new; the other is the second member's
    assert new_features([first, second, third]) == [2, 1, 1]
    assert new_features([first, second, third], threshold=0.72) == [2, 2, 1]


@pytest.mark.parametrize("threshold", [0.7, 0.4])
def test_new_features_agree_with_scikit_learn_for_members_of_different_sizes(threshold: float):
    generator = torch.Generator().manual_seed(0)
    members = [torch.randn(size, 6, generator=generator) for size in (30, 1100, 45, 60)]
    expected = [30]
    for j in range(1, 4):
        cosines = cosine_similarity(members[j], torch.cat(members[:j]))
        expected.append(int((cosines.max(axis=1) < threshold).sum()))
    assert new_features(members, threshold) == expected


def test_a_copied_member_has_no_new_features_and_duplicates_within_a_member_count_each():
    W_dec = torch.eye(4)[[0, 1, 1, 2]]
    assert new_features([W_dec, W_dec]) == [4, 0]
    assert diversity(W_dec) == 2


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        (Gain(0.5, 0.026, 0.04), True),  # 5 % of 0.5 is 0.025
        (Gain(0.5, 0.01, 0.024), False),
        (Gain(0.5, 0.024, 0.026), None),
        (Gain(0.02, 0.0011, 0.002), True),  # 5 % of a small remaining gain counts as much
        (Gain(0.5, 0.026, 0.04, cost=2.0), False),  # twice the FLOPs of the first member: 0.05
        (Gain(0.5, 0.051, 0.06, cost=2.0), True),
        (Gain(0.5, 0.014, 0.04, cost=0.5), True),
        (Gain(0.5, -0.1, 0.0), False),
        (Gain(0.0, 0.0, 0.0), False),  # nothing remains
        (Gain(-0.01, -0.002, 0.002), None),  # a loss below that of the activations
        (Gain(0.5, None, None), None),
    ],
)
def test_a_member_is_worthwhile_if_its_whole_interval_exceeds_the_share_per_flop(gain: Gain, expected: bool | None):
    assert gain.is_worthwhile() is expected


def test_the_share_of_the_gain_is_an_argument():
    assert Gain(0.5, 0.011, 0.02).is_worthwhile(share=0.02) is True
    assert is_worthwhile([[Gain(0.5, 0.011, 0.02)]], share=0.02) is True


YES, NO, OPEN = Gain(0.5, 0.1, 0.2), Gain(0.5, 0.0, 0.01), Gain(0.5, 0.0, 0.2)


@pytest.mark.parametrize(
    ("measures", "expected"),
    [
        ([[YES, YES]], True),
        ([[YES, NO]], None),  # seeds that do not agree
        ([[YES, OPEN]], None),
        ([[NO, NO]], False),
        ([[NO], [YES]], True),  # one measure is enough
        ([[OPEN], [YES]], True),
        ([[NO], [OPEN]], None),
        ([[NO], [NO]], False),
        ([], None),
    ],
)
def test_seeds_have_to_agree_and_one_measure_is_enough(measures: list[list[Gain]], expected: bool | None):
    assert is_worthwhile(measures) is expected


@pytest.mark.parametrize(
    ("worthwhile", "size"),
    [
        ([], 1),
        ([False, False], 1),
        ([True, False], 2),
        ([True, False, True], 4),  # a poor member before a good one does not end it
        ([None, True, False], 3),  # an undecided one before a good one neither
        ([True, None], None),
        ([None, False], None),
        ([True, True, True], 4),
    ],
)
def test_the_suggested_size_is_the_last_worthwhile_member_if_nothing_after_it_is_open(worthwhile: list[bool | None], size: int | None):
    assert suggested_size(worthwhile) == size
