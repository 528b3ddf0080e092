"""The TopK kernels against dense autograd and against sorting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from saeens_models.kernels import reference, select_topk, topk_reconstruction

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def weights_and_batch(n: int, d_in: int, d_sae: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {
        "W_enc": (draw(d_sae, d_in) / d_in**0.5).t(),
        "b_enc": 0.1 * draw(d_sae),
        "W_dec": draw(d_sae, d_in) / d_in**0.5,
        "b_dec": 0.3 * draw(d_in),
    }
    return weights, draw(n, d_in)


def dense_reconstruction(
    x: Tensor, weights: Mapping[str, Tensor], *, k: int, apply_b_dec: bool = True, dead_mask: Tensor | None = None, k_aux: int = 1
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute the definition with autograd: x_hat, error_hat and the code, with a mask of the k largest from sorting."""
    pre = (x - weights["b_dec"] if apply_b_dec else x) @ weights["W_enc"] + weights["b_enc"]
    z = pre.relu() * largest(pre, k)
    x_hat = z @ weights["W_dec"] + weights["b_dec"]
    if dead_mask is None or not dead_mask.any():
        return x_hat, None, z
    of_dead = largest(pre.masked_fill(~dead_mask, -torch.inf), min(k_aux, int(dead_mask.sum())))
    return x_hat, (pre * of_dead) @ weights["W_dec"], z


def reconstruct(x: Tensor, weights: Mapping[str, Tensor], **settings: Any) -> reference.TopKReconstruction:
    return topk_reconstruction(x, *(weights[name] for name in NAMES), **settings)


def largest(pre: Tensor, k: int) -> Tensor:
    order = pre.detach().argsort(dim=-1, descending=True)
    return torch.zeros_like(pre).scatter(-1, order[..., :k], 1.0).detach()


def loss_of(x: Tensor, x_hat: Tensor, error_hat: Tensor | None) -> Tensor:
    loss = (x - x_hat).square().sum(-1).mean()
    if error_hat is not None:
        loss = loss + 0.4 * (error_hat - (x - x_hat).detach()).square().sum(-1).mean()
    return loss


def assert_equal_to_dense(weights, x, *, k, apply_b_dec=True, dead_mask=None, k_aux=1):
    ours = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    top = reconstruct(x, ours, k=k, apply_b_dec_to_input=apply_b_dec, dead_mask=dead_mask, k_aux=k_aux)
    loss_of(x, top.x_hat, top.error_hat).backward()

    dense = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    x_hat, error_hat, z = dense_reconstruction(x.double(), dense, k=k, apply_b_dec=apply_b_dec, dead_mask=dead_mask, k_aux=k_aux)
    loss_of(x.double(), x_hat, error_hat).backward()

    torch.testing.assert_close(top.x_hat.double(), x_hat, rtol=1e-5, atol=1e-5)
    assert (top.error_hat is None) == (error_hat is None)
    if top.error_hat is not None:
        torch.testing.assert_close(top.error_hat.double(), error_hat, rtol=1e-5, atol=1e-5)
    assert top.n_dead == (0 if dead_mask is None else int(dead_mask.sum()))
    assert torch.equal(top.fire_counts, (z > 0).sum(0))
    for name in NAMES:
        grad, expected = ours[name].grad, dense[name].grad
        assert grad is not None and expected is not None
        error = (grad.double() - expected).abs().max() / expected.abs().max()
        assert error < 1e-5, f"gradient of {name} is off by {error:.1e}"


@pytest.fixture(params=["sparse", "dense"])
def path(request, monkeypatch) -> str:
    monkeypatch.setitem(reference.SPARSE_CODE_MAX_DENSITY, "cpu", 1.01 if request.param == "sparse" else 0.0)
    return request.param


@pytest.mark.parametrize("k", [1, 5, 48])
@pytest.mark.parametrize("apply_b_dec", [True, False])
def test_reconstruction_and_gradients_equal_dense_autograd(path, k, apply_b_dec):
    weights, x = weights_and_batch(64, 12, 48)
    assert_equal_to_dense(weights, x, k=k, apply_b_dec=apply_b_dec)


@pytest.mark.parametrize(("n_dead", "k_aux"), [(0, 6), (1, 6), (4, 6), (6, 6), (30, 6), (48, 6)])
def test_auxiliary_gradients_equal_dense_autograd(path, n_dead, k_aux):
    weights, x = weights_and_batch(64, 12, 48, seed=1)
    dead_mask = torch.zeros(48, dtype=torch.bool)
    dead_mask[torch.randperm(48, generator=torch.Generator().manual_seed(2))[:n_dead]] = True
    assert_equal_to_dense(weights, x, k=5, dead_mask=dead_mask, k_aux=k_aux)


def test_relu_stops_values_and_gradients_of_negative_selections(path):
    weights, x = weights_and_batch(64, 12, 48, seed=3)
    weights["b_enc"] = weights["b_enc"] - 1.5
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    assert ((pre > 0).sum(1) < 8).any()
    assert_equal_to_dense(weights, x, k=8)


