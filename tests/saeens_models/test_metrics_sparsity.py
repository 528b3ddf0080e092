"""Sparsity of codes against golden values and dense counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from saeens_models.metrics import SparsityMetric, sparsity
from saeens_models.sparse_code import SparseCode

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
TENSORS = load_file(GOLDEN / "tensors.safetensors")


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("method", ["member.0", "bagging", "boosting"])
def test_l0_meets_the_golden_values(architecture: str, method: str) -> None:
    z = TENSORS[f"{architecture}.{method}.codes"]
    result = sparsity(z)
    assert result.l0 == pytest.approx(EXPECTED[f"{architecture}.{method}"]["l0"], rel=1e-5)
    assert result.relative_sparsity == pytest.approx(result.l0 / z.shape[1], rel=1e-12)


def test_density_and_dead_features_are_rates_over_tokens_and_features() -> None:
    z = torch.tensor([[0.0, 2.0, 0.0, 1e-30], [0.0, 1.0, 0.0, 0.0]])
    result = sparsity(z)
    assert result.density.tolist() == [0.0, 1.0, 0.0, 0.5]
    assert result.dead_features == 0.5
    assert result.l0 == 1.5
    assert result.tokens == 2


@given(cuts=st.lists(st.integers(0, 600), max_size=8))
@settings(max_examples=20, deadline=None)
def test_sparsity_does_not_depend_on_batching(cuts: list[int]) -> None:
    z = TENSORS["jumprelu.boosting.codes"]
    result = sparsity(z.tensor_split(sorted(cuts)))
    assert torch.equal(result.density, (z != 0).double().mean(0))
    assert result.tokens == 600


@pytest.mark.parametrize("features", [range(1), range(48), range(48, 96), range(192)])
def test_sparsity_of_some_features_is_that_of_their_columns(features: range) -> None:
    z = TENSORS["jumprelu.boosting.codes"]
    metric = SparsityMetric(192)
    metric.update(z)
    result = metric.compute(features)
    fires = z[:, features.start : features.stop] != 0
    assert result.l0 == pytest.approx(fires.sum(1).double().mean().item(), rel=1e-12)
    assert result.dead_features == pytest.approx(1 - fires.any(0).double().mean().item(), rel=1e-12)
    torch.testing.assert_close(result.density, fires.double().mean(0))


def test_sparsity_of_a_sparse_code_equals_that_of_the_dense_code() -> None:
    z = TENSORS["topk.boosting.codes"]
    result, expected = sparsity([SparseCode.from_dense(z)]), sparsity(z)
    assert result[:3] == expected[:3]
    assert torch.equal(result.density, expected.density)


def test_sparsity_refuses_missing_tokens_wrong_shapes_and_unknown_features() -> None:
    with pytest.raises(ValueError, match="no batches"):
        sparsity([])
    with pytest.raises(ValueError, match="no tokens"):
        sparsity(torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"must be \[n, 4\]; got \[2, 3\]"):
        sparsity([torch.zeros(2, 4), torch.zeros(2, 3)])
    metric = SparsityMetric(4)
    metric.update(torch.ones(1, 4))
    for features in (range(5), range(2, 2), range(-1, 3)):
        with pytest.raises(ValueError, match="there are features 0 to 3; got range"):
            metric.compute(features)
