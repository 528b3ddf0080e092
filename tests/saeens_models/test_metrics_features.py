"""Activity of single features against dense sorts, and nearest features in other runs against scikit-learn's cosines."""

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
from saeens_models.metrics import FeatureActivityMetric, matches_in_other_members, nearest_in_other_runs, stability
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


def test_density_mean_and_top_tokens_equal_those_of_a_dense_sort() -> None:
    z = _code()
    assert 0 in (z != 0).sum(0).tolist()
    _check(_activity([z]), z.numpy())


@given(cuts=st.lists(st.integers(0, 300), max_size=12))
@settings(max_examples=25, deadline=None)
def test_feature_activity_does_not_depend_on_batching(cuts: list[int]) -> None:
    z = _code()
    _check(_activity(z.tensor_split(sorted(cuts))), z.numpy())


def test_feature_activity_of_a_sparse_code_equals_that_of_the_dense_code() -> None:
    z = _code()
    _check(_activity([SparseCode.from_dense(part) for part in z.split(31)]), z.numpy())


@pytest.mark.parametrize("kind", [sm.Bagging, sm.Boosting])
def test_feature_activity_of_members_uses_each_members_own_input(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_ENCODER_BYTES", {"cpu": 1})  # 64 rows at a time
    ensemble = kind([sm.build_sae(sm.SAEConfig(architecture="topk", d_in=6, d_sae=d_sae, k=2, init_seed=d_sae)) for d_sae in (8, 12)])
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        codes = list(ensemble.member_codes(x))
    for found, z in zip(feature_activity(ensemble, iter(x.split(90)), N_TOP), codes, strict=True):
        _check(found, z.numpy())


def test_feature_activity_refuses_missing_tokens_wrong_shapes_and_no_top_tokens() -> None:
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


def _dense(a: Tensor, b: Tensor) -> np.ndarray:
    return cosine_similarity(a.numpy(), b.numpy())


def test_matches_in_other_members_equal_those_of_scikit_learn(dictionaries) -> None:
    for j, found in enumerate(matches_in_other_members(dictionaries)):
        cosines = [np.full((len(dictionaries[j]), 1), -2) if i == j else _dense(dictionaries[j], d) for i, d in enumerate(dictionaries)]
        for i, of_member in enumerate(cosines):
            assert found.row[i].tolist() == ([-1] * len(of_member) if i == j else of_member.argmax(1).tolist())
            np.testing.assert_allclose(found.cosine[i], np.full(len(of_member), -np.inf) if i == j else of_member.max(1), atol=1e-6)
        nearest = found.nearest()
        best = np.stack([of_member.max(1) for of_member in cosines])
        np.testing.assert_allclose(nearest.cosine, best.max(0), atol=1e-6)
        assert nearest.member.tolist() == best.argmax(0).tolist()
        assert nearest.row.tolist() == [int(cosines[m][row].argmax()) for row, m in enumerate(best.argmax(0))]


@given(seed=st.integers(0, 1000), shape=st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=3), min_size=2, max_size=4))
@settings(max_examples=40, deadline=None)
def test_the_nearest_feature_of_other_runs_equals_a_dense_search(seed: int, shape: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(seed)
    runs = [[torch.randn(width, 5, generator=generator) for width in widths] for widths in shape]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("saeens_models.metrics.cosines.BLOCK_ROWS", 3)  # several blocks, the last one smaller
        found = nearest_in_other_runs(runs)
    for a, of_run in enumerate(found):
        mine = torch.cat(runs[a])
        for feature, (run, member, row, cosine) in enumerate(zip(*(column.tolist() for column in of_run), strict=True)):
            assert run != a
            others = torch.cat([W_dec for b, members in enumerate(runs) if b != a for W_dec in members])
            assert cosine == pytest.approx(_dense(mine[feature : feature + 1], others).max(), abs=1e-5)
            assert cosine == pytest.approx(_dense(mine[feature : feature + 1], runs[run][member][row][None]).item(), abs=1e-5)


def test_stability_averages_the_largest_cosines_to_other_runs(dictionaries) -> None:
    found = nearest_in_other_runs([[d] for d in dictionaries])
    assert stability(dictionaries) == pytest.approx([of_run.cosine.clamp(min=0).mean().item() for of_run in found])


def test_the_first_of_equally_near_features_is_reported() -> None:
    twice = torch.eye(3).repeat(2, 1)
    found = nearest_in_other_runs([[torch.eye(3)], [twice], [twice]])
    assert found[0].run.tolist() == [1, 1, 1]
    assert found[0].row.tolist() == [0, 1, 2]


def test_one_member_or_one_run_alone_is_refused(dictionaries) -> None:
    with pytest.raises(ValueError, match="no other member"):
        matches_in_other_members(dictionaries[:1])
    with pytest.raises(ValueError, match="no other run"):
        nearest_in_other_runs([dictionaries])