def test_features_that_never_fire_get_zero_gradient(path):
    weights, x = weights_and_batch(64, 12, 48, seed=4)
    weights["b_enc"][::2] = -100.0
    ours = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    top = reconstruct(x, ours, k=5)
    top.x_hat.square().sum().backward()
    assert ours["W_dec"].grad is not None and ours["W_enc"].grad is not None
    assert (ours["W_dec"].grad[::2] == 0).all() and (ours["W_enc"].grad[:, ::2] == 0).all()
    assert (ours["W_dec"].grad[1::2] != 0).any()


def test_duplicate_rows_add_their_gradients(path):
    weights, x = weights_and_batch(8, 12, 48, seed=5)
    assert_equal_to_dense(weights, x.repeat(4, 1), k=5)


def test_an_all_zero_code_leaves_the_decoder_bias(path):
    weights, x = weights_and_batch(16, 12, 48, seed=6)
    weights["b_enc"] = torch.full((48,), -100.0)
    top = reconstruct(x, weights, k=5)
    assert torch.equal(top.x_hat, weights["b_dec"].expand(16, 12))
    assert top.fire_counts.sum() == 0


def test_ties_select_k_features_and_give_the_gradients_of_that_selection(path):
    weights, x = weights_and_batch(32, 12, 24, seed=7)
    weights["W_enc"], weights["b_enc"] = weights["W_enc"].repeat(1, 2), weights["b_enc"].repeat(2)  # every pre-activation twice
    weights["W_dec"] = weights["W_dec"].repeat(2, 1)  # so that the choice between equal ones shows in no sum
    ours = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    top = reconstruct(x, ours, k=5)
    loss_of(x, top.x_hat, None).backward()
    assert top.fire_counts.sum() <= 5 * 32
    dense = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    x_hat, _, _ = dense_reconstruction(x.double(), dense, k=5)
    loss_of(x.double(), x_hat, None).backward()
    torch.testing.assert_close(top.x_hat.double(), x_hat, rtol=1e-5, atol=1e-5)
    for name, dim in (("W_enc", 1), ("b_enc", 0), ("W_dec", 0)):
        grad, expected = ours[name].grad, dense[name].grad
        assert grad is not None and expected is not None
        pairs, expected_pairs = (sum(g.chunk(2, dim), start=torch.zeros(())) for g in (grad.double(), expected))
        torch.testing.assert_close(pairs, expected_pairs, rtol=1e-4, atol=1e-5)


def test_blocks_of_rows_do_not_change_the_result(monkeypatch):
    weights, x = weights_and_batch(200, 12, 48, seed=8)
    dead_mask = torch.arange(48) % 5 == 0
    whole = reconstruct(x, weights, k=5, dead_mask=dead_mask, k_aux=3)
    monkeypatch.setattr(reference, "_ENCODER_BYTES", 0)  # the smallest blocks: 64 rows
    blocks = reconstruct(x, weights, k=5, dead_mask=dead_mask, k_aux=3)
    torch.testing.assert_close(blocks.x_hat, whole.x_hat)
    assert blocks.error_hat is not None and whole.error_hat is not None
    torch.testing.assert_close(blocks.error_hat, whole.error_hat)
    assert torch.equal(blocks.fire_counts, whole.fire_counts)


def test_gradients_of_the_same_input_have_the_same_bits():
    weights, x = weights_and_batch(300, 24, 256, seed=9)

    def gradients() -> list[Tensor]:
        ours = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        top = reconstruct(x, ours, k=4, dead_mask=torch.arange(256) % 3 == 0, k_aux=6)
        return list(torch.autograd.grad(loss_of(x, top.x_hat, top.error_hat), list(ours.values())))

    assert all(torch.equal(first, second) for first, second in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(
    ("shape", "k"), [((40, 4096), 32), ((7, 4104), 1), ((5, 4100), 9), ((6, 4096), 256), ((6, 4096), 4096), ((2, 3, 4096), 8)]
)
def test_selection_takes_the_k_largest_of_each_row(shape, k):
    pre = torch.randn(*shape, generator=torch.Generator().manual_seed(k))
    top = select_topk(pre, k)
    assert torch.equal(pre.gather(-1, top.indices), top.values)
    assert torch.equal(top.values.sort(dim=-1).values, pre.sort(dim=-1).values[..., -k:])
    assert all(len(row.unique()) == k for row in top.indices.flatten(0, -2))


@pytest.mark.parametrize("shape", [(20, 4096), (2, 5, 700), (9, 3)])
@pytest.mark.parametrize("k", [1, 2, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_selection_among_ties_takes_the_lowest_indices(shape, k, dtype):
    k = min(k, shape[-1])
    pre = torch.randint(-1, 3, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    pre[0] = 0
    top = select_topk(pre.requires_grad_(), k)
    expected = [sorted(sorted(range(len(row)), key=lambda i, row=row: -row[i])[:k]) for row in pre.flatten(0, -2).tolist()]
    assert top.indices.sort().values.flatten(0, -2).tolist() == expected
    assert torch.equal(top.values, pre.gather(-1, top.indices))
    (of_pre,) = torch.autograd.grad(top.values.sum(), pre)
    assert torch.equal(of_pre, torch.zeros_like(pre).scatter(-1, top.indices, 1.0))


def test_selection_keeps_nan():
    pre = torch.zeros(3, 50)
    pre[1, 7], pre[2, 9:] = torch.nan, torch.nan
    assert select_topk(pre, 4).values.isnan().sum(1).tolist() == [0, 1, 4]
