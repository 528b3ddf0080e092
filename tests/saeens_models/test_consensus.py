"""The consensus dictionary: clusters against a plain implementation of their definition, and the SAE that is trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm
from saeens_models.consensus import find_clusters, initial_consensus


def dictionaries(n_members: int, d_sae: int, d_in: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(d_sae, d_in, generator=generator) * (1 + torch.rand(d_sae, 1, generator=generator)) for _ in range(n_members)]


def by_definition(W_decs: list[Tensor], threshold: float, min_members: int) -> list[set[tuple[int, int]]]:
    units = [F.normalize(W_dec.double(), dim=1).numpy() for W_dec in W_decs]
    free = [(member, row) for member, unit in enumerate(units) for row in range(len(unit))]
    clusters = []
    while True:
        found = {}
        for member, row in free:
            nearest = {}
            for other, there in free:
                cosine = units[member][row] @ units[other][there]
                if other != member and cosine >= threshold and cosine > nearest.get(other, (-1.0,))[0]:
                    nearest[other] = cosine, (other, there)
            found[member, row] = {(member, row), *(place for _, place in nearest.values())}
        largest = max(map(len, found.values()), default=0)
        if largest < min_members:
            return clusters
        cluster = next(found[place] for place in free if len(found[place]) == largest)
        clusters.append(cluster)
        free = [place for place in free if place not in cluster]


@given(st.integers(2, 4), st.integers(1, 8), st.integers(0, 500), st.sampled_from([0.5, 0.7, 0.9]))
@settings(max_examples=40, deadline=None)
def test_clusters_are_those_of_the_definition(n_members: int, d_sae: int, seed: int, threshold: float) -> None:
    W_decs = dictionaries(n_members, d_sae, seed=seed)
    for min_members in range(2, n_members + 1):
        found = find_clusters(W_decs, threshold, min_members)
        assert [set(cluster.features) for cluster in found] == by_definition(W_decs, threshold, min_members)
        for cluster in found:
            rows = np.array([F.normalize(W_decs[member][row], dim=0).numpy() for member, row in cluster.features])
            assert len({member for member, _ in cluster.features}) == len(cluster.features) >= min_members
            to_mean = rows @ rows.mean(0)
            assert to_mean[cluster.representative] == pytest.approx(to_mean.max(), abs=1e-6)


def test_copies_of_one_dictionary_have_one_cluster_per_feature() -> None:
    W_dec = torch.eye(6)
    clusters = find_clusters([W_dec, W_dec[[2, 0, 1, 3, 4, 5]], -W_dec])
    assert [cluster.features for cluster in clusters[:3]] == [((0, 0), (1, 1)), ((0, 1), (1, 2)), ((0, 2), (1, 0))]
    assert len(clusters) == 6, "an opposite direction is no partner"


@pytest.mark.parametrize("min_members", [1, 4])
def test_numbers_of_members_that_cannot_be_reached_are_refused(min_members: int) -> None:
    with pytest.raises(ValueError, match="between 2 and the number of members, 3"):
        find_clusters(dictionaries(3, 4), min_members=min_members)


ARCHITECTURES = {
    "topk": {"k": 3},
    "standard": {"l1_coefficient": 0.01},
    "jumprelu": {"l0_coefficient": 1e-3},
    "gated": {"l1_coefficient": 0.01},
    "matching_pursuit": {"max_iterations": 3},
}


def members(architecture: str, n: int = 3, d_in: int = 12, d_sae: int = 24) -> list[sm.SAE]:
    configs = [
        sm.SAEConfig(architecture=architecture, d_in=d_in, d_sae=d_sae, init_seed=j, **ARCHITECTURES[architecture]) for j in range(n)
    ]
    return sm.train(configs, stream(20, d_in), sm.TrainingConfig(learning_rate=0.02, dead_after_tokens=10_000))


def stream(n_batches: int, d_in: int = 12) -> list[Tensor]:
    """Sparse sums of few directions, which all members find."""
    generator = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(8, d_in, generator=generator), dim=1)
    strengths = torch.rand(n_batches * 64, 8, generator=generator) * (torch.rand(n_batches * 64, 8, generator=generator) < 0.25)
    return list((3 * strengths @ directions).split(64))


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_consensus_keeps_the_representatives_rows_and_trains_the_rest(architecture: str, tmp_path: Path) -> None:
    saes = members(architecture)
    result = sm.consensus(saes, stream(20), sm.TrainingConfig(learning_rate=0.02, dead_after_tokens=10_000), threshold=0.6)
    chosen = [cluster.features[cluster.representative] for cluster in result.clusters]
    assert len(chosen) == result.sae.config.d_sae > 1
    assert torch.equal(result.sae.W_dec, torch.stack([saes[member].W_dec[row] for member, row in chosen]))
    initial = initial_consensus(saes, result.clusters)
    assert not torch.equal(result.sae.b_dec, initial.b_dec)
    if architecture != "matching_pursuit":
        assert torch.equal(initial.W_enc, torch.stack([saes[member].W_enc[:, row] for member, row in chosen], 1))
        assert not torch.equal(result.sae.W_enc, initial.W_enc)
    sm.save_sae(result.sae, tmp_path)
    loaded, x = sm.load_sae(tmp_path), torch.cat(stream(2))
    torch.testing.assert_close(loaded(x), result.sae(x))


def test_training_improves_the_consensus() -> None:
    saes, x = members("topk"), torch.cat(stream(20))
    result = sm.consensus(saes, stream(20), sm.TrainingConfig(learning_rate=0.02, dead_after_tokens=10_000), threshold=0.6)
    before, after = (sm.metrics.reconstruction(x, sae(x).detach()).mse for sae in (initial_consensus(saes, result.clusters), result.sae))
    assert after < before


def test_k_is_at_most_the_number_of_clusters() -> None:
    saes = [sm.build_sae(sm.SAEConfig(architecture="topk", d_in=4, d_sae=4, k=4, init_seed=j)) for j in range(2)]
    clusters = find_clusters([sae.W_dec for sae in saes], threshold=0.01)[:2]
    assert initial_consensus(saes, clusters).config.model_dump()["k"] == 2


def test_without_a_common_feature_or_with_mixed_architectures_the_error_says_so() -> None:
    saes = members("topk", n=2)
    training = sm.TrainingConfig(dead_after_tokens=10_000)
    with pytest.raises(ValueError, match="no feature is common to enough members"):
        sm.consensus(saes, stream(1), training, threshold=1.0)
    for threshold in (-2.0, 0.0, 1.1):
        with pytest.raises(ValueError, match="threshold must be a cosine above 0, at most 1"):
            sm.consensus(saes, stream(1), training, threshold=threshold)
    other_k = sm.build_sae(saes[1].config.model_copy(update={"k": 2}))
    other_k.load_state_dict(saes[0].state_dict())
    with pytest.raises(ValueError, match="a consensus needs SAEs of one k; got "):
        sm.consensus([saes[0], other_k], stream(1), training)
    with pytest.raises(ValueError, match="SAEs of one architecture; got standard, topk"):
        sm.consensus([*saes, *members("standard", n=1)], stream(1), training)
