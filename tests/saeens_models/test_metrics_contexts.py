"""Contexts and histograms of features against loops over dense codes, and output tokens against a dense sort."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saeens_models as sm
from saeens_models import evaluation
from saeens_models.evaluation import feature_contexts
from saeens_models.metrics import HISTOGRAM_BINS, FeatureContextsMetric, output_tokens
from saeens_models.sparse_code import SparseCode

N_FEATURES, WINDOW, N_CONTEXTS, RADIUS = 12, 10, 4, 3


def _code() -> tuple[Tensor, Tensor]:
    """Rates from never to always, values of few levels, so that many are equal, and windows with places that have no code."""
    generator = torch.Generator().manual_seed(3)
    place = (torch.rand(300, generator=generator) < 0.8).nonzero().flatten()
    place = place[(place % WINDOW != 0) & (place // WINDOW != 7)]  # a whole window, too, has none
    fires = torch.rand(len(place), N_FEATURES, generator=generator) < torch.linspace(0, 1, N_FEATURES).square()
    scale = 2.0 ** torch.arange(-4, N_FEATURES - 4)
    return fires * torch.randint(1, 30, fires.shape, generator=generator) / 8 * scale, place


def _contexts(batches):
    metric = FeatureContextsMetric(N_FEATURES, WINDOW, N_CONTEXTS, RADIUS)
    for z, place in batches:
        metric.update(z, place)
    return metric.compute()


def _check(found, z: np.ndarray, place: np.ndarray, window: int = WINDOW) -> None:
    for i, column in enumerate(z.T):
        text = np.zeros(place[-1] + 1 + window)
        text[place] = column
        maxima = []  # of windows: -value, place
        for start in range(0, place[-1] + 1, window):
            within = text[start : start + window]
            if within.max() > 0:
                maxima.append((-within.max(), start + int(within.argmax())))
        expected = [at for _, at in sorted(maxima)[:N_CONTEXTS]]
        assert found.place[i].tolist() == expected + [-1] * (N_CONTEXTS - len(expected))
        for at, activations in zip(expected, found.activations[i], strict=False):
            around = [text[p] if p // window == at // window and p >= 0 else 0 for p in range(at - RADIUS, at + RADIUS + 1)]
            np.testing.assert_allclose(activations, around, rtol=1e-6)
        fired = column[column > 0]
        if not len(fired):
            assert found.bin_width[i] == 0
            assert found.histogram[i].sum() == 0
            continue
        width = 2.0 ** (math.floor(math.log2(fired.max())) + 1) / HISTOGRAM_BINS
        assert found.bin_width[i] == width
        expected_counts, _ = np.histogram(fired, bins=np.arange(HISTOGRAM_BINS + 1) * width)
        assert found.histogram[i].tolist() == expected_counts.tolist()


def test_contexts_and_histograms_equal_loops_over_the_dense_code() -> None:
    z, place = _code()
    assert 0 in (z != 0).sum(0).tolist()
    _check(_contexts([(z, place)]), z.numpy(), place.numpy())


@given(cuts=st.lists(st.integers(0, 230), max_size=12))
@settings(max_examples=25, deadline=None)
def test_contexts_do_not_depend_on_batching(cuts: list[int]) -> None:
    z, place = _code()
    _check(_contexts(zip(z.tensor_split(sorted(cuts)), place.tensor_split(sorted(cuts)), strict=True)), z.numpy(), place.numpy())


def test_contexts_of_a_sparse_code_equal_those_of_the_dense_code() -> None:
    z, place = _code()
    parts = zip(map(SparseCode.from_dense, z.split(31)), place.split(31), strict=True)
    _check(_contexts(parts), z.numpy(), place.numpy())


def test_activations_at_the_edge_of_a_power_of_two_are_within_the_bins() -> None:
    metric = FeatureContextsMetric(1, WINDOW, 1, 0)
    for at, value in enumerate([1e-30, 0.25, 1.0, 0.999, 64.0, 63.0]):
        metric.update(torch.tensor([[value]]), torch.tensor([at]))
    found = metric.compute()
    assert found.bin_width.tolist() == [4.0]  # 64 is no longer below 64
    assert {i: n for i, n in enumerate(found.histogram[0].tolist()) if n} == {0: 4, 15: 1, 16: 1}


@pytest.mark.parametrize("kind", [sm.Bagging, sm.Boosting])
def test_contexts_of_members_use_each_members_own_input(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_ENCODER_BYTES", {"cpu": 1})  # 64 rows at a time
    ensemble = kind([sm.build_sae(sm.SAEConfig(architecture="topk", d_in=6, d_sae=d_sae, k=2, init_seed=d_sae)) for d_sae in (8, 12)])
    x, place = torch.randn(200, 6, generator=torch.Generator().manual_seed(1)), torch.arange(200) * 2
    with torch.no_grad():
        codes = list(ensemble.member_codes(x))
    found = feature_contexts(ensemble, zip(x.split(90), place.split(90), strict=True), 16, N_CONTEXTS, RADIUS)
    for of_member, z in zip(found, codes, strict=True):
        _check(of_member, z.numpy(), place.numpy(), window=16)


def test_contexts_refuse_missing_tokens_wrong_shapes_and_unordered_places() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        _contexts([])
    with pytest.raises(ValueError, match=r"must be \[n, 12\]; got \[2, 3\]"):
        _contexts([(torch.zeros(2, 3), torch.arange(2))])
    with pytest.raises(ValueError, match=r"place must be \[2\] and ascend"):
        _contexts([(torch.zeros(2, 12), torch.arange(3))])
    with pytest.raises(ValueError, match="ascend over all batches"):
        _contexts([(torch.zeros(2, 12), torch.arange(2))] * 2)
    with pytest.raises(ValueError, match="at least 1, radius at least 0; got 3, 4, 0, 1"):
        FeatureContextsMetric(3, 4, 0, 1)


def test_output_tokens_equal_those_of_a_dense_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[output_tokens.__module__], "_LOGITS_PER_STEP", 50)  # two features at a time
    generator = torch.Generator().manual_seed(2)
    W_dec, W_U = torch.randn(5, 7, generator=generator), torch.randn(20, 7, generator=generator)
    logits = W_dec.double().numpy() @ W_U.double().numpy().T
    found, order = output_tokens(W_dec, W_U, 3), np.argsort(logits, axis=1)
    assert found.promoted.tolist() == order[:, ::-1][:, :3].tolist()
    assert found.suppressed.tolist() == order[:, :3].tolist()
    np.testing.assert_allclose(found.promoted_logits, np.take_along_axis(logits, order[:, ::-1][:, :3], 1), rtol=1e-5)
    np.testing.assert_allclose(found.suppressed_logits, np.take_along_axis(logits, order[:, :3], 1), rtol=1e-5)
    with pytest.raises(ValueError, match=r"21 output tokens need .* got \[5, 7\] and \[20, 7\]"):
        output_tokens(W_dec, W_U, 21)
    with pytest.raises(ValueError, match=r"got \[5, 6\] and \[20, 7\]"):
        output_tokens(W_dec[:, :6], W_U, 2)
