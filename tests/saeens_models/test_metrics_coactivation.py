"""Connectivity against golden values, scipy.sparse and the dense product."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy import sparse

from saeens_models import metrics
from saeens_models.metrics import ConnectivityMetric, MemoryBudgetError, coactivation, connectivity, streaming_memory
from saeens_models.sparse_code import SparseCode

GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["metrics"]
TENSORS = load_file(GOLDEN / "tensors.safetensors")
COMPILED = coactivation.compiled_loops


@pytest.fixture(params=["numba", "numpy"], autouse=True)
def _implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test with compiled code, and with the code that replaces it without numba."""
    if request.param == "numpy":
        monkeypatch.setattr(coactivation, "compiled_loops", lambda: None)
    else:
        assert coactivation.compiled_loops() is not None


def test_connectivity_without_numba_equals_a_dense_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(metrics, "coactivation_compiled", raising=False)
    monkeypatch.setitem(sys.modules, "saeens_models.metrics.coactivation_compiled", None)  # importing it raises ImportError
    monkeypatch.setattr(coactivation, "compiled_loops", cache(COMPILED.__wrapped__))
    assert coactivation.compiled_loops() is None
    z = random_codes(100, 130, 4)
    assert connectivity(z) == dense_connectivity(z)


def random_codes(n: int, m: int, l0: int, seed: int = 0) -> torch.Tensor:
    """Codes with l0 active features per token, some features far more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, m, generator=generator) * torch.rand(m, generator=generator)
    return torch.zeros(n, m).scatter_(1, scores.topk(l0).indices, torch.rand(n, l0, generator=generator) + 0.1)


def dense_connectivity(z: torch.Tensor) -> float:
    fires = (z != 0).double()
    return 1 - torch.count_nonzero(fires.T @ fires).item() / z.shape[1] ** 2


@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu"])
@pytest.mark.parametrize("method", ["member.0", "bagging", "boosting"])
def test_connectivity_meets_the_golden_values(architecture: str, method: str) -> None:
    expected = EXPECTED[f"{architecture}.{method}"]["connectivity"]
    assert connectivity(TENSORS[f"{architecture}.{method}.codes"]) == pytest.approx(expected, rel=1e-5, abs=1e-12)


@pytest.mark.parametrize(("n", "m", "l0"), [(400, 1000, 5), (3000, 1024, 17), (50, 130, 1), (1, 64, 3), (7, 1, 1)])
def test_connectivity_equals_scipy_sparse(n: int, m: int, l0: int) -> None:
    z = random_codes(n, m, l0)
    codes = sparse.csr_array((z != 0).numpy().astype("int64"))
    assert connectivity(z) == 1 - (codes.T @ codes).nnz / m**2


@given(cuts=st.lists(st.integers(0, 600), max_size=10))
@settings(max_examples=25, deadline=None)
def test_connectivity_does_not_depend_on_batching(cuts: list[int]) -> None:
    z = TENSORS["jumprelu.boosting.codes"]
    assert connectivity(iter(z.tensor_split(sorted(cuts)))) == dense_connectivity(z)


def test_connectivity_depends_only_on_nonzero_entries() -> None:
    assert connectivity(torch.tensor([[1e-30, 0.0, 5.0], [0.0, 0.0, 1.0]])) == 1 - 4 / 9


def test_silent_features_count_as_never_firing_together() -> None:
    assert connectivity(torch.zeros(3, 4)) == 1.0


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are processed a few hundred at a time, as with data far larger than a block."""
    monkeypatch.setattr(coactivation, "_TILE_BYTES", 12_500)


def batches(z: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    yield from z.split(size)


def test_connectivity_does_not_depend_on_the_number_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    z = random_codes(4000, 700, 9)
    small_blocks(monkeypatch)
    assert connectivity(batches(z, 100)) == dense_connectivity(z)


def test_connectivity_is_exact_in_a_budget_below_the_bit_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    z = random_codes(600, 4096, 6)
    small_blocks(monkeypatch)
    budget, expected = 400_000, dense_connectivity(z)
    assert budget < streaming_memory(4096)
    metric = ConnectivityMetric(4096, memory_budget=budget)
    for batch in batches(z, 100):
        metric.update(batch)
    tracemalloc.start()
    assert metric.compute() == expected
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < streaming_memory(4096) * 3 // 4  # bytes of the bit matrix, which is computed in strips
    assert metric.compute() == expected
    metric.update(torch.ones(1, 4096))
    assert metric.compute() == 0.0


def test_codes_beyond_the_memory_budget_name_a_sufficient_one(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    with pytest.raises(MemoryBudgetError, match="with 360448 bytes any number of tokens can be streamed") as error:
        connectivity(batches(random_codes(4000, 2048, 8), 100), memory_budget=200_000)
    assert "200000" in str(error.value)
    z = random_codes(4000, 2048, 8)
    assert connectivity(batches(z, 100), memory_budget=360_448) == dense_connectivity(z)


def test_connectivity_of_sparse_codes_equals_that_of_dense_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    z = random_codes(900, 2048, 12)
    small_blocks(monkeypatch)
    assert connectivity(SparseCode.from_dense(z)) == dense_connectivity(z)
    assert connectivity(SparseCode.from_dense(part) for part in z.split(123)) == dense_connectivity(z)


@pytest.mark.parametrize("threads", [1, 5])
def test_connectivity_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    z, before = random_codes(500, 1500, 20), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert connectivity(z) == dense_connectivity(z)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("memory_budget", [200_000, 2**30])
def test_prefixes_are_the_connectivity_of_the_first_columns(monkeypatch: pytest.MonkeyPatch, memory_budget: int) -> None:
    small_blocks(monkeypatch)
    z = random_codes(900, 2048, 12)
    metric = ConnectivityMetric(2048, memory_budget)
    metric.update(z[:300])
    metric.update(z[300:])
    sizes = [1, 63, 64, 65, 1000, 2048]
    assert metric.compute_prefixes(sizes) == [dense_connectivity(z[:, :size]) for size in sizes]


def test_connectivity_refuses_missing_tokens_and_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="no batches"):
        connectivity([])
    with pytest.raises(ValueError, match="no tokens"):
        connectivity(torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"must be \[n, 4\]; got \[2, 3\]"):
        connectivity([torch.zeros(2, 4), torch.zeros(2, 3)])
    with pytest.raises(MemoryBudgetError, match="memory_budget must be at least 65536"):
        ConnectivityMetric(2048, memory_budget=1000)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("as_sparse", [False, True])
@pytest.mark.parametrize("metric", [connectivity, metrics.sparsity])
def test_codes_that_are_not_finite_are_refused(metric, as_sparse: bool, value: float) -> None:
    z = torch.eye(5)
    z[3, 3] = value
    with pytest.raises(ValueError, match="not finite"):
        metric(SparseCode.from_dense(z) if as_sparse else z)
    assert connectivity(torch.eye(5, dtype=torch.bool)) == pytest.approx(1 - 5 / 25)
