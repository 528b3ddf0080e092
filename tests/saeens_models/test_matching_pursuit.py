"""Matching pursuit: SAELens' codes, and the compiled pursuit against the definition in torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import saeens_models as sm
from saeens_models.kernels import Team, cpu_team
from saeens_models.kernels.cpu_pursuit import MOST_ATOMS, gram

pytestmark = pytest.mark.usefixtures("two_threads")
GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "tensors.safetensors")
SETTINGS = {
    "matching_pursuit": {"max_iterations": 6, "residual_threshold": 0.5},
    "matching_pursuit_long": {"max_iterations": 12, "residual_threshold": 0.0, "stop_on_duplicate_support": False},
}


def pursuit(d_in: int, d_sae: int, **settings) -> sm.SAE:
    """Atoms whose norms are not quite 1, around a centre."""
    sae = sm.build_sae(sm.SAEConfig(architecture="matching_pursuit", d_in=d_in, d_sae=d_sae, init_seed=3, **settings))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        sae.W_dec.mul_(0.9 + 0.2 * torch.rand(d_sae, 1, generator=generator))
        sae.b_dec.normal_(generator=generator)
    return sae


def rows(n: int, d_in: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed))


def assert_compiled_is_the_definition(sae: sm.SAE, x: Tensor) -> None:
    expected = sae.backpropagate(x)
    gradients = {name: weight.grad.clone() for name, weight in sae.named_parameters() if weight.grad is not None}
    with cpu_team("cpu") as team:
        assert team is not None
        found = sae.backpropagate(x, team=team)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.x_hat, expected.x_hat, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.fire_counts, expected.fire_counts)
    for name, weight in sae.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    reconstructed = sae.reconstruct(x)
    z = sae.encode(x).detach()
    dense = torch.zeros_like(z)
    code = reconstructed.code
    dense[torch.arange(len(x)).repeat_interleave(code.start.diff()), code.feature] = code.value
    torch.testing.assert_close(dense, z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(reconstructed.x_hat, sae.decode(z).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_pursuit_codes_and_reconstructions_equal_those_of_saelens(name):
    sae = sm.build_sae(sm.SAEConfig(architecture="matching_pursuit", d_in=16, d_sae=48, **SETTINGS[name]))
    sae.load_state_dict({weight: GOLDEN[f"training.{name}.param.{weight}"] for weight in ("W_dec", "b_dec")})
    x = GOLDEN["training.batch"]
    for x_hat in (sae(x), sae.reconstruct(x).x_hat):
        torch.testing.assert_close(x_hat, GOLDEN[f"training.{name}.reconstruction"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.encode(x), GOLDEN[f"training.{name}.codes"], rtol=1e-5, atol=1e-5)
    assert_compiled_is_the_definition(sae, x)


@given(
    d_in=st.integers(1, 20),
    d_sae=st.integers(1, 600),
    n=st.integers(1, 150),
    max_iterations=st.integers(1, 12),
    residual_threshold=st.sampled_from([0.0, 0.01, 1.5]),
    stop_on_duplicate_support=st.booleans(),
    apply_b_dec_to_input=st.booleans(),
)
def test_the_compiled_pursuit_equals_its_definition(d_in, d_sae, n, **settings):
    sae = pursuit(d_in, d_sae, **settings).double().float()
    # in one or two dimensions atoms are so alike that rounding chooses between them
    if d_in >= 4:
        assert_compiled_is_the_definition(sae, rows(n, d_in))


def test_the_compiled_pursuit_selects_among_nearly_equal_atoms_as_its_definition():
    sae = pursuit(16, 512, max_iterations=8, residual_threshold=0.0)
    with torch.no_grad():  # pairs whose products differ by less than a step of the rounded ones
        sae.W_dec[256:] = sae.W_dec[:256] * (1 + 1e-5)
    assert_compiled_is_the_definition(sae, rows(200, 16))


def test_pursuit_gradients_equal_autograd_in_double_precision():
    sae = pursuit(12, 40, max_iterations=7, residual_threshold=0.0)
    x = rows(64, 12)
    with cpu_team("cpu") as team:
        sae.backpropagate(x, team=team)
    W, b = sae.W_dec.detach().double().requires_grad_(), sae.b_dec.detach().double().requires_grad_()
    loss = torch.zeros((), dtype=torch.float64)
    for token in x.double():  # as written down, token by token
        residual, chosen = token - b, set()
        for _ in range(7):
            products = W @ residual
            best = int(products.argmax())
            residual = residual - products[best] * W[best]
            if best in chosen:
                break
            chosen.add(best)
        loss = loss + residual.square().sum() / len(x)
    loss.backward()
    for found, expected in ((sae.W_dec.grad, W.grad), (sae.b_dec.grad, b.grad)):
        assert found is not None and expected is not None
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


def test_the_compiled_pursuit_has_the_same_bits_for_any_number_of_threads():
    sae = pursuit(16, 600, max_iterations=8)
    found = []
    for n_threads in (1, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(n_threads)
        try:
            with Team() as team:
                loss = sae.backpropagate(rows(700, 16), team=team).loss
        finally:
            torch.set_num_threads(before)
        assert sae.W_dec.grad is not None and sae.b_dec.grad is not None
        found.append((loss, sae.W_dec.grad.clone(), sae.b_dec.grad.clone()))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_errors_of_inner_products_stay_within_the_stated_rounding():
    W_dec = rows(300, 16)
    with Team() as team:
        found = gram(team, W_dec)
    exact = (W_dec.double() @ W_dec.double().t()).numpy()
    assert abs(found.products[:, :300] * float(found.scale) - exact).max() <= found.rounding


def test_a_reconstruction_uses_the_current_weights():
    sae, x = pursuit(16, 64, max_iterations=4), rows(32, 16)
    sae.reconstruct(x)
    with torch.no_grad():
        sae.W_dec.copy_(sae.W_dec.roll(1, dims=1))
    torch.testing.assert_close(sae.reconstruct(x).x_hat, sae(x).detach(), rtol=1e-4, atol=1e-5)
    sae.W_dec.detach().numpy()[:] *= 1.1  # as compiled optimisers write
    sae.apply_constraints()
    torch.testing.assert_close(sae.reconstruct(x).x_hat, sae(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_pursuit_needs_no_inner_products_above_the_largest_number_of_atoms(monkeypatch):
    sae, x = pursuit(16, 96, max_iterations=4), rows(32, 16)
    expected = sae.reconstruct(x)
    assert MOST_ATOMS > 96
    monkeypatch.setattr("saeens_models.architectures.matching_pursuit.MOST_ATOMS", 95)
    monkeypatch.setattr("saeens_models.architectures.matching_pursuit.gram", None)
    torch.testing.assert_close(sae.reconstruct(x).x_hat, expected.x_hat, rtol=1e-4, atol=1e-5)


def test_a_non_finite_token_makes_the_loss_non_finite():
    sae, x = pursuit(16, 64, max_iterations=4), rows(32, 16)
    x[3, 5] = torch.nan
    with Team() as team:
        assert not sae.backpropagate(x, team=team).loss.isfinite()
