"""The CUDA kernels against sorting, dense autograd in float64 and the reference: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeens_models.kernels import cuda, reference, topk_reconstruction

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
triton_topk = pytest.importorskip("saeens_models.kernels.triton_topk", reason="Triton is not installed: no CUDA kernels to test")

pytestmark = pytest.mark.cuda
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs an NVIDIA GPU")
few_examples = settings(max_examples=40 if ON_GPU else 6, deadline=None, derandomize=True)

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def weights_and_batch(n: int, d_in: int, d_sae: int, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    weights = {
        "W_enc": (draw(d_sae, d_in, seed=seed) / d_in**0.5).t(),
        "b_enc": 0.1 * draw(d_sae, seed=seed + 1),
        "W_dec": draw(d_sae, d_in, seed=seed + 2) / d_in**0.5,
        "b_dec": 0.3 * draw(d_in, seed=seed + 3),
    }
    return weights, draw(n, d_in, seed=seed + 4)


def largest(pre: Tensor, k: int) -> Tensor:
    """A mask of the k largest of each row; of equal ones the first."""
    return torch.zeros_like(pre).scatter(-1, pre.detach().argsort(dim=-1, descending=True, stable=True)[:, :k], 1.0)


def results(step: Any, x: Tensor, weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """What a step gives, and the gradients of a loss with both of its outputs."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    top = step(x, *(leaves[name] for name in NAMES), **settings)
    error = x - top.x_hat
    loss = error.square().sum(-1).mean()
    outputs = {"x_hat": top.x_hat, "fire_counts": top.fire_counts}
    if top.error_hat is not None:
        loss = loss + 0.4 * (top.error_hat - error.detach()).square().sum(-1).mean()
        outputs["error_hat"] = top.error_hat
    loss.backward()
    gradients = {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    assert len(gradients) == len(NAMES)
    return {name: tensor.detach() for name, tensor in (outputs | gradients).items()}


def dense_step(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    *,
    k: int,
    apply_b_dec_to_input: bool = True,
    dead_mask: Tensor | None = None,
    k_aux: int = 1,
    selected: Tensor | None = None,
) -> reference.TopKReconstruction:
    """The definition, by autograd; ``selected`` is a mask to take instead of that of the k largest."""
    pre = (x - b_dec if apply_b_dec_to_input else x) @ W_enc + b_enc
    z = pre.relu() * (largest(pre, k) if selected is None else selected)
    error_hat, n_dead = None, 0
    if dead_mask is not None and dead_mask.any():
        n_dead = int(dead_mask.sum())
        error_hat = (pre * largest(pre.masked_fill(~dead_mask, -torch.inf), min(k_aux, n_dead))) @ W_dec
    return reference.TopKReconstruction(z @ W_dec + b_dec, error_hat, n_dead, (z > 0).sum(0))


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert torch.equal(found["fire_counts"], expected["fire_counts"])
    for name, tensor in expected.items():
        error = (found[name].double() - tensor.double()).abs().max() / tensor.double().abs().max().clamp_min(1e-3)
        assert error < tolerance, f"{name} is off by {error:.1e}"


def in_float64(x: Tensor, weights: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return x.double(), {name: weight.double() for name, weight in weights.items()}


@few_examples
@given(
    d_sae=st.integers(1, 70),
    share=st.floats(0, 1),
    tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    of_columns=st.booleans(),
    seed=st.integers(0, 99),
)
def test_selection_takes_the_k_largest_and_of_equal_ones_the_first(*, d_sae, share, tied, dtype, of_columns, seed):
    pre = draw(3, d_sae, seed=seed)
    pre = (pre.round() if tied else pre).to(dtype)
    bias = draw(d_sae, seed=seed + 1).round() + 0.5  # no sum is 0, of which there are two
    columns = torch.arange(seed % 2, d_sae, 2, device=DEVICE) if of_columns and d_sae > 1 else None
    candidates = pre.float() + bias
    if columns is not None:
        candidates = candidates[:, columns]
    k = 1 + int(share * (candidates.shape[1] - 1))

    top = triton_topk.select_topk(pre, k, bias, columns)

    expected = candidates.argsort(dim=1, descending=True, stable=True)[:, :k].sort(dim=1).values
    assert torch.equal(top.indices, expected)
    assert torch.equal(top.values, candidates.gather(1, expected))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_sae", [53, 241])  # 241: the last part holds 1, fewer than are selected
def test_selection_from_rows_in_parts_is_that_from_whole_rows(monkeypatch, tied, d_sae):
    monkeypatch.setattr(triton_topk, "MOST_CANDIDATES", 16)
    pre = draw(2, d_sae, seed=3)
    pre = pre.round() if tied else pre
    top = triton_topk.select_topk(pre, 7)
    assert torch.equal(top.indices, pre.argsort(dim=1, descending=True, stable=True)[:, :7].sort(dim=1).values)
    assert torch.equal(top.values, pre.gather(1, top.indices))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_what_is_not_a_number_is_selected(sign):
    pre = draw(2, 20)
    pre[0, 13] = torch.tensor(torch.nan).copysign(torch.tensor(sign))
    top = triton_topk.select_topk(pre, 1)
    assert top.indices[0].tolist() == [13]
    assert top.values[0].isnan().all() and top.values[1].isfinite().all()


@pytest.mark.parametrize("d", [7, 130])
def test_sums_of_rows_equal_those_in_float64(d):
    lengths = torch.tensor([0, 1, 16, 17, 0, 40], device=DEVICE)  # of segments; some empty, some longer than a tile
    starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    n_entries = int(starts[-1])
    rows, weights, before = draw(9, d), draw(n_entries, seed=1), draw(6, d, seed=2)
    which = torch.arange(n_entries, device=DEVICE) * 5 % 9
    totals = torch.empty(6, device=DEVICE)

    sums = triton_topk.sum_rows(before.clone(), rows, which, weights, starts, totals=totals)

    segment_of = torch.arange(6, device=DEVICE).repeat_interleave(lengths)
    expected = before.double().index_add(0, segment_of, weights.double()[:, None] * rows.double()[which])
    torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=1e-5)
    expected_totals = torch.zeros(6, dtype=torch.float64, device=DEVICE).index_add(0, segment_of, weights.double())
    torch.testing.assert_close(totals.double(), expected_totals, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("d", "k"), [(7, 3), (130, 19)])
def test_products_of_rows_equal_those_in_float64(d, k):
    left, right = draw(3, d), draw(11, d, seed=1)
    which = torch.arange(3 * k, device=DEVICE).view(3, k) * 7 % 11
    products = triton_topk.multiply_rows(left, right, which)
    expected = (left.double()[:, None] * right.double()[which]).sum(-1)
    torch.testing.assert_close(products.double(), expected, rtol=1e-5, atol=1e-5)


@few_examples
@given(
    n=st.integers(1, 6),
    d_in=st.integers(1, 20),
    d_sae=st.integers(2, 40),
    k=st.integers(1, 9),
    apply_b_dec=st.booleans(),
    every=st.sampled_from([None, 1, 2, 3]),
    shift=st.sampled_from([0.0, -1.0, -100.0]),
)
def test_reconstruction_and_gradients_equal_dense_autograd_and_the_reference(*, n, d_in, d_sae, k, apply_b_dec, every, shift):
    weights, x = weights_and_batch(n, d_in, d_sae, seed=d_sae)
    weights["b_enc"] = weights["b_enc"] + shift  # lower: fewer of the selected features are active, down to none
    dead_mask = None if every is None else torch.arange(d_sae, device=DEVICE) % every == 0
    settings: dict[str, Any] = {"k": min(k, d_sae), "apply_b_dec_to_input": apply_b_dec, "dead_mask": dead_mask, "k_aux": 4}
    found = results(cuda.sparse_topk_reconstruction, x, weights, **settings)
    assert_close(found, results(dense_step, *in_float64(x, weights), **settings))
    assert_close(found, results(reference.topk_reconstruction, x, weights, **settings))


def test_blocks_of_tokens_change_nothing(monkeypatch):
    weights, x = weights_and_batch(7, 12, 48)
    settings = {"k": 5, "dead_mask": torch.arange(48, device=DEVICE) % 5 == 0, "k_aux": 3}
    monkeypatch.setattr(cuda, "_BLOCK_BYTES", 2 * 48 * 4)  # two tokens
    found = results(cuda.sparse_topk_reconstruction, x, weights, **settings)
    assert_close(found, results(dense_step, *in_float64(x, weights), **settings))


def test_without_dead_features_there_is_no_auxiliary_code():
    weights, x = weights_and_batch(3, 12, 24)
    dead_mask = torch.zeros(24, dtype=torch.bool, device=DEVICE)
    top = cuda.sparse_topk_reconstruction(x, *(weights[name] for name in NAMES), k=3, dead_mask=dead_mask)
    assert top.error_hat is None and top.n_dead == 0


def test_an_encoder_in_bfloat16_selects_and_float32_does_the_rest():
    weights, x = weights_and_batch(8, 48, 64, seed=2)
    centred = (x - weights["b_dec"]).bfloat16()
    rounded = (centred @ weights["W_enc"].bfloat16()).float() + weights["b_enc"]
    selected = largest(rounded, 6)
    found = results(cuda.sparse_topk_reconstruction, x, weights, k=6, encoder_dtype=torch.bfloat16)
    assert_close(found, results(dense_step, *in_float64(x, weights), k=6, selected=selected.double()))


def test_the_same_input_gives_the_same_bits():
    n, d_in, d_sae = (4096, 384, 8192) if ON_GPU else (6, 12, 40)
    weights, x = weights_and_batch(n, d_in, d_sae)
    settings = {"k": 5, "dead_mask": torch.arange(d_sae, device=DEVICE) % 3 == 0, "k_aux": 4}
    first, second = (results(cuda.sparse_topk_reconstruction, x, weights, **settings) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def unchecked():
    cuda.agrees_with_reference.cache_clear()
    yield
    cuda.agrees_with_reference.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_kernels_agree_with_the_reference(unchecked, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda.agrees_with_reference(DEVICE, dtype, 12, 40, 3)


def test_a_wrong_kernel_is_found_once_and_named(unchecked, monkeypatch):
    sum_rows = triton_topk.sum_rows
    monkeypatch.setattr(triton_topk, "sum_rows", lambda *arguments, **more: sum_rows(*arguments, **more).mul_(1.01))
    with pytest.warns(RuntimeWarning, match=r"failed their check on .* reference is used instead.*x_hat is off by") as caught:
        assert not cuda.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)
        assert not cuda.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert "fire_counts" not in str(caught[0].message)


def test_a_kernel_that_does_not_compile_is_not_trusted(unchecked, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(triton_topk, "select_topk", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no kernel image for this device"):
        assert not cuda.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)


def test_tensors_on_the_cpu_take_the_reference(monkeypatch):
    monkeypatch.setattr(cuda, "sparse_topk_reconstruction", None)
    weights, x = weights_and_batch(4, 12, 512)
    weights, x = {name: weight.cpu() for name, weight in weights.items()}, x.cpu()
    expected = results(reference.topk_reconstruction, x, weights, k=2)
    assert all(torch.equal(expected[name], tensor) for name, tensor in results(topk_reconstruction, x, weights, k=2).items())


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from saeens_models.kernels import triton_topk

def compile_for_hopper(kernel, arguments, **constants):
    names = kernel.arg_names
    signature = {name: arguments.get(name, "constexpr") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]

floats, integers = "*fp32", "*i64"
selection = {"pre": "*bf16", "values": floats, "places": integers, "row_stride": "i32", "n_candidates": "i32", "k": "i32", "width": "i32"}
compile_for_hopper(triton_topk._select_topk, selection | {"bias": floats, "columns": integers}, BLOCK=64)
compile_for_hopper(triton_topk._select_topk, selection | {"pre": floats}, BLOCK=64, bias=None, columns=None)
sums = {"sums": floats, "totals": floats, "rows": floats, "which": integers, "weights": floats, "starts": integers, "d": "i32"}
compile_for_hopper(triton_topk._sum_rows, sums, ROWS=16, COLUMNS=128)
products = {"products": floats, "left": floats, "right": floats, "which": integers, "k": "i32", "d": "i32"}
compile_for_hopper(triton_topk._multiply_rows, products, ROWS=16, COLUMNS=128)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(384, 4096, 32), (768, 16128, 64), (512, 40000, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_sparse_codes_take_the_kernels(unchecked, monkeypatch, *, d_in, d_sae, k, dtype):
    assert cuda.agrees_with_reference(DEVICE, dtype, d_in, d_sae, k)
    monkeypatch.setattr(reference, "topk_reconstruction", None)
    weights, x = weights_and_batch(1000, d_in, d_sae)
    settings = {"k": k, "dead_mask": torch.arange(d_sae, device=DEVICE) % 3 == 0, "k_aux": d_in // 2}
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = results(topk_reconstruction, x, weights, **settings)
    expected = results(cuda.sparse_topk_reconstruction, x, weights, encoder_dtype=dtype, **settings)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
