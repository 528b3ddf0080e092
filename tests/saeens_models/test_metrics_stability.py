"""Reference, equal candidates, per-feature stability and chance levels, against their definitions written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeens_models.metrics import (
    chance_levels,
    feature_stability,
    isotropic_rows,
    pw_mcc,
    rows_of_disjoint_documents,
    rows_with_covariance,
    stability,
    stability_equal_candidates,
    stability_of_prefixes,
)

D_IN = 6


def ensembles(n_runs: int, n_members: int, d_sae: int = 9, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(d_sae, D_IN, generator=generator) for _ in range(n_members)] for _ in range(n_runs)]


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    x, y = a.double().numpy(), b.double().numpy()
    return (x @ y.T) / np.linalg.norm(x, axis=1)[:, None] / np.linalg.norm(y, axis=1)


def by_definition(own: torch.Tensor, others: list[torch.Tensor]) -> float:
    """Mean over features of the largest cosine to any feature of any other run, at least 0."""
    return float(np.max([cosines(own, other).max(1) for other in others], axis=0).clip(0).mean())


@pytest.mark.parametrize("n_runs", [2, 3])
def test_reference_compares_the_first_member_alone_with_as_many_candidates(n_runs: int) -> None:
    runs = ensembles(n_runs, 4)
    for n, size in enumerate(stability_of_prefixes(runs), start=1):
        expected = [by_definition(run[0], [torch.cat(other[:n]) for other in runs if other is not run]) for run in runs]
        assert size.reference == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("n_runs", [2, 3])
def test_mean_reference_over_the_members_of_a_bag_is_the_stability_of_the_bag(n_runs: int) -> None:
    runs = ensembles(n_runs, 4)
    rotated = [stability_of_prefixes([run[i:] + run[:i] for run in runs])[-1] for i in range(4)]
    assert np.mean([size.reference for size in rotated], axis=0) == pytest.approx(rotated[0].stability, abs=1e-6)


def test_last_member_is_compared_with_the_last_member_of_the_other_runs() -> None:
    runs = ensembles(3, 3)
    for n, size in enumerate(stability_of_prefixes(runs)):
        assert size.of_last_member == pytest.approx(stability([run[n] for run in runs]), abs=1e-6)


def test_equal_candidates_are_drawn_without_replacement_from_every_run() -> None:
    runs = [torch.cat(run) for run in ensembles(3, 4)]
    generator = torch.Generator().manual_seed(5)
    expected = np.zeros(3)
    for _ in range(7):
        drawn = [run[torch.randperm(len(run), generator=generator)[:9]] for run in runs]
        expected += [by_definition(own, [other for other in drawn if other is not own]) for own in drawn]
    assert stability_equal_candidates(runs, 9, draws=7, seed=5) == pytest.approx(expected / 7, abs=1e-6)


def test_equal_candidates_with_all_features_is_stability() -> None:
    runs = [torch.cat(run) for run in ensembles(2, 2)]
    assert stability_equal_candidates(runs, 18) == stability(runs)


def test_equal_candidates_of_identical_runs_fall_with_the_share_that_is_drawn() -> None:
    (run,) = (torch.eye(40),)  # a drawn feature is found if the other side drew it too, else the best cosine is 0
    assert stability_equal_candidates([run, run], 10, draws=200) == pytest.approx([0.25, 0.25], abs=0.03)


@pytest.mark.parametrize("n", [0, 19])
def test_equal_candidates_refuses_more_features_than_there_are(n: int) -> None:
    with pytest.raises(ValueError, match="between 1 and the 18 features"):
        stability_equal_candidates([torch.cat(run) for run in ensembles(2, 2)], n)


def test_feature_stability_counts_the_runs_that_have_a_feature() -> None:
    runs = [torch.cat(run) for run in ensembles(4, 2)]
    for i, found in enumerate(feature_stability(runs, threshold=0.6)):
        best = np.array([cosines(runs[i], other).max(1) for j, other in enumerate(runs) if j != i])
        assert found.n_found.tolist() == (best >= 0.6).sum(0).tolist()
        assert found.best_cosine.numpy() == pytest.approx(best.max(0), abs=1e-6)


def test_two_copies_of_one_dictionary_are_fully_reproduced() -> None:
    W_dec = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0))
    (size,) = stability_of_prefixes([[W_dec], [W_dec]])
    assert [*size.stability, *size.pairwise, *size.reference, *size.of_last_member] == pytest.approx([1.0] * 8, abs=1e-6)
    assert pw_mcc([W_dec, W_dec]) == pytest.approx([1.0, 1.0], abs=1e-6)
    assert all((each.n_found == 1).all() for each in feature_stability([W_dec, W_dec]))


def test_independent_random_dictionaries_have_the_chance_levels() -> None:
    drawn = torch.Generator().manual_seed(1)
    chance = chance_levels(lambda: [isotropic_rows(300, 16, drawn) for _ in range(3)], match_up_to=300)
    others = torch.Generator().manual_seed(2)
    runs = [[isotropic_rows(300, 16, others) for _ in range(3)] for _ in range(20)]
    stabilities = np.array([np.mean(stability(of_draw)) for of_draw in runs])
    coefficients = np.array([pw_mcc(of_draw[:2])[0] for of_draw in runs])
    error = 4 / np.sqrt(3)  # chance levels are means of three draws
    assert chance.stability == pytest.approx(stabilities.mean(), abs=error * stabilities.std(ddof=1))
    assert chance.pw_mcc == pytest.approx(coefficients.mean(), abs=error * coefficients.std(ddof=1))
    assert chance.shared_fraction < 0.5


def test_chance_of_large_dictionaries_is_not_matched() -> None:
    generator = torch.Generator().manual_seed(1)
    chance = chance_levels(lambda: [isotropic_rows(30, 16, generator) for _ in range(2)], match_up_to=29)
    assert 0 < chance.stability < 1
    assert np.isnan([chance.pw_mcc, chance.shared_fraction]).all()


def test_rows_with_a_covariance_have_it() -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(5, 3, generator=generator)
    covariance = factor @ factor.T  # of rank 3
    rows = rows_with_covariance(200_000, covariance, generator)
    assert rows.dtype == torch.float32
    assert torch.cov(rows.T).numpy() == pytest.approx(covariance.numpy(), abs=0.05)


def test_rows_of_runs_come_from_disjoint_documents_without_replacement() -> None:
    documents = torch.arange(30).repeat_interleave(torch.arange(30) % 5 + 1)
    runs = rows_of_disjoint_documents(documents, 3, 20, torch.Generator().manual_seed(0))
    assert [len(set(rows.tolist())) for rows in runs] == [20, 20, 20]
    of_runs = [set(documents[rows].tolist()) for rows in runs]
    assert not any(a & b for i, a in enumerate(of_runs) for b in of_runs[:i])


def test_too_few_rows_for_every_run_are_refused() -> None:
    with pytest.raises(ValueError, match="leave one with 0 rows: 5 are needed"):
        rows_of_disjoint_documents(torch.zeros(100, dtype=torch.int64), 2, 5, torch.Generator())
