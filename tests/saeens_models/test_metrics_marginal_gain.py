"""Marginal gains and suggested sizes against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from saeens_models.metrics import diversity, gains, new_features, suggested_size


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


def test_gains_add_up_to_the_value_of_the_whole_ensemble():
    assert gains([0.7, 0.75, 0.74]) == pytest.approx([0.7, 0.05, -0.01])
    assert sum(gains([0.1, 0.4, 0.3, 0.9])) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ([0.5], 1),
        ([0.5, 0.5, 0.5], 1),
        ([0.5, 0.52, 0.53], 1),  # 4 % and 2 % of the remaining gain
        ([0.5, 0.53, 0.54], 2),  # 6 %, then 2 %
        ([0.5, 0.6, 0.602, 0.64], 4),  # a poor member before one of 9.5 % does not end it
        ([0.98, 0.982, 0.9821], 2),  # 10 % of a small remaining gain counts as much
        ([0.5, 0.75, 0.875, 0.9375], 4),
        ([0.5, 0.4, 0.3], 1),
        ([-0.2, -0.1, -0.08], 2),  # worse than the mean: 8 % of the gain that remains to 1, then 2 %
        ([1.0, 1.0], 1),
    ],
)
def test_the_suggested_size_is_the_last_worthwhile_member(values: list[float], size: int):
    assert suggested_size([values]) == size


def test_a_member_that_improves_one_measure_is_worthwhile():
    variance, stability = [0.7, 0.75, 0.751, 0.752], [0.5, 0.5, 0.6, 0.601]
    assert suggested_size([variance]) == 2
    assert suggested_size([variance, stability]) == 3
    assert suggested_size([variance, [0.5, 0.4, 0.3, 0.2]]) == 2


def test_later_members_change_the_suggested_size_only_if_worthwhile():
    values = [0.5, 0.6, 0.61]
    assert suggested_size([values]) == suggested_size([[*values, 0.615, 0.62]]) == 2
    assert suggested_size([[*values, 0.7]]) == 4


def test_the_share_of_the_gain_is_an_argument():
    assert suggested_size([[0.5, 0.52, 0.53]], share=0.02) == 3


@pytest.mark.parametrize("measures", [[], [[]], [[0.5], [0.5, 0.6]]], ids=["none", "empty", "different lengths"])
def test_measures_of_different_lengths_are_refused(measures: list[list[float]]):
    with pytest.raises(ValueError, match="one value for each number of members"):
        suggested_size(measures)
