"""Activity of single features against dense sorts, and where they come back against scikit-learn's cosines."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from torch import Tensor

import saeens_models as sm
from saeens_models import evaluation
from saeens_models.evaluation import feature_activity
from saeens_models.metrics import FeatureActivityMetric, max_cosine_to_other_runs, nearest_in_other_members, stability
from saeens_models.sparse_code import SparseCode

N_TOP = 4


def _code(n: int = 300, n_features: int = 12) -> Tensor:
    """Rates from never to always, and values of few levels, so that many are equal."""
    generator = torch.Generator().manual_seed(3)
    fires = torch.rand(n, n_features, generator=generator) < torch.linspace(0, 1, n_features).square()
    return fires * torch.randint(1, 30, (n, n_features), generator=generator) / 8


def _activity(batches):
    metric = FeatureActivityMetric(12, N_TOP)
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def _check(found, z: np.ndarray) -> None:
    np.testing.assert_allclose(found.density, (z != 0).mean(axis=0))
    for i, column in enumerate(z.T):
        fired = np.flatnonzero(column)
        expected = fired[np.argsort(-column[fired], kind="stable")][:N_TOP].tolist()
        assert found.top_tokens[i].tolist() == expected + [-1] * (N_TOP - len(expected))
        assert found.mean_activation[i].item() == pytest.approx(column[fired].mean() if len(fired) else float("nan"), nan_ok=True)


def test_density_mean_and_top_tokens_are_those_of_a_dense_sort() -> None:
    z = _code()
    assert 0 in (z != 0).sum(0).tolist()
    _check(_activity([z]), z.numpy())


@given(cuts=st.lists(st.integers(0, 300), max_size=12))
@settings(max_examples=25, deadline=None)
def test_how_tokens_come_does_not_matter(cuts: list[int]) -> None:
    z = _code()
    _check(_activity(z.tensor_split(sorted(cuts))), z.numpy())


def test_a_sparse_code_counts_as_the_dense_one() -> None:
    z = _code()
    _check(_activity([SparseCode.from_dense(part) for part in z.split(31)]), z.numpy())


@pytest.mark.parametrize("kind", [sm.Bagging, sm.Boosting])
def test_members_of_an_ensemble_are_seen_on_what_they_are_given(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_ENCODER_BYTES", {"cpu": 1})  # 64 rows at a time
    ensemble = kind([sm.build_sae(sm.SAEConfig(architecture="topk", d_in=6, d_sae=d_sae, k=2, init_seed=d_sae)) for d_sae in (8, 12)])
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes = list(ensemble.member_codes(x))
    for found, z in zip(feature_activity(ensemble, iter(x.split(90)), N_TOP), codes, strict=True):
        _check(found, z.numpy())


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="no tokens"):
        _activity([])
    with pytest.raises(ValueError, match=r"must be \[n, 12\]; got \[2, 3\]"):
        _activity([torch.zeros(2, 3)])
    with pytest.raises(ValueError, match="at least 1; got 3 and 0"):
        FeatureActivityMetric(3, 0)


# where features come back


@pytest.fixture(scope="module")
def dictionaries() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(width, 7, generator=generator) for width in (9, 4, 13)]


def test_the_nearest_feature_of_the_other_members_is_that_of_scikit_learn(dictionaries) -> None:
    for j, found in enumerate(nearest_in_other_members(dictionaries)):
        cosines = np.stack(
            [
                np.full(len(dictionaries[j]), -2) if i == j else cosine_similarity(dictionaries[j], d).max(axis=1)
                for i, d in enumerate(dictionaries)
            ]
        )
        np.testing.assert_allclose(found.cosine, cosines.max(axis=0), atol=1e-6)
        assert found.member.tolist() == cosines.argmax(axis=0).tolist()


def test_the_largest_cosine_to_other_runs_is_what_stability_averages(dictionaries) -> None:
    found = max_cosine_to_other_runs(dictionaries)
    for i, cosines in enumerate(found):
        others = np.concatenate([d for j, d in enumerate(dictionaries) if j != i])
        np.testing.assert_allclose(cosines, cosine_similarity(dictionaries[i], others).max(axis=1), atol=1e-6)
    assert stability(dictionaries) == pytest.approx([cosines.clamp(min=0).mean().item() for cosines in found])


def test_one_alone_has_nothing_to_be_compared_with(dictionaries) -> None:
    with pytest.raises(ValueError, match="no other member"):
        nearest_in_other_members(dictionaries[:1])
    with pytest.raises(ValueError, match="no other run"):
        max_cosine_to_other_runs(dictionaries[:1])
