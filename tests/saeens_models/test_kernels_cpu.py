"""The compiled CPU step against the same loss, written densely in float64 and differentiated by autograd."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saeens_models as sm
from saeens_models.architectures import build_sae, sae_class
from saeens_models.kernels import Team, compiled, cpu_team, cpu_topk_encoder, products
from saeens_models.kernels.cpu_jumprelu import SPARSE_BLOCK_MAX_DENSITY
from saeens_models.kernels.cpu_topk import topk_gradients, topk_reconstruct
from saeens_models.kernels.cpu_topk_encoder import select_topk
from saeens_models.kernels.weights import Weights
from saeens_models.training import load_kernels
from saeens_models.training.adam import Adam

pytestmark = pytest.mark.usefixtures("two_threads")
finite = st.floats(-100, 100, width=32)


@st.composite
def rows_and_k(draw) -> tuple[np.ndarray, int]:
    """Rows with many equal entries, short and long ones."""
    m = draw(st.integers(1, 200))
    values = draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0, 1e30, -1e-30]) | finite, min_size=2 * m, max_size=2 * m))
    return np.array(values, np.float32).reshape(2, m), draw(st.integers(1, m))


def _select(pre: np.ndarray, k: int, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    indices, values = np.empty((len(pre), k), np.int32), np.empty((len(pre), k), np.float32)
    with Team() as team:
        select_topk(team, torch.from_numpy(pre), np.zeros(pre.shape[1], np.float32) if bias is None else bias, indices, values)
    return indices, values


@given(rows_and_k())
@settings(deadline=None, max_examples=200)
def test_the_k_largest_entries_are_selected_each_once(case):
    pre, k = case
    indices, values = _select(pre.copy(), k)
    assert np.array_equal(np.sort(values)[:, ::-1], np.sort(pre)[:, ::-1][:, :k])
    assert np.array_equal(np.take_along_axis(pre, indices, 1), values)
    assert all(len(set(row)) == k for row in indices.tolist())
    assert np.array_equal(np.sort(indices), np.sort(np.argsort(-pre, axis=1, kind="stable")[:, :k]))  # of equal ones the first


@pytest.mark.parametrize(("m", "k"), [(300, 1), (600, 1), (1500, 3), (5003, 9), (5003, 5000), (64, 64)])
def test_the_k_largest_of_long_rows_are_selected(m, k):
    pre = np.random.default_rng(m).standard_normal((20, m)).astype(np.float32)
    pre[10:] = np.round(pre[10:])  # many equal ones
    indices, values = _select(pre.copy(), k)
    assert np.array_equal(np.sort(values), np.sort(pre)[:, m - k :])
    assert np.array_equal(np.take_along_axis(pre, indices, 1), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def _fresh_products() -> ModuleType:
    """Load the module once more: it remembers which library is faster on this processor."""
    spec = find_spec(products.__name__)
    assert spec and spec.loader
    fresh = module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


@pytest.mark.parametrize("use_onednn", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_either_library_equal_those_in_float64(monkeypatch, transposed, use_onednn):
    x, W = torch.randn(37, 50, generator=torch.Generator().manual_seed(0)), torch.randn(70, 50, generator=torch.Generator().manual_seed(1))
    factor = W.t().contiguous().t() if transposed else W
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": use_onednn, "cpu_name": "AMD EPYC"})
    product = _fresh_products().linear(x, factor)
    torch.testing.assert_close(product.double(), x.double() @ W.double().t(), rtol=1e-5, atol=1e-5)


def test_products_use_mkl_if_torch_has_no_onednn_operator(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True, "cpu_name": "AMD EPYC"})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace())
    x, W = torch.randn(37, 50, generator=torch.Generator().manual_seed(0)), torch.randn(70, 50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(_fresh_products().linear(x, W), torch.mm(x, W.t()))


def test_products_in_bfloat16_equal_products_of_rounded_factors():
    x, W = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)), torch.randn(50, 30, generator=torch.Generator().manual_seed(1))
    rounded = x.bfloat16().double() @ W.bfloat16().double().t()
    product = products.linear(x, W, in_bfloat16=True)
    assert product.dtype == torch.float32
    torch.testing.assert_close(product.double(), rounded, rtol=2**-8, atol=1e-5)


@contextmanager
def _precision(name: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_steps_in_bfloat16_differ_by_its_rounding_alone(monkeypatch, architecture):
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    sae = build_sae(sm.SAEConfig(architecture=architecture, d_in=24, d_sae=90, init_seed=3))
    monkeypatch.setattr("saeens_models.kernels.team.multiplies_bfloat16", lambda: True)
    gradients = {}
    for precision in ("highest", "medium"):
        with _precision(precision), Team() as team:
            sae.backpropagate(x, team=team)
        assert sae.W_enc.grad is not None
        gradients[precision] = sae.W_enc.grad.clone()
    difference = (gradients["medium"] - gradients["highest"]).norm() / gradients["highest"].norm()
    assert 1e-5 < difference < 0.02


@pytest.mark.parametrize("rough", [True, False])
def test_the_selected_features_do_not_depend_on_the_precision_of_products(monkeypatch, rough):
    """Nearly equal features: all tokens have more candidates than the memory holds."""
    generator = torch.Generator().manual_seed(3)
    direction = torch.randn(1, 32, generator=generator)
    W = direction + 1e-4 * torch.randn(600, 32, generator=generator)
    weights = Weights(W, torch.zeros(600), W, torch.zeros(32))
    x = direction + 0.1 * torch.randn(70, 32, generator=generator)
    monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_: rough)
    codes = []
    for precision in ("highest", "medium"):
        with _precision(precision), Team() as team:
            codes.append(topk_reconstruct(team, x, weights, k=5, apply_b_dec_to_input=False))
    assert torch.equal(codes[0].indices, codes[1].indices)
    assert torch.equal(codes[0].values, codes[1].values)


def test_the_bias_is_added_before_selecting():
    pre, bias = np.zeros((1, 100), np.float32), np.arange(100, dtype=np.float32)
    indices, values = _select(pre, 3, bias)
    assert sorted(indices[0]) == [97, 98, 99]
    assert sorted(values[0]) == [97, 98, 99]


@pytest.mark.parametrize("m", [3, 10, 1000])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("all_of_them", [True, False])
def test_a_row_with_nan_selects_nan(m, sign, all_of_them):
    pre = np.ones((2, m), np.float32)
    pre[0, :: 1 if all_of_them else m] = np.copysign(np.float32(np.nan), sign)  # NaN from a processor has the sign bit
    _, values = _select(pre, 3)
    assert np.isnan(values[0]).all()
    assert (values[1] == 1).all()


@given(
    n=st.integers(1, 40),
    d_in=st.integers(1, 12),
    d_sae=st.integers(2, 70),
    k=st.integers(1, 6),
    dead=st.integers(0, 20),
    k_aux=st.integers(1, 9),
    centred=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=60)
def test_loss_and_gradients_equal_dense_autograd_in_float64(*, n, d_in, d_sae, k, dead, k_aux, centred, seed):
    k = min(k, d_sae)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_in, generator=generator)
    weights = Weights(*(torch.randn(shape, generator=generator) for shape in ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))))
    dead_features = torch.randperm(d_sae, generator=generator)[:dead].sort().values if dead else None
    with Team() as team:
        found = topk_gradients(
            team,
            x,
            weights,
            k=k,
            apply_b_dec_to_input=centred,
            dead=dead_features,
            k_aux=k_aux,
            aux_coefficient=0.0 if dead_features is None else 0.7,
        )
        gradients = Weights(*(gradient.clone() for gradient in found.gradients))
    expected = _dense(
        x.double(), Weights(*(w.double() for w in weights)), k=k, centred=centred, dead=dead_features, k_aux=k_aux, coefficient=0.7
    )
    torch.testing.assert_close(found.mse.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.second_term.double(), expected[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.x_hat.double(), expected[2], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.fire_counts.long(), expected[3])
    for name, gradient, true in zip(Weights._fields, gradients, expected[4], strict=True):
        torch.testing.assert_close(
            gradient.double(), true, rtol=1e-5, atol=1e-5 * float(1 + true.abs().max()), msg=lambda m, n=name: f"{n}: {m}"
        )


def _dense(x: Tensor, given: Weights, *, k: int, centred: bool, dead: Tensor | None, k_aux: int, coefficient: float):
    weights = Weights(*(w.clone().requires_grad_() for w in given))
    pre = (x - weights.b_dec if centred else x) @ weights.W_enc.t() + weights.b_enc
    top = pre.topk(k)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    x_hat = z @ weights.W_dec + weights.b_dec
    mse, auxiliary = (x_hat - x).square().sum(1).mean(), torch.zeros((), dtype=x.dtype)
    if dead is not None:
        of_dead = pre[:, dead].topk(min(k_aux, len(dead)))
        e_hat = torch.zeros(len(x), len(dead), dtype=x.dtype).scatter(1, of_dead.indices, of_dead.values) @ weights.W_dec[dead]
        auxiliary = coefficient * (e_hat - (x - x_hat).detach()).square().sum(1).mean()
    gradients = Weights(*torch.autograd.grad(mse + auxiliary, weights))
    return mse.detach(), auxiliary.detach(), x_hat.detach(), (z > 0).sum(0), gradients


@pytest.mark.parametrize("shape", [(300, 64, 3), (512, 37, 9), (2000, 24, 60)])
def test_a_low_precision_encoder_selects_the_features_that_float32_selects(monkeypatch, shape):
    d_sae, d_in, k = shape
    generator = torch.Generator().manual_seed(d_sae)
    weights = Weights(*(torch.randn(shape, generator=generator) for shape in ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))))
    weights.W_enc[7] *= 10  # its bound on the error holds for all
    weights.b_enc[11] = 50  # so does this one's: products are rounded before the bias is added
    x = torch.randn(600, d_in, generator=generator) * torch.logspace(-3, 3, 600)[:, None]
    codes = []
    for rough in (True, False):
        monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_, rough=rough: rough)
        with Team() as team:
            codes.append(topk_reconstruct(team, x, weights, k=k, apply_b_dec_to_input=True))
    for tokens in zip(*(code.indices.tolist() for code in codes), strict=True):
        assert set(tokens[0]) == set(tokens[1])
    ours, theirs = (code.x_hat for code in codes)
    assert ((ours - theirs).norm(dim=1) < 1e-5 * theirs.norm(dim=1)).all()


def test_near_ties_of_a_low_precision_encoder_are_decided_in_float32(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    d_sae, d_in, k = 3000, 24, 5
    W_enc, W_dec = torch.randn(2, d_sae, d_in, generator=generator)
    weights = Weights(W_enc, torch.zeros(d_sae), W_dec, torch.zeros(d_in))
    weights.W_enc[:, 0] = 100 + 1e-2 * torch.rand(d_sae, generator=generator)  # more features than fit are within the rounding
    x = torch.randn(300, d_in, generator=generator)
    x[:40, 1:] *= 1e-3
    x[40:80] = 0  # all pre-activations are equal
    asked = []
    monkeypatch.setattr(cpu_topk_encoder, "select_topk", lambda team, pre, *rest: (asked.append(len(pre)), select_topk(team, pre, *rest)))
    codes = []
    for rough in (True, False):
        monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_, rough=rough: rough)
        with Team() as team:
            codes.append(topk_reconstruct(team, x, weights, k=k, apply_b_dec_to_input=False))
    ours, theirs = codes
    assert 80 <= sum(asked[:-2]) < len(x)  # by the rough one; the other does so for each of two blocks
    assert (ours.indices[:40].sort().values == theirs.indices[:40].sort().values).all()
    torch.testing.assert_close(ours.x_hat, theirs.x_hat, rtol=1e-5, atol=1e-4)
    assert not ours.values[40:80].any()


@pytest.mark.parametrize("rough", [True, False])
def test_of_equal_pre_activations_those_of_the_lowest_index_are_selected(monkeypatch, rough):
    """Weights differ but pre-activations are equal: the sums are whole numbers, exact in float32 and rounded unequally in bfloat16."""
    generator = torch.Generator().manual_seed(2)
    moved = torch.randint(-400, 401, (300, 8), generator=generator).float()
    W = torch.cat([1000 + moved, 1000 - moved], 1) + torch.randint(3, (300, 1), generator=generator)
    weights = Weights(W, torch.zeros(300), W, torch.zeros(16))
    x = torch.randint(1, 9, (80, 1), generator=generator).float().expand(80, 16).contiguous()
    monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_: rough)
    monkeypatch.setattr(cpu_topk_encoder, "_SPARE_CANDIDATES", 300)  # no token is left to float32
    with Team() as team:
        indices = topk_reconstruct(team, x, weights, k=7, apply_b_dec_to_input=False).indices
    expected = (x @ W.t()).double().sort(dim=1, descending=True, stable=True).indices[:, :7]
    assert torch.equal(indices.sort().values.long(), expected.sort().values)


@pytest.mark.parametrize(("n", "d_sae", "k"), [(1, 100, 3), (3, 40, 40), (5, 1, 1), (300, 64, 63)])
def test_a_low_precision_encoder_takes_all_sizes(monkeypatch, n, d_sae, k):
    generator = torch.Generator().manual_seed(n)
    weights = Weights(*(torch.randn(shape, generator=generator) for shape in ((d_sae, 9), (d_sae,), (d_sae, 9), (9,))))
    monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_: True)
    x = torch.randn(n, 9, generator=generator)
    with Team() as team:
        x_hat = topk_reconstruct(team, x, weights, k=k, apply_b_dec_to_input=False).x_hat
    top = (x @ weights.W_enc.t() + weights.b_enc).topk(k)
    z = torch.zeros(n, d_sae).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(x_hat, z @ weights.W_dec + weights.b_dec, rtol=1e-5, atol=1e-4)


def test_equal_tokens_have_equal_codes_in_every_position(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    weights = Weights(*(torch.randn(shape, generator=generator) for shape in ((400, 50), (400,), (400, 50), (50,))))
    x = torch.randn(300, 50, generator=generator)
    x[100:] = x[torch.randint(100, (200,), generator=generator)]
    monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_: True)
    with Team() as team:
        x_hat = topk_reconstruct(team, x, weights, k=9, apply_b_dec_to_input=False).x_hat
    first_of_equal = (x[:, None] == x[None]).all(2).int().argmax(1)
    assert torch.equal(x_hat, x_hat[first_of_equal])


def test_a_low_precision_encoder_distinguishes_the_smallest_numbers(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    W_enc, W_dec = torch.randn(2, 500, 16, generator=generator)
    weights = Weights(W_enc + 100, torch.zeros(500), W_dec, torch.zeros(16))
    x = torch.randn(64, 16, generator=generator)
    x = (x - x.mean(1, keepdim=True)) * 1e-24  # a part that all weights share adds nothing
    monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_: True)
    with Team() as team:
        indices = topk_reconstruct(team, x, weights, k=8, apply_b_dec_to_input=False).indices
    expected = (x.double() @ weights.W_enc.double().t()).topk(8).indices
    assert (indices.sort().values == expected.sort().values).all()


def test_a_low_precision_encoder_propagates_nan(monkeypatch):
    generator = torch.Generator().manual_seed(4)
    weights = Weights(*(torch.randn(shape, generator=generator) for shape in ((600, 16), (600,), (600, 16), (16,))))
    x = torch.randn(300, 16, generator=generator)
    x[7, 3] = torch.nan
    x[270, 5] = torch.inf
    monkeypatch.setattr("saeens_models.kernels.cpu_topk.bfloat16_pays", lambda *_: True)
    with Team() as team:
        x_hat = topk_reconstruct(team, x, weights, k=6, apply_b_dec_to_input=True).x_hat
    assert x_hat[7].isnan().all()
    assert not x_hat[270].isfinite().any()
    assert x_hat.isfinite().all(dim=1).sum() == len(x) - 2


def test_encoding_and_decoding_equal_the_dense_code():
    generator = torch.Generator().manual_seed(0)
    weights = Weights(*(torch.randn(shape, generator=generator) for shape in ((300, 16), (300,), (300, 16), (16,))))
    x = torch.randn(700, 16, generator=generator)
    with Team() as team:
        values, indices, x_hat = topk_reconstruct(team, x, weights, k=7, apply_b_dec_to_input=True)
    top = ((x - weights.b_dec) @ weights.W_enc.t() + weights.b_enc).topk(7)
    z = torch.zeros(700, 300).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(x_hat, z @ weights.W_dec + weights.b_dec, rtol=1e-5, atol=1e-4)
    found = torch.zeros(700, 301).scatter_add(1, torch.where(indices < 0, 300, indices).long(), values)[:, :300]
    torch.testing.assert_close(found, z, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("settings", [{"apply_b_dec_to_input": True}, {"apply_b_dec_to_input": False}])
@pytest.mark.parametrize(
    "architecture",
    [{"architecture": "standard", "l1_coefficient": 0.3}, {"architecture": "jumprelu", "bandwidth": 0.4, "init_threshold": 0.3}],
    ids=lambda architecture: architecture["architecture"],
)
def test_compiled_gradients_of_standard_and_jumprelu_saes_equal_autograd(architecture, settings):
    sae = build_sae(sm.SAEConfig(**architecture, **settings, d_in=16, d_sae=600, init_seed=4))
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
    x = torch.randn(700, 16, generator=generator)
    expected = sae.backpropagate(x, sparsity_scale=0.5)
    true = {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}
    with Team() as team:
        found = sae.backpropagate(x, sparsity_scale=0.5, team=team)
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(parameter.grad, true[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    for field in ("loss", "x_hat", "fire_counts"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.terms, expected.terms, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("near_the_threshold", [0.0, 0.02])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_gradients_of_blocks_with_few_active_features_equal_autograd(
    architecture: str, apply_b_dec_to_input: bool, near_the_threshold: float, monkeypatch: pytest.MonkeyPatch
):
    own = {"l1_coefficient": 0.3} if architecture == "standard" else {"bandwidth": 0.3, "init_threshold": 0.2, "l0_coefficient": 0.05}
    config = sm.SAEConfig(architecture=architecture, **own, apply_b_dec_to_input=apply_b_dec_to_input, d_in=16, d_sae=600, init_seed=4)
    sae, generator = build_sae(config), torch.Generator().manual_seed(6)
    x = torch.randn(768, 16, generator=generator) * torch.tensor([50.0, 1.0, 1e-3]).repeat_interleave(256)[:, None]
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.rand(parameter.shape, generator=generator))
        sae.b_enc.sub_((x[256:512] @ sae.W_enc).quantile(0.97))
        sae.b_enc[: int(near_the_threshold * 600)] = 0.2  # nothing but these is active in the last block, or next to being so
    expected = sae.backpropagate(x)
    true = {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}
    listed, list_entries = [], compiled.list_entries
    monkeypatch.setattr(compiled, "list_entries", lambda *given: (listed.append(int(given[4].sum())), list_entries(*given)))
    with Team() as team:
        found = sae.backpropagate(x, team=team)
        for name, parameter in sae.named_parameters():
            torch.testing.assert_close(parameter.grad, true[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert len(listed) == 2 and 0 < max(listed) < SPARSE_BLOCK_MAX_DENSITY * 256 * 600
    assert (min(listed) == 0) == (near_the_threshold == 0.0)
    for field in ("loss", "x_hat", "fire_counts"):
        torch.testing.assert_close(getattr(found, field), getattr(expected, field), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_pre_activation_is_detected_among_few_active_features(value: float):
    sae = build_sae(sm.SAEConfig(architecture="standard", d_in=8, d_sae=300, init_seed=1))
    with torch.no_grad():
        sae.b_enc.fill_(-50.0)
        sae.b_enc[7] = value
    with Team() as team:
        assert not sae.backpropagate(torch.randn(40, 8), team=team).loss.isfinite()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_compiled_adam_steps_equal_those_of_torch(unit_norm, clip):
    config = sm.SAEConfig(architecture="jumprelu", d_in=24, d_sae=90, init_seed=3)
    training = sm.TrainingConfig(learning_rate=1e-2, unit_norm_decoder=unit_norm, gradient_clip_norm=clip)
    ours, torchs = build_sae(config), build_sae(config)
    optimiser, reference = Adam(ours, training), Adam(torchs, training)
    generator = torch.Generator().manual_seed(5)
    with Team() as team:
        for _ in range(5):
            for parameter, other in zip(ours.parameters(), torchs.parameters(), strict=True):
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad, other.grad = (torch.empty_like(parameter).copy_(gradient) for _ in range(2))
            optimiser.step(1e-2, team)
            reference.step(1e-2)
    for (name, parameter), other in zip(ours.named_parameters(), torchs.parameters(), strict=True):
        torch.testing.assert_close(parameter, other, msg=lambda m, n=name: f"{n}: {m}")
    if unit_norm:
        torch.testing.assert_close(ours.W_dec.norm(dim=1), torch.ones(90))


def test_training_without_numba_gives_the_same_sae_up_to_rounding(monkeypatch):
    x = torch.randn(20, 64, 12, generator=torch.Generator().manual_seed(1)).cumsum(-1)
    config = sm.SAEConfig(architecture="topk", d_in=12, d_sae=60, k=3)
    training = sm.TrainingConfig(learning_rate=3e-3, dead_after_tokens=200, unit_norm_decoder=True)
    (ours,) = sm.train([config], x, training)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(sae_class("topk"), "stored_weights", property(lambda sae: pytest.fail("the compiled step was taken")))
    (torchs,) = sm.train([config], x, training)
    for name, weight in ours.state_dict().items():
        torch.testing.assert_close(weight, torchs.state_dict()[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("architecture", [{"architecture": "topk", "k": 4}, {"architecture": "standard"}, {"architecture": "jumprelu"}])
def test_weights_have_the_same_bits_for_any_number_of_threads(architecture):
    x = torch.randn(6, 300, 16, generator=torch.Generator().manual_seed(2))
    configs = [sm.SAEConfig(**architecture, d_in=16, d_sae=1100, init_seed=seed) for seed in range(3)]
    before = torch.get_num_threads()
    trained = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            trained.append(sm.train(configs, x, sm.TrainingConfig(learning_rate=1e-3, dead_after_tokens=500)))
    finally:
        torch.set_num_threads(before)
    for other in trained[1:]:
        for sae, of_one_thread in zip(other, trained[0], strict=True):
            for name, weight in sae.state_dict().items():
                assert torch.equal(weight, of_one_thread.state_dict()[name]), name


def test_a_team_uses_torchs_threads_and_restores_them():
    threads = torch.get_num_threads()
    with Team() as team:
        assert team.n_threads == threads
        assert torch.get_num_threads() == 1
        assert team.run(lambda i: (i, torch.get_num_threads()), 20) == [(i, 1) for i in range(20)]
        with team.resting():
            assert torch.get_num_threads() == threads
    assert torch.get_num_threads() == threads


def test_kernels_are_compiled_on_another_thread():
    with Team() as team:
        assert team.apart(threading.current_thread) is not threading.current_thread()
    threads = torch.get_num_threads()
    load_kernels.__wrapped__("topk")
    assert torch.get_num_threads() == threads


def test_an_error_in_one_task_ends_all_tasks():
    started: list[int] = []

    def task(i: int) -> None:
        started.append(i)
        if i == 3:
            raise ArithmeticError("task 3")

    with Team() as team, pytest.raises(ArithmeticError, match="task 3"):
        team.run(task, 100_000)
    assert len(started) < 100_000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("saeens-team")]


def test_a_broken_numba_is_warned_about_and_not_used(monkeypatch):
    def refuse(name: str):
        raise ImportError("Numba needs NumPy 2.3 or less", name="numpy")

    monkeypatch.setattr("saeens_models.kernels.team.import_module", refuse)
    with pytest.warns(UserWarning, match=r"numba cannot be imported.*NumPy 2\.3"), cpu_team("cpu") as team:
        assert team is None


def test_cpu_team_is_none_on_other_devices():
    with cpu_team("meta") as team:
        assert team is None
    with cpu_team("cpu") as team:
        assert isinstance(team, Team)


def _largest_step_memory(architecture: str, *, n: int, d_in: int, d_sae: int, k: int, n_threads: int) -> int:
    """Bytes beyond weights and optimiser: gradients, W_enc in bfloat16, entries of tokens, counts, blocks of pre-activations."""
    gradients = 2 * d_sae * (d_in + 1) + 2 * d_in
    blocks = n_threads * 3 * 256 * d_sae
    if architecture == "topk":
        of_tokens = n * (4 * d_in + 2 * 8 * max(k, d_in // 2))
        return 4 * (gradients + d_sae * d_in // 2 + of_tokens + 12 * d_sae * (n // 256 + 2) + blocks)
    return 4 * (gradients + d_sae * d_in + n * (2 * d_sae + 3 * d_in) + 5 * d_sae * (n // 256 + 2) + blocks)


@pytest.mark.parametrize("architecture", ["topk", "standard", "jumprelu"])
def test_the_memory_of_a_step_is_bounded_by_its_sizes(architecture):
    sizes = {"n": 600, "d_in": 24, "d_sae": 900, "k": 5}
    own = {"k": sizes["k"]} if architecture == "topk" else {}
    sae = build_sae(sm.SAEConfig(architecture=architecture, d_in=sizes["d_in"], d_sae=sizes["d_sae"], **own))
    kept: dict[str, int] = {}  # bytes of the calling thread

    class RecordingTeam(Team):
        def scratch(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            memory = super().scratch(name, *shape, dtype=dtype)
            if threading.current_thread() is threading.main_thread():
                kept[name] = memory.untyped_storage().nbytes()
            return memory

    with RecordingTeam() as team:
        sae.backpropagate(torch.randn(sizes["n"], sizes["d_in"]), torch.arange(sizes["d_sae"]) % 2 == 0, team=team)
    assert 0 < sum(kept.values()) < _largest_step_memory(architecture, **sizes, n_threads=1)
    assert _largest_step_memory(architecture, n=4096, d_in=768, d_sae=16128, k=64, n_threads=2) < 1.5e9
