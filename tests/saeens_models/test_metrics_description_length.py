"""Description length against entropies that scipy computes from dense codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy
from torch import Tensor

import saeens_models as sm
from saeens_models.metrics import DescriptionLengthMetric, description_length
from saeens_models.metrics.description_length import MAX_STEPS
from saeens_models.sparse_code import SparseCode

STEP = 0.05


def _dictionary(n_features: int, seed: int = 0) -> Tensor:
    return torch.randn(n_features, 6, generator=torch.Generator().manual_seed(seed))


def _code(n_features: int, seed: int = 0, n: int = 400) -> Tensor:
    """Features of different rates, magnitudes of different scales."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, n_features, generator=generator) < torch.linspace(0, 0.9, n_features)
    return fires * torch.rand(n, n_features, generator=generator) * torch.linspace(0.1, 2, n_features)


def _dense_bits(z: Tensor, W_dec: Tensor, step: float = STEP) -> float:
    """Compute the definition from a dense code in float64."""
    fires = z.numpy() != 0
    p = fires.mean(axis=0)
    which = entropy(np.stack([p, 1 - p]), base=2).sum()
    magnitudes = (z.double() * W_dec.double().norm(dim=1)).numpy()[fires]
    _, counts = np.unique(np.round(magnitudes / step), return_counts=True)
    return which + fires.sum(axis=1).mean() * entropy(counts, base=2)


@pytest.mark.parametrize("step", [0.01, 0.05, 1.0, 100.0])
def test_bits_are_the_entropies_of_firings_and_of_magnitudes(step: float) -> None:
    z, W_dec = _code(24), _dictionary(24)
    assert description_length(z, W_dec, step) == pytest.approx(_dense_bits(z, W_dec, step), rel=1e-3)


def test_description_length_of_three_features_equals_a_hand_computation() -> None:
    """One feature fires on every other token with two equally frequent magnitudes, one on all with the same, one never."""
    z = torch.tensor([[1.0, 3.0, 0.0], [0.0, 3.0, 0.0], [2.0, 3.0, 0.0], [0.0, 3.0, 0.0]])
    # one bit says whether the first fires; 1.5 magnitudes per token, of which 4 / 6 are 3, 1 / 6 are 1 and 1 / 6 are 2
    magnitude = 4 / 6 * np.log2(6 / 4) + 2 / 6 * np.log2(6)
    assert description_length(z, torch.eye(3), 1.0) == pytest.approx(1 + 1.5 * magnitude, rel=1e-12)


@pytest.mark.parametrize("kind", [sm.Bagging, sm.Boosting])
def test_prefixes_are_the_codes_of_the_first_members(kind) -> None:
    saes = [sm.build_sae(sm.SAEConfig(architecture="topk", d_in=6, d_sae=width, k=3, init_seed=width)) for width in (8, 12, 5)]
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    metric = DescriptionLengthMetric([sae.W_dec.norm(dim=1) for sae in saes], STEP)
    with torch.no_grad():
        for rows in x.split(70):
            metric.update(kind(saes).encode(rows, scaled=False))
        for n, bits in enumerate(metric.compute_prefixes(), start=1):
            ensemble = kind(saes[:n])
            assert bits == pytest.approx(_dense_bits(ensemble.encode(x, scaled=False), ensemble.W_dec), rel=1e-3)
    assert metric.compute() == metric.compute_prefixes()[-1]


def test_the_same_member_twice_costs_twice_as_much() -> None:
    """Bagging's factor 1/J does not shorten the description: the members' own codes are sent."""
    z, W_dec = _code(24), _dictionary(24)
    twice = description_length(torch.cat([z, z], dim=1), torch.cat([W_dec, W_dec]), STEP)
    assert twice == pytest.approx(2 * description_length(z, W_dec, STEP), rel=1e-12)


@given(seed=st.integers(0, 2**16), scale=st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_description_length_is_invariant_to_feature_order_and_decoder_scale(seed: int, scale: float) -> None:
    z, W_dec = _code(24), _dictionary(24)
    expected = description_length(z, W_dec, STEP)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    assert description_length(z[:, order], W_dec[order], STEP) == pytest.approx(expected, rel=1e-12)
    assert description_length(z * scale, W_dec / scale, STEP) == pytest.approx(expected, rel=1e-3)  # up to rounding at the edges of steps
    assert description_length(z * 4, W_dec, STEP * 4) == expected


@given(cuts=st.lists(st.integers(0, 400), max_size=6))
@settings(max_examples=20, deadline=None)
def test_description_length_does_not_depend_on_batching(cuts: list[int]) -> None:
    z, W_dec = _code(24), _dictionary(24)
    assert description_length(z.tensor_split(sorted(cuts)), W_dec, STEP) == description_length(z, W_dec, STEP)


def test_description_length_of_a_sparse_code_equals_that_of_the_dense_code() -> None:
    z, W_dec = _code(24), _dictionary(24)
    assert description_length(SparseCode.from_dense(z), W_dec, STEP) == description_length(z, W_dec, STEP)


def test_signs_are_coded_and_large_magnitudes_share_the_last_step() -> None:
    z = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    assert description_length(z, torch.eye(1), 1.0) == pytest.approx(1.0)
    z = torch.tensor([[2.0], [3.0]]) * MAX_STEPS
    assert description_length(z, torch.eye(1), 1.0) == 0


def test_a_dictionary_that_never_fires_costs_nothing() -> None:
    assert description_length(torch.zeros(5, 3), torch.eye(3), STEP) == 0


def test_description_length_refuses_missing_tokens_wrong_shapes_and_steps() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        description_length([], torch.eye(3), STEP)
    with pytest.raises(ValueError, match=r"must be \[n, 4\]; got \[2, 3\]"):
        description_length(torch.zeros(2, 3), torch.zeros(4, 2), STEP)
    with pytest.raises(ValueError, match="step must be positive; got 0"):
        description_length(torch.zeros(2, 3), torch.zeros(3, 2), 0)
    with pytest.raises(ValueError, match="norms must be"):
        DescriptionLengthMetric([], STEP)
