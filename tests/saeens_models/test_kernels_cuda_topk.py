"""The CUDA kernels against sorting, dense autograd in float64 and the reference: on a GPU if there is one, otherwise interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import saeens_models as sm
from saeens_models.architectures import topk
from saeens_models.kernels import cuda_topk, reference, topk_reconstruction
from saeens_models.training import CurvePoint, loop

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
    """Return a mask of the k largest entries of each row; of equal ones the first."""
    return torch.zeros_like(pre).scatter(-1, pre.detach().argsort(dim=-1, descending=True, stable=True)[:, :k], 1.0)


def sparse_step(x: Tensor, *weights: Tensor, dead_mask: Tensor | None = None, **settings: Any) -> reference.TopKReconstruction:
    """Compute the sparse step of one SAE."""
    (top,) = cuda_topk.sparse_topk_reconstructions(x, [weights], dead_masks=[dead_mask], **settings)  # pyright: ignore[reportArgumentType]
    return top


def results(step: Any, x: Tensor, weights: Mapping[str, Tensor], **settings: Any) -> dict[str, Tensor]:
    """Return the results of a step, and the gradients of a loss with both of its outputs."""
    (of_one,) = results_together(lambda x, weights, **settings: [step(x, *weights[0], **settings)], x, [weights], **settings)
    return of_one


def results_together(steps: Any, x: Tensor, weights: Sequence[Mapping[str, Tensor]], **settings: Any) -> list[dict[str, Tensor]]:
    """Return :func:`results` of several SAEs in one step, which differentiates the sum of their losses."""
    leaves = [[of_sae[name].clone().requires_grad_() for name in NAMES] for of_sae in weights]
    found: list[dict[str, Tensor]] = []
    for top in steps(x, leaves, **settings):
        error = x - top.x_hat
        loss = error.square().sum(-1).mean()
        found.append({"x_hat": top.x_hat, "fire_counts": top.fire_counts})
        if top.error_hat is not None:
            loss = loss + 0.4 * (top.error_hat - error.detach()).square().sum(-1).mean()
            found[-1]["error_hat"] = top.error_hat
        found[-1]["loss"] = loss
    torch.autograd.backward([of_sae["loss"] for of_sae in found])
    for of_sae, own_leaves in zip(found, leaves, strict=True):
        gradients = {f"gradient of {name}": leaf.grad for name, leaf in zip(NAMES, own_leaves, strict=True) if leaf.grad is not None}
        assert len(gradients) == len(NAMES)
        of_sae.update(gradients)
    return [{name: tensor.detach() for name, tensor in of_sae.items()} for of_sae in found]


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
    """Compute the definition with autograd; ``selected`` replaces the mask of the k largest."""
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
def test_selection_takes_the_k_largest_and_the_first_among_ties(*, d_sae, share, tied, dtype, of_columns, seed):
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


@needs_gpu
@pytest.mark.parametrize(("n", "d_sae", "k"), [(500, 768, 8), (64, 4096, 100), (4, 200_000, 50), (1000, 16_384, 512)])
def test_torchs_selection_on_a_gpu_takes_the_first_of_equal_ones(n, d_sae, k):
    pre = draw(n, d_sae).round()
    top = reference.select_topk(pre, k)
    expected = pre.argsort(dim=1, descending=True, stable=True)[:, :k]
    assert torch.equal(top.indices.sort().values, expected.sort().values)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("d_sae", [53, 241])  # 241: the last part holds 1, fewer than are selected
def test_selection_from_parts_of_rows_equals_selection_from_whole_rows(monkeypatch, tied, d_sae):
    monkeypatch.setattr(triton_topk, "MOST_CANDIDATES", 16)
    pre = draw(2, d_sae, seed=3)
    pre = pre.round() if tied else pre
    top = triton_topk.select_topk(pre, 7)
    assert torch.equal(top.indices, pre.argsort(dim=1, descending=True, stable=True)[:, :7].sort(dim=1).values)
    assert torch.equal(top.values, pre.gather(1, top.indices))


@pytest.mark.parametrize("most_candidates", [16384, 16])
def test_selection_from_several_matrices_adds_each_bias_and_numbers_columns_consecutively(monkeypatch, most_candidates):
    monkeypatch.setattr(triton_topk, "MOST_CANDIDATES", most_candidates)
    pre, bias = draw(3, 2, 53, seed=5), draw(3, 53, seed=6)
    top = triton_topk.select_topk(pre, 7, bias)
    candidates = pre + bias[:, None]
    expected = candidates.argsort(dim=-1, descending=True)[..., :7].sort(dim=-1).values
    assert torch.equal(top.indices, expected + 53 * torch.arange(3, device=DEVICE)[:, None, None])
    assert torch.equal(top.values, candidates.gather(-1, expected))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nan_is_selected(sign):
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
    found = results(sparse_step, x, weights, **settings)
    assert_close(found, results(dense_step, *in_float64(x, weights), **settings))
    assert_close(found, results(reference.topk_reconstruction, x, weights, **settings))


def test_blocks_of_tokens_do_not_change_the_result(monkeypatch):
    weights, x = weights_and_batch(7, 12, 48)
    settings = {"k": 5, "dead_mask": torch.arange(48, device=DEVICE) % 5 == 0, "k_aux": 3}
    monkeypatch.setattr(cuda_topk, "_BLOCK_BYTES", 2 * 48 * 4)  # two tokens
    found = results(sparse_step, x, weights, **settings)
    assert_close(found, results(dense_step, *in_float64(x, weights), **settings))


def test_without_dead_features_there_is_no_auxiliary_code():
    weights, x = weights_and_batch(3, 12, 24)
    dead_mask = torch.zeros(24, dtype=torch.bool, device=DEVICE)
    top = sparse_step(x, *(weights[name] for name in NAMES), k=3, dead_mask=dead_mask)
    assert top.error_hat is None and top.n_dead == 0


def test_selection_with_a_bfloat16_encoder_leaves_values_and_gradients_in_float32():
    weights, x = weights_and_batch(8, 48, 64, seed=2)
    centred = (x - weights["b_dec"]).bfloat16()
    rounded = (centred @ weights["W_enc"].bfloat16()).float() + weights["b_enc"]
    selected = largest(rounded, 6)
    found = results(sparse_step, x, weights, k=6, encoder_dtype=torch.bfloat16)
    assert_close(found, results(dense_step, *in_float64(x, weights), k=6, selected=selected.double()))


def test_sparse_steps_of_the_same_input_have_the_same_bits():
    n, d_in, d_sae = (4096, 384, 8192) if ON_GPU else (6, 12, 40)
    weights, x = weights_and_batch(n, d_in, d_sae)
    settings = {"k": 5, "dead_mask": torch.arange(d_sae, device=DEVICE) % 3 == 0, "k_aux": 4}
    first, second = (results(sparse_step, x, weights, **settings) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


N, D_IN, D_SAE, K = 7, 12, 48, 5


def three_saes() -> tuple[list[dict[str, Tensor]], Tensor]:
    """Only a few features of the second SAE are active."""
    saes = [weights_and_batch(N, D_IN, D_SAE, seed=10 * sae)[0] for sae in range(3)]
    saes[1]["b_enc"] = saes[1]["b_enc"] - 1.5
    return saes, draw(N, D_IN, seed=99)


DEAD = {"none": [None, None, None], "of two": [torch.arange(D_SAE) % 5 == 0, torch.arange(D_SAE) < 0, torch.arange(D_SAE) % 9 == 4]}


@pytest.mark.parametrize("dead", DEAD)
@pytest.mark.parametrize("apply_b_dec", [True, False])
@pytest.mark.parametrize("block_tokens", [2, 100])  # the first does not divide the number of tokens
def test_saes_in_one_launch_equal_dense_autograd_of_each_sae(monkeypatch, dead, apply_b_dec, block_tokens):
    monkeypatch.setattr(cuda_topk, "_BLOCK_BYTES", block_tokens * 3 * D_SAE * 4)
    saes, x = three_saes()
    dead_masks = [None if mask is None else mask.to(DEVICE) for mask in DEAD[dead]]
    settings: dict[str, Any] = {"k": K, "apply_b_dec_to_input": apply_b_dec, "k_aux": 4}
    found = results_together(cuda_topk.sparse_topk_reconstructions, x, saes, dead_masks=dead_masks, **settings)
    for of_sae, weights, dead_mask in zip(found, saes, dead_masks, strict=True):
        assert_close(of_sae, results(dense_step, *in_float64(x, weights), dead_mask=dead_mask, **settings))
        assert_close(of_sae, results(reference.topk_reconstruction, x, weights, dead_mask=dead_mask, **settings))
    assert (found[1]["fire_counts"].sum() < found[0]["fire_counts"].sum()).item()


def test_saes_in_one_launch_allow_tokens_without_active_features():
    saes, x = three_saes()
    saes[1]["b_enc"] = saes[1]["b_enc"] - 100
    found = results_together(cuda_topk.sparse_topk_reconstructions, x, saes, dead_masks=[None] * 3, k=K)
    assert found[1]["fire_counts"].sum() == 0
    assert torch.equal(found[1]["x_hat"], saes[1]["b_dec"].expand_as(x))
    for of_sae, weights in zip(found, saes, strict=True):
        assert_close(of_sae, results(dense_step, *in_float64(x, weights), k=K))


def test_a_bfloat16_encoder_selects_for_each_of_several_saes():
    saes, x = three_saes()
    dead_masks = [mask.to(DEVICE) for mask in DEAD["of two"] if mask is not None]
    settings: dict[str, Any] = {"k": K, "k_aux": D_SAE}  # all that are dead: nothing to select among them
    found = results_together(
        cuda_topk.sparse_topk_reconstructions, x, saes, dead_masks=dead_masks, encoder_dtype=torch.bfloat16, **settings
    )
    for of_sae, weights, dead_mask in zip(found, saes, dead_masks, strict=True):
        rounded = ((x - weights["b_dec"]).bfloat16() @ weights["W_enc"].bfloat16()).float() + weights["b_enc"]
        selected = largest(rounded, K).double()
        assert_close(of_sae, results(dense_step, *in_float64(x, weights), dead_mask=dead_mask, selected=selected, **settings))


TRAINING = {"learning_rate": 1e-2, "dead_after_tokens": 8, "gradient_clip_norm": 1.0, "unit_norm_decoder": True}


def trained(configs: Sequence[sm.SAEConfig], batches: Sequence[Tensor], **how: Any) -> tuple[list[sm.SAE], list[Sequence[CurvePoint]]]:
    points: list[Sequence[CurvePoint]] = []
    total_tokens = sum(len(batch) for batch in batches)
    saes = sm.train(configs, batches, sm.TrainingConfig(**TRAINING, total_tokens=total_tokens), points.append, **how)
    return saes, points


@pytest.fixture
def in_one(monkeypatch):
    """SAEs that are trained together share launches on any device; lists their number per step."""
    at_a_time: list[int] = []

    def recorded(x: Tensor, weights: Any, **settings: Any) -> Any:
        at_a_time.append(len(weights))
        return cuda_topk.sparse_topk_reconstructions(x, weights, **settings)

    monkeypatch.setitem(loop._ENTRIES_FOR_ONE_LAUNCH, DEVICE.type, D_IN * D_SAE)
    monkeypatch.setattr(topk, "topk_reconstructions", recorded)
    monkeypatch.setattr(loop, "cpu_team", lambda _: nullcontext())
    return at_a_time


def test_shared_launches_give_each_sae_its_own_result(in_one):
    configs = [sm.SAEConfig(architecture="topk", d_in=D_IN, d_sae=24, k=2, k_aux=4, init_seed=seed) for seed in range(3)]
    batches = (draw(21, D_IN, seed=1) + 0.5).split(8)
    together, points = trained(configs, batches)
    assert in_one == [3] * 3
    assert len({point.dead_features for point in points[-1]} - {0.0}) > 1  # SAEs have dead features, and not the same number
    for sae, own_config, of_sae in zip(together, configs, zip(*points, strict=True), strict=True):
        (alone,), points_alone = trained([own_config], batches)
        for name, weight in alone.named_parameters():
            torch.testing.assert_close(sae.get_parameter(name), weight, rtol=1e-3, atol=1e-4)
        for point, (point_alone,) in zip(of_sae, points_alone, strict=True):
            assert point._asdict() == pytest.approx(point_alone._asdict(), rel=1e-4)
    assert in_one == [3] * 3


@pytest.mark.parametrize(
    ("changed", "how"),
    [({"k": 3}, {}), ({"d_sae": 24}, {}), ({"aux_loss_coefficient": 0.5}, {}), ({}, {"micro_batch_tokens": 8})],
    ids=["k", "d_sae", "loss", "micro-batches"],
)
def test_saes_of_different_shapes_or_in_parts_do_not_share_launches(in_one, changed, how):
    fields = {"architecture": "topk", "d_in": D_IN, "d_sae": D_SAE, "k": 2}
    configs = [sm.SAEConfig(**fields), sm.SAEConfig(**fields | changed, init_seed=1)]
    trained(configs, [draw(20, D_IN)], **how)
    assert in_one == []


@pytest.fixture
def unchecked():
    cuda_topk.agrees_with_reference.cache_clear()
    yield
    cuda_topk.agrees_with_reference.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_saes", [1, 4])
def test_correct_kernels_agree_with_the_reference(unchecked, dtype, n_saes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_topk.agrees_with_reference(DEVICE, dtype, 12, 40, 3, n_saes=n_saes)


def test_an_error_that_needs_several_saes_is_found(unchecked, monkeypatch):
    select_topk = triton_topk.select_topk
    bias_of_the_first = lambda bias: bias[:1].expand_as(bias).contiguous() if bias is not None and bias.ndim > 1 else bias  # noqa: E731
    monkeypatch.setattr(triton_topk, "select_topk", lambda pre, k, bias=None, *more: select_topk(pre, k, bias_of_the_first(bias), *more))
    assert cuda_topk.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)
    with pytest.warns(RuntimeWarning, match=r"failed their check on .*, SAEs at once: 2\)"):
        assert not cuda_topk.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3, n_saes=2)


def test_a_wrong_kernel_is_found_once_and_named(unchecked, monkeypatch):
    sum_rows = triton_topk.sum_rows
    monkeypatch.setattr(triton_topk, "sum_rows", lambda *arguments, **more: sum_rows(*arguments, **more).mul_(1.01))
    with pytest.warns(RuntimeWarning, match=r"failed their check on .*, SAEs at once: 1\) and are not used.*x_hat differs by") as caught:
        assert not cuda_topk.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)
        assert not cuda_topk.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)
    assert len([w for w in caught if w.category is RuntimeWarning]) == 1
    assert "fire_counts" not in str(caught[0].message)


def test_a_kernel_that_does_not_compile_is_not_used(unchecked, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image for this device")

    monkeypatch.setattr(triton_topk, "select_topk", fail)
    with pytest.warns(RuntimeWarning, match="RuntimeError: no kernel image for this device"):
        assert not cuda_topk.agrees_with_reference(DEVICE, torch.float32, 12, 40, 3)


def test_tensors_on_the_cpu_use_the_reference(monkeypatch):
    monkeypatch.setattr(cuda_topk, "sparse_topk_reconstructions", None)
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
selection = {"pre": "*bf16", "values": floats, "places": integers, "k": "i32", "width": "i32"}
selection |= {"row_stride": "i32", "n_rows": "i32", "n_columns": "i32", "n_candidates": "i32"}
compile_for_hopper(triton_topk.select_topk_kernel, selection | {"bias": floats, "columns": integers}, BLOCK=64)
compile_for_hopper(triton_topk.select_topk_kernel, selection | {"pre": floats}, BLOCK=64, bias=None, columns=None)
sums = {"sums": floats, "totals": floats, "rows": floats, "which": integers, "weights": floats, "starts": integers, "d": "i32"}
compile_for_hopper(triton_topk.sum_rows_kernel, sums, ROWS=16, COLUMNS=128)
products = {"products": floats, "left": floats, "right": floats, "which": integers, "k": "i32", "d": "i32"}
compile_for_hopper(triton_topk.multiply_rows_kernel, products, ROWS=16, COLUMNS=128)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@needs_gpu
@pytest.mark.parametrize(("d_in", "d_sae", "k"), [(384, 4096, 32), (768, 16128, 64), (512, 40000, 100)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_codes_on_a_gpu_use_the_kernels(unchecked, monkeypatch, *, d_in, d_sae, k, dtype):
    assert cuda_topk.agrees_with_reference(DEVICE, dtype, d_in, d_sae, k)
    monkeypatch.setattr(reference, "topk_reconstruction", None)
    weights, x = weights_and_batch(1000, d_in, d_sae)
    settings = {"k": k, "dead_mask": torch.arange(d_sae, device=DEVICE) % 3 == 0, "k_aux": d_in // 2}
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = results(topk_reconstruction, x, weights, **settings)
    expected = results(sparse_step, x, weights, encoder_dtype=dtype, **settings)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_saes_on_a_gpu_use_the_kernels_together(unchecked, dtype):
    saes, x = [weights_and_batch(1000, 384, 4096, seed=10 * sae)[0] for sae in range(3)], draw(1000, 384, seed=99)
    dead_masks = [torch.arange(4096, device=DEVICE) % 3 == sae for sae in range(3)]

    def at_once(x: Tensor, weights: Any, **settings: Any) -> list[reference.TopKReconstruction]:
        tops = cuda_topk.topk_reconstructions(x, weights, **settings)
        assert tops is not None
        return tops

    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = results_together(at_once, x, saes, dead_masks=dead_masks, k=32, k_aux=4096)
    if dtype == torch.float32:  # in bfloat16 the product may be rounded otherwise, and other features be selected
        for of_sae, weights, dead_mask in zip(found, saes, dead_masks, strict=True):
            assert_close(of_sae, results(sparse_step, x, weights, dead_mask=dead_mask, k=32, k_aux=4096), tolerance=1e-4)
