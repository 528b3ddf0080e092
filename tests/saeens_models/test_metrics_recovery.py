"""Recovery of true features, against definitions written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeens_models.metrics import Recovery, recovery, recovery_by_chance, recovery_equal_rows


def _written_out(features: np.ndarray, W_dec: np.ndarray, threshold: float = 0.9) -> tuple[float, float, float]:
    a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, W_dec))
    cosines = a @ b.T
    of_features, of_rows = cosines.max(1), cosines.max(0)
    return (of_features >= threshold).mean(), of_features.mean(), (of_rows >= threshold).mean()


def _dictionaries(n_true: int = 40, n_rows: int = 70, d_in: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """True features, and rows that are noisy copies of them, of any length and sign, with a few random ones."""
    generator = np.random.default_rng(0)
    features = generator.standard_normal((n_true, d_in))
    rows = features[generator.integers(n_true, size=n_rows)] * generator.choice([-1, 1, 3], size=(n_rows, 1))
    return features, rows + generator.standard_normal((n_rows, d_in)) * 0.4


def test_recovery_equals_its_definition():
    features, rows = _dictionaries()
    found = recovery(torch.from_numpy(features), torch.from_numpy(rows))
    assert found == pytest.approx(_written_out(features, rows), abs=1e-6)
    assert 0 < found.recovered_fraction < 1
    assert found.precision != found.recovered_fraction


@pytest.mark.parametrize("threshold", [0.5, 0.99])
def test_the_threshold_is_inclusive_and_can_be_set(threshold: float):
    features, rows = _dictionaries()
    found = recovery(torch.from_numpy(features), torch.from_numpy(rows), threshold)
    assert found == pytest.approx(_written_out(features, rows, threshold), abs=1e-6)


def test_the_true_dictionary_in_any_order_and_scale_is_recovered_and_its_negative_is_not():
    features = torch.from_numpy(_dictionaries()[0])
    shuffled = features[torch.randperm(len(features), generator=torch.Generator().manual_seed(0))]
    assert recovery(features, shuffled * 7) == pytest.approx((1, 1, 1), abs=1e-6)
    few = torch.eye(4)
    assert recovery(few, -few) == Recovery(0.0, 0.0, 0.0)
    assert recovery(few, few[:1]) == Recovery(0.25, 0.25, 1.0)


def test_at_equal_rows_is_the_mean_over_seeded_draws():
    features, rows = (torch.from_numpy(each) for each in _dictionaries())
    generator = torch.Generator().manual_seed(3)
    drawn = [rows[torch.randperm(len(rows), generator=generator)[:20]] for _ in range(10)]
    expected = np.mean([_written_out(features.numpy(), each.numpy()) for each in drawn], axis=0)
    assert recovery_equal_rows(features, rows, 20, seed=3) == pytest.approx(tuple(expected), abs=1e-6)
    assert recovery_equal_rows(features, rows, len(rows)) == recovery(features, rows)


def test_recovery_grows_with_rows_and_copies_add_nothing():
    features, rows = (torch.from_numpy(each) for each in _dictionaries())
    whole, half, doubled = recovery(features, rows), recovery(features, rows[::2]), recovery(features, torch.cat([rows, rows]))
    assert whole.recovered_fraction > half.recovered_fraction
    assert doubled == pytest.approx(whole, abs=1e-6)
    assert recovery_equal_rows(features, torch.cat([rows, rows]), len(rows)).recovered_fraction < whole.recovered_fraction


def test_chance_in_two_dimensions_is_the_share_of_the_circle():
    """A random direction is within arccos 0.9 of a feature with probability p = 2 arccos 0.9 / 2 pi; of n, one is with 1 - (1 - p)^n."""
    features = torch.eye(2).repeat(500, 1)
    p = np.arccos(0.9) / np.pi
    found = [recovery_by_chance(torch.eye(2), 3, seed=seed, draws=50) for seed in range(20)]
    assert np.mean([each.recovered_fraction for each in found]) == pytest.approx(1 - (1 - p) ** 3, abs=4 * np.sqrt(0.25 / 2000))
    assert recovery_by_chance(features, 3, seed=1) == recovery_by_chance(features, 3, seed=1)


@pytest.mark.parametrize(
    ("features", "rows", "said"),
    [
        (torch.eye(3), torch.zeros(2, 3), "2 of 2 dictionary rows are zero"),
        (torch.eye(3), torch.eye(4), "different d_in"),
        (torch.eye(3), torch.empty(0, 3), "both positive"),
    ],
)
def test_bad_dictionaries_are_errors(features: torch.Tensor, rows: torch.Tensor, said: str):
    with pytest.raises(ValueError, match=said):
        recovery(features, rows)


@pytest.mark.parametrize("n_rows", [0, 4])
def test_more_rows_than_there_are_cannot_be_drawn(n_rows: int):
    with pytest.raises(ValueError, match="between 1 and the 3 rows"):
        recovery_equal_rows(torch.eye(3), torch.eye(3), n_rows)
