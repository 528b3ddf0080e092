"""One-to-one matching against scipy's assignment, and the metrics that it gives against numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from saeens_models import Bagging, Boosting, SAEConfig, build_sae
from saeens_models.evaluation import functional_stability
from saeens_models.metrics import MatchedCorrelationMetric, match_features, matching, pw_mcc, shared_fraction
from saeens_models.sparse_code import SparseCode


def dictionary(n: int, d_in: int = 12, seed: int = 0, scales: float = 0.7) -> torch.Tensor:
    """Random rows with a decaying spectrum: their cosines are close to each other, which makes matching hard."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d_in, generator=generator) * torch.arange(1, d_in + 1) ** -scales * torch.rand(n, 1, generator=generator).exp()


def best_mean(a: torch.Tensor, b: torch.Tensor) -> float:
    cosines = (F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T).abs().numpy()
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


@given(n=st.integers(1, 40), more=st.integers(0, 30), d_in=st.integers(1, 9), seed=st.integers(0, 1000), swap=st.booleans())
@settings(max_examples=60, deadline=None)
def test_matching_on_candidates_is_within_its_bound_of_the_best(n: int, more: int, d_in: int, seed: int, swap: bool) -> None:
    a, b = dictionary(n, d_in, seed), dictionary(n + more, d_in, seed + 1)
    a, b = (b, a) if swap else (a, b)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "EXACT_UP_TO", 0)
        patch.setattr(matching, "_CANDIDATES", 2)
        patch.setattr(matching, "_PANEL_ELEMENTS", 100)
        patch.setattr(matching, "_PAIRS", 7)
        found = match_features(a, b)
    best = best_mean(a, b)
    assert found.mean_cosine <= best + 1e-6
    assert best <= found.bound + 1e-6
    assert found.bound - found.mean_cosine <= 0.1
    smaller, larger = (found.row_b, found.row_a) if swap else (found.row_a, found.row_b)
    assert smaller.tolist() == list(range(n)) or swap
    assert len(set(smaller.tolist())) == len(set(larger.tolist())) == n
    assert found.cosine.numpy() == pytest.approx(F.cosine_similarity(a[found.row_a], b[found.row_b]).numpy(), abs=1e-5)


@pytest.mark.parametrize("shapes", [(300, 300), (150, 400), (400, 150)])
def test_matching_of_small_dictionaries_is_scipys(shapes: tuple[int, int]) -> None:
    a, b = (dictionary(n, seed=seed) for seed, n in enumerate(shapes))
    found = match_features(a, b)
    assert found.mean_cosine == pytest.approx(best_mean(a, b), abs=1e-6)
    assert found.bound == found.mean_cosine


def test_matching_of_large_dictionaries_is_within_a_thousandth_of_scipys() -> None:
    a, b = dictionary(1500, 48), dictionary(1500, 48, seed=1)
    found, best = match_features(a, b), best_mean(a, b)
    assert best - 1e-3 <= found.mean_cosine <= best + 1e-6
    assert best - 1e-6 <= found.bound <= found.mean_cosine + 1e-3


def test_pw_mcc_is_the_mean_over_the_other_runs() -> None:
    runs = [dictionary(40, seed=seed) for seed in range(3)]
    pairs = {(i, j): best_mean(runs[i], runs[j]) for i in range(3) for j in range(3) if i != j}
    assert pw_mcc(runs) == pytest.approx([(pairs[i, (i + 1) % 3] + pairs[i, (i + 2) % 3]) / 2 for i in range(3)], abs=1e-6)
    with pytest.raises(ValueError, match="at least 2 dictionaries; got 1"):
        pw_mcc(runs[:1])


def test_matching_counts_opposite_directions_and_keeps_the_sign() -> None:
    found = match_features(torch.eye(3), -torch.eye(3)[[2, 0, 1]])
    assert found.row_b.tolist() == [1, 2, 0]
    assert found.cosine.tolist() == [-1, -1, -1]
    assert found.mean_cosine == 1


def test_dictionaries_of_different_d_in_are_not_matched() -> None:
    with pytest.raises(ValueError, match="different d_in"):
        match_features(torch.eye(3), torch.eye(4))


def test_shared_features_agree_in_decoder_and_encoder_with_their_sign() -> None:
    W_dec = torch.eye(4)
    W_enc_b = torch.eye(4)
    W_enc_b[:, 1] = torch.tensor([1.0, 1, 0, 0])  # cosine 0.707
    W_enc_b[:, 2] = torch.tensor([1.0, 0, 0.9, 0])  # cosine 0.669
    W_dec_b = torch.diag(torch.tensor([1.0, 1, 1, -1]))  # the last is matched with the opposite direction
    found = match_features(W_dec, W_dec_b)
    assert shared_fraction(found, torch.eye(4), W_enc_b) == 0.5
    assert shared_fraction(found, torch.eye(4), W_enc_b, threshold=0.71) == 0.25


@pytest.mark.parametrize("kind", [Bagging, Boosting])
def test_functional_stability_is_the_mean_correlation_of_matched_features(kind: type[Bagging | Boosting]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(900, 8, generator=generator)
    configs = [[SAEConfig(architecture="topk", d_in=8, d_sae=20, k=3, init_seed=10 * r + j) for j in range(2)] for r in range(2)]
    runs = [kind([build_sae(config) for config in of_run]) for of_run in configs]
    matchings = [match_features(runs[0][:n].W_dec.detach(), runs[1][:n].W_dec.detach()) for n in (1, 2)]
    found = functional_stability(runs, x.split(256), {(0, 1): matchings})[0, 1]
    for n, of_pairs, value in zip((1, 2), matchings, found, strict=True):
        codes = [run[:n].encode(x).detach().double().numpy() for run in runs]
        pairs = [(codes[0][:, i], codes[1][:, j]) for i, j in zip(of_pairs.row_a.tolist(), of_pairs.row_b.tolist(), strict=True)]
        expected = np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs if a.std() and b.std()])
        assert value == pytest.approx(expected, abs=1e-6)


def test_two_copies_correlate_fully_and_features_that_never_fire_are_left_out() -> None:
    code = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    code[code < 0.5] = 0
    code[:, 3] = 0
    metric = MatchedCorrelationMetric([match_features(torch.eye(4), torch.eye(4))], 4, 4)
    metric.update(SparseCode.from_dense(code), SparseCode.from_dense(2 * code))
    assert metric.compute() == pytest.approx([1.0])
    silent = MatchedCorrelationMetric([match_features(torch.eye(4), torch.eye(4))], 4, 4)
    silent.update(SparseCode.from_dense(0 * code), SparseCode.from_dense(code))
    assert silent.compute() == [None]


def test_codes_of_different_tokens_are_refused() -> None:
    metric = MatchedCorrelationMetric([match_features(torch.eye(2), torch.eye(2))], 2, 2)
    with pytest.raises(ValueError, match="of the same tokens; got 3 and 4"):
        metric.update(SparseCode.from_dense(torch.ones(3, 2)), SparseCode.from_dense(torch.ones(4, 2)))
