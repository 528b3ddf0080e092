"""Sparse codes against dense codes."""

from __future__ import annotations

import pytest
import torch

from saeens_models.sparse_code import SparseCode, sparse_codes


def random_code(n: int, n_features: int, seed: int = 0) -> torch.Tensor:
    """Codes with tokens on which no feature fires, among them the first and the last."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, n_features, generator=generator)
    z[z.abs() < 1] = 0
    z[torch.rand(n, generator=generator) < 0.3] = 0
    z[[0, -1]] = 0
    return z


def dense(code: SparseCode) -> torch.Tensor:
    z = torch.zeros(code.shape, dtype=code.value.dtype)
    for token in range(code.n_tokens):
        entries = slice(int(code.start[token]), int(code.start[token + 1]))
        assert len(code.feature[entries].unique()) == len(code.feature[entries])
        z[token, code.feature[entries]] = code.value[entries]
    return z


def test_a_dense_code_is_restored_from_its_sparse_code() -> None:
    z = random_code(20, 13)
    code = SparseCode.from_dense(z)
    assert code.shape == z.shape
    assert len(code.value) == torch.count_nonzero(z)
    assert torch.equal(dense(code), z)


@pytest.mark.parametrize("shift", [5.0, 0.0], ids=["all positive", "some not positive"])
def test_topk_entries_are_the_code_where_positive(shift: float) -> None:
    pre = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)) + shift
    pre[4] -= 20
    top = pre.topk(25, dim=1)
    code = SparseCode.from_topk(top.values, top.indices, 40)
    smallest = top.values[:, -1:]
    assert torch.equal(dense(code), torch.where(pre >= smallest, pre, 0).clamp(min=0))
    assert (code.value > 0).all()


def test_values_that_are_not_finite_are_not_lost() -> None:
    code = SparseCode.from_topk(torch.tensor([[float("nan"), 1.0]]), torch.tensor([[2, 0]]), 3)
    assert code.decode(torch.ones(3, 1)).isnan().all()


def test_decoding_is_the_product_with_the_dictionary() -> None:
    z, W_dec = random_code(20, 13), torch.randn(13, 6, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(SparseCode.from_dense(z).decode(W_dec), z @ W_dec)
    assert torch.equal(SparseCode.from_dense(torch.zeros(4, 13)).decode(W_dec), torch.zeros(4, 6))


def test_concatenated_codes_are_one_code() -> None:
    members = [random_code(20, width, seed) for seed, width in enumerate([13, 1, 30])]
    joined = SparseCode.concatenate([SparseCode.from_dense(z) for z in members])
    assert torch.equal(dense(joined), torch.cat(members, dim=1))


@pytest.mark.parametrize("n_tokens", [1, 7, 20, 100])
def test_tokens_are_split_without_loss(n_tokens: int) -> None:
    z = random_code(20, 13)
    parts = list(SparseCode.from_dense(z).split(n_tokens))
    assert [part.n_tokens for part in parts] == [len(rows) for rows in z.split(n_tokens)]
    assert torch.equal(torch.cat([dense(part) for part in parts]), z)


def test_codes_that_are_not_two_dimensional_are_refused() -> None:
    for z in (torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 3, 4)):
        with pytest.raises(ValueError, match=r"must be \[n, n_features\] with n_features > 0"):
            list(sparse_codes(z))
