"""Stability and diversity against golden values, scikit-learn and exhaustive search."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics.pairwise import cosine_similarity

from saeens_models.metrics import (
    MAX_MATCHED_FEATURES,
    compare_members,
    cosines,
    diversity,
    max_cosine,
    mean_max_cosine,
    stability,
    stability_matched,
    stability_of_prefixes,
    stability_pairwise,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
DICTIONARIES = [load_file(GOLDEN / "tensors.safetensors")[f"dictionary.{run}"] for run in range(4)]


def random_dictionaries(*sizes: int, d_in: int = 8) -> list[torch.Tensor]:
    """Dictionaries with rows of very different norms."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, d_in, generator=generator) * torch.rand(size, 1, generator=generator).exp() ** 5 for size in sizes]


def test_stability_meets_the_golden_values() -> None:
    assert stability(DICTIONARIES) == pytest.approx(EXPECTED["stability_per_run"], rel=1e-5)


def test_matched_stability_meets_the_golden_value() -> None:
    assert np.mean(stability_matched(DICTIONARIES)) == pytest.approx(EXPECTED["stability_exact_hungarian"], rel=1e-5)


def test_share_of_features_found_in_another_run_meets_the_golden_value() -> None:
    shares = [
        (max_cosine(dictionary, [other for other in DICTIONARIES if other is not dictionary]) >= 0.6).double().mean().item()
        for dictionary in DICTIONARIES
    ]
    assert np.mean(shares) == pytest.approx(EXPECTED["overlap_at_0.6"], rel=1e-5)


@pytest.mark.parametrize("threshold", [0.7, 0.5])
def test_diversity_meets_the_golden_values(threshold: float) -> None:
    assert diversity(torch.cat(DICTIONARIES), threshold) == EXPECTED[f"diversity_count_at_{threshold}"]


def test_diversity_threshold_is_the_papers_by_default() -> None:
    assert diversity(torch.cat(DICTIONARIES)) == EXPECTED["diversity_count_at_0.7"]


