"""Synthetic activations: firing rates, groups, hierarchy, noise and seeds are those of the settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saeens_models.synthetic import MAX_RATE, SyntheticActivations

ROWS = 20_000
SETTINGS: dict[str, Any] = {"n_features": 24, "d_in": 10, "features_per_row": 3, "frequency_exponent": 0.5}


def _fires(**changes: Any) -> tuple[SyntheticActivations, np.ndarray]:
    synthetic = SyntheticActivations(**(SETTINGS | changes))
    return synthetic, synthetic.codes(ROWS, 0).numpy() > 0


@pytest.mark.parametrize("changes", [{}, {"group_size": 4, "correlation": 0.8}, {"children_per_parent": 2}, {"frequency_exponent": 0}])
def test_features_fire_at_their_rates_whatever_they_depend_on(changes: dict[str, Any]):
    synthetic, fires = _fires(**changes)
    rank = np.arange(1, 25.0) ** -synthetic.frequency_exponent
    assert synthetic.firing_rate == pytest.approx(3 * rank / rank.sum())
    assert fires.mean(0) == pytest.approx(synthetic.firing_rate, abs=4 * np.sqrt(0.25 / ROWS))


def test_frequent_features_fire_in_at_most_half_of_the_rows():
    rate = SyntheticActivations(n_features=24, d_in=10, features_per_row=6, frequency_exponent=1.5).firing_rate
    assert rate.max() == MAX_RATE
    assert rate.sum() == pytest.approx(6)
    below = rate[rate < MAX_RATE]
    assert (below[1:] / below[:-1]) == pytest.approx((np.arange(24 - len(below) + 1, 24) / np.arange(24 - len(below) + 2, 25)) ** 1.5)


def test_features_of_a_group_fire_together_and_others_do_not():
    synthetic, fires = _fires(group_size=4, correlation=0.8)
    correlation = np.corrcoef(fires.T)
    same = synthetic.group[:, None] == synthetic.group
    np.fill_diagonal(same, False)
    others = ~same & ~np.eye(24, dtype=bool)
    assert sorted(np.bincount(synthetic.group)) == [4] * 6
    assert correlation[same].min() > 0.2
    assert np.abs(correlation[others]).max() < 5 / np.sqrt(ROWS)


def test_children_fire_only_with_their_parents():
    synthetic, fires = _fires(children_per_parent=2)
    children = np.flatnonzero(synthetic.parent >= 0)
    assert (len(children), set(synthetic.parent[children])) == (16, set(range(8)))
    assert not (fires[:, children] & ~fires[:, synthetic.parent[children]]).any()
    assert fires[:, children].any(0).all()


def test_rows_are_codes_times_features_plus_noise_of_the_given_norm():
    synthetic = SyntheticActivations(**SETTINGS, noise=0.5)
    codes = synthetic.codes(ROWS, 7)
    active = codes[codes > 0]
    assert (active.min().item(), active.max().item()) == pytest.approx((0.5, 1.5), abs=1e-2)
    assert synthetic.features.norm(dim=1).numpy() == pytest.approx(np.ones(24), abs=1e-6)
    noise = synthetic.rows(ROWS, 7) - codes @ synthetic.features
    assert noise.square().sum(1).mean().sqrt().item() == pytest.approx(0.5, rel=0.02)
    assert SyntheticActivations(**SETTINGS).rows(5, 7).numpy() == pytest.approx((codes[:5] @ synthetic.features).numpy(), abs=1)


def test_seed_and_block_decide_every_number():
    first, again, other = (SyntheticActivations(**SETTINGS, noise=0.1, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.rows(9, 0, 4), again.rows(9, 0, 4))
    assert torch.equal(first.features, again.features)
    for different in (first.rows(9, 0, 5), first.rows(9, 1, 4), other.rows(9, 0, 4)):
        assert not torch.equal(first.rows(9, 0, 4), different)
    assert not torch.equal(first.features, other.features)


def test_the_dense_control_has_the_same_mean_and_variance_without_sparsity():
    synthetic = SyntheticActivations(**SETTINGS)
    sparse, dense = synthetic.rows(ROWS, 0).double(), synthetic.rows(ROWS, 0, dense=True).double()
    assert dense.mean(0).numpy() == pytest.approx(sparse.mean(0).numpy(), abs=0.05)
    assert np.cov(dense.numpy().T) == pytest.approx(np.cov(sparse.numpy().T), abs=0.05)
    kurtosis = [float(((x - x.mean(0)) ** 4).mean() / ((x - x.mean(0)) ** 2).mean() ** 2) for x in (sparse, dense)]
    assert kurtosis[1] < kurtosis[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features_per_row": 13}, "at most 12, half of the features"),
        ({"features_per_row": 0}, "above 0"),
        ({"correlation": 0.5}, "set group_size to 2 or more"),
        ({"correlation": 1.0, "group_size": 2}, "below 1"),
        ({"children_per_parent": 1, "frequency_exponent": 0}, "raise frequency_exponent"),
        ({"noise": -1}, "noise and frequency_exponent are at least 0"),
        ({"d_in": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        SyntheticActivations(**(SETTINGS | changes))