@pytest.fixture(params=[None, 6], ids=["one block", "many blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(cosines, "BLOCK_ROWS", request.param)


@pytest.mark.usefixtures("_blocks")
def test_stability_equals_scikit_learn_for_runs_of_different_sizes() -> None:
    runs = random_dictionaries(11, 23, 7)
    best = {(a, b): cosine_similarity(runs[a], runs[b]).max(axis=1) for a in range(3) for b in range(3) if a != b}
    others = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
    to_any = [np.maximum(best[a, b], best[a, c]).clip(0).mean() for a, (b, c) in others.items()]
    to_each = [(best[a, b].clip(0).mean() + best[a, c].clip(0).mean()) / 2 for a, (b, c) in others.items()]
    assert stability(runs) == pytest.approx(to_any, rel=1e-5)
    assert stability_pairwise(runs) == pytest.approx(to_each, rel=1e-5)
    assert mean_max_cosine(runs[0], runs[1:]) == pytest.approx(np.maximum(best[0, 1], best[0, 2]).mean(), rel=1e-5)


@pytest.mark.usefixtures("_blocks")
def test_diversity_equals_scikit_learn() -> None:
    (W_dec,) = random_dictionaries(40, d_in=4)
    cosines = cosine_similarity(W_dec)
    np.fill_diagonal(cosines, -1)
    expected = int((cosines.max(axis=1) < 0.8).sum())
    assert 0 < expected < 40
    assert diversity(W_dec, threshold=0.8) == expected


@pytest.mark.usefixtures("_blocks")
def test_stability_of_prefixes_equals_stability_of_each_prefix() -> None:
    runs = [random_dictionaries(11, 5, 9), random_dictionaries(7, 12, 8), random_dictionaries(4, 6, 13)]
    members = [[run[j] for run in runs] for j in range(3)]  # three runs of three members of different sizes
    found = stability_of_prefixes(members)
    assert len(found) == 3
    for n, size in enumerate(found, start=1):
        stacked = [torch.cat(run[:n]) for run in members]
        best = {(a, b): cosine_similarity(stacked[a], stacked[b]).max(axis=1) for a in range(3) for b in range(3) if a != b}
        others = {0: (1, 2), 1: (0, 2), 2: (0, 1)}
        to_any = [np.maximum(best[a, b], best[a, c]).clip(0).mean() for a, (b, c) in others.items()]
        to_each = [(best[a, b].clip(0).mean() + best[a, c].clip(0).mean()) / 2 for a, (b, c) in others.items()]
        assert size.stability == pytest.approx(to_any, rel=1e-5)
        assert size.pairwise == pytest.approx(to_each, rel=1e-5)


@pytest.mark.usefixtures("_blocks")
def test_members_are_compared_as_their_stacked_dictionaries() -> None:
    members = random_dictionaries(11, 17, 5, d_in=4)
    compared = compare_members(members, threshold=0.8)
    for n, found in enumerate(compared.diversity, start=1):
        cosines = cosine_similarity(torch.cat(members[:n]))
        np.fill_diagonal(cosines, -1)
        assert found == int((cosines.max(axis=1) < 0.8).sum())
    assert len(set(compared.diversity)) > 1
    expected = [cosine_similarity(members[j], torch.cat(members[:j] + members[j + 1 :])).max(axis=1).mean() for j in range(3)]
    assert compared.mean_max_cosine == pytest.approx(expected, rel=1e-5)
    assert compare_members(members[:1]).mean_max_cosine is None


def test_opposite_features_are_floored_at_zero_by_stability_only() -> None:
    a = torch.tensor([[1.0, 0.0]])
    assert stability([a, -a]) == stability_pairwise([a, -a]) == [0.0, 0.0]
    assert mean_max_cosine(a, [-a]) == -1.0


def test_identical_runs_are_fully_stable_and_their_stack_is_not_diverse() -> None:
    (W_dec,) = random_dictionaries(6)
    assert stability([W_dec, 3 * W_dec]) == pytest.approx([1.0, 1.0], rel=1e-6)
    assert stability_matched([W_dec, W_dec.flip(0)]) == pytest.approx([1.0, 1.0], rel=1e-6)
    assert diversity(torch.cat([W_dec, 3 * W_dec])) == 0


def test_diversity_of_a_single_feature_is_one() -> None:
    assert diversity(torch.ones(1, 3)) == 1


def test_adding_a_run_raises_stability_and_leaves_pairwise_an_average() -> None:
    two, three = random_dictionaries(20, 20), random_dictionaries(20, 20, 20)
    assert stability(three)[0] > stability(two)[0]
    assert stability_pairwise(two) == pytest.approx(stability(two))


@pytest.mark.parametrize("d_in", [2, 3, 6])
def test_matched_stability_equals_exhaustive_search(d_in: int) -> None:
    runs = random_dictionaries(6, 6, 6, d_in=d_in)
    units = [run.double().numpy() / np.linalg.norm(run.double().numpy(), axis=1, keepdims=True) for run in runs]

    def of_pair(a: np.ndarray, b: np.ndarray) -> float:
        best = min(permutations(range(6)), key=lambda order: np.linalg.norm(a - b[list(order)], axis=1).sum())
        return (a * b[list(best)]).sum(axis=1).mean()

    pairs = {frozenset(pair): of_pair(units[pair[0]], units[pair[1]]) for pair in [(0, 1), (0, 2), (1, 2)]}
    expected = [np.mean([pairs[frozenset((a, b))] for b in range(3) if b != a]) for a in range(3)]
    assert stability_matched(runs) == pytest.approx(expected, rel=1e-5)


def test_stability_and_diversity_refuse_wrong_numbers_and_shapes_of_dictionaries() -> None:
    run, wider = torch.ones(5, 4), torch.ones(5, 6)
    for metric in (stability, stability_pairwise, stability_matched):
        with pytest.raises(ValueError, match="at least 2 dictionaries; got 1"):
            metric([run])
        with pytest.raises(ValueError, match=r"different d_in .* \[4, 6\]"):
            metric([run, wider])
    with pytest.raises(ValueError, match=r"one size; got \[5, 4\]"):
        stability_matched([run, run[:4]])
    with pytest.raises(ValueError, match=f"takes up to {MAX_MATCHED_FEATURES} features"):
        stability_matched([torch.ones(MAX_MATCHED_FEATURES + 1, 1)] * 2)
    with pytest.raises(ValueError, match=r"equally many members, at least one; got \[1, 2\]"):
        stability_of_prefixes([[run], [run, run]])
    with pytest.raises(ValueError, match="at least one"):
        max_cosine(run, [])
    with pytest.raises(ValueError, match=r"must be \[n_features, d_in\]"):
        diversity(run[0])


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_rows_without_direction_are_refused(value: float) -> None:
    run = torch.ones(5, 4)
    broken = run.clone()
    broken[3] = value
    for compare in (lambda: stability([run, broken]), lambda: diversity(broken), lambda: mean_max_cosine(broken, [run])):
        with pytest.raises(ValueError, match=r"1 of 5 dictionary rows .* the first is row 3"):
            compare()
