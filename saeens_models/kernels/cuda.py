"""The TopK training step on CUDA: cuBLAS for the encoder, and Triton kernels whose cost grows with k for everything after it.

The encoder runs over blocks of tokens, whose features are selected while their pre-activations are in the L2 cache; those of a whole
batch never exist. The active entries are sorted by feature once; a feature's gradients are then sums over its tokens.

Kernels are used on a device only after they agreed there with the reference on weights of the same shape.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from saeens_models.kernels import reference
from saeens_models.kernels.reference import TopK, TopKReconstruction

SPARSE_BELOW = 0.01
"""Below which k / d_sae the sparse step is the faster one. Estimated for an H200 from bytes and multiplications, not measured."""
_BLOCK_BYTES = 32 << 20
"""Of pre-activations in a block: about half the L2 cache of an H200, and two tiles of a product per multiprocessor. Not measured."""
_MOST_SELECTED = 8192  # half of triton_topk.MOST_CANDIDATES, which is not imported: Triton may be missing
_TOLERANCE = 5e-3  # of the largest entry: products in TF32, where torch is told to use it, are not more exact


def topk_reconstruction(
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
) -> TopKReconstruction:
    """:func:`saeens_models.kernels.reference.topk_reconstruction`, by the sparse step where that is faster and can be trusted.

    Under ``torch.autocast`` the sparse step selects features by an encoder product in the type that it asks for, as
    :func:`sparse_topk_reconstruction` says.
    """
    d_sae, d_in = W_dec.shape
    settings: dict[str, Any] = {"k": k, "apply_b_dec_to_input": apply_b_dec_to_input, "dead_mask": dead_mask, "k_aux": k_aux}
    if not x.is_cuda or x.dtype != torch.float32 or k >= SPARSE_BELOW * d_sae or max(k, k_aux) > _MOST_SELECTED:
        return reference.topk_reconstruction(x, W_enc, b_enc, W_dec, b_dec, **settings)
    encoder_dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
    with torch.cuda.device(x.device), torch.autocast("cuda", enabled=False):
        if agrees_with_reference(x.device, encoder_dtype, d_in, d_sae, k):
            return sparse_topk_reconstruction(x, W_enc, b_enc, W_dec, b_dec, encoder_dtype=encoder_dtype, **settings)
        return reference.topk_reconstruction(x, W_enc, b_enc, W_dec, b_dec, **settings)


def sparse_topk_reconstruction(
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
    encoder_dtype: torch.dtype = torch.float32,
) -> TopKReconstruction:
    """The sparse step, for float32 tensors on one CUDA device (or any device where Triton interprets its kernels).

    With another ``encoder_dtype`` than float32 the encoder product is made in it and decides which features are selected; their
    values are computed again in float32, and so is all the rest. Auxiliary codes are as a rule not sparse, and are taken as dense.
    """
    dead = reference.marked_features(dead_mask)
    x_hat, error_hat, fire_counts = _SparseTopKReconstruction.apply(
        x, W_enc.t(), b_enc, W_dec, b_dec, k, apply_b_dec_to_input, dead, k_aux, encoder_dtype
    )
    return TopKReconstruction(x_hat, error_hat, 0 if dead is None else len(dead), fire_counts)


class _SparseTopKReconstruction(torch.autograd.Function):
    """Forward and hand-written backward; the encoder comes feature by feature, `[d_sae, d_in]`."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        k: int,
        apply_b_dec_to_input: bool,
        dead: Tensor | None,
        k_aux: int,
        encoder_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        from saeens_models.kernels.triton_topk import sum_rows

        n, d_sae = len(x), len(W_enc)
        x = x - b_dec if apply_b_dec_to_input else x.contiguous()
        W_enc, W_dec = W_enc.contiguous(), W_dec.contiguous()
        code, dead_code = _encode(x, W_enc, b_enc, k=k, dead=dead, k_aux=k_aux, dtype=encoder_dtype)
        values = code.values.relu()
        first_entries = torch.arange(0, n * k + 1, k, device=x.device)
        x_hat = sum_rows(b_dec.repeat(n, 1), W_dec, code.indices, values, first_entries)

        # Entries in the order of their features; those that are not active come last, after the segments of all features.
        features, by_feature = torch.where(values > 0, code.indices, d_sae).int().flatten().sort(stable=True)
        starts = torch.searchsorted(features, torch.arange(d_sae + 1, dtype=torch.int32, device=x.device))
        fire_counts = starts.diff()

        error_hat = None
        if dead is not None and dead_code is not None:
            dead_W_dec = W_dec.index_select(0, dead)
            code_of_dead = reference.code_of(dead_code, len(dead), relu=False)
            error_hat = code_of_dead.decode(dead_W_dec)
            ctx.dead = (dead, code_of_dead, dead_W_dec)
        ctx.save_for_backward(x, W_enc, W_dec, code.indices, values, by_feature, starts)
        ctx.apply_b_dec_to_input = apply_b_dec_to_input
        ctx.mark_non_differentiable(fire_counts)
        return x_hat, error_hat, fire_counts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        from saeens_models.kernels.triton_topk import multiply_rows, sum_rows

        grad_x_hat, grad_error_hat, _ = grad_outputs
        x, W_enc, W_dec, indices, values, by_feature, starts = ctx.saved_tensors
        assert grad_x_hat is not None
        grad_x_hat = grad_x_hat.contiguous()
        tokens = by_feature // indices.shape[1]
        grad_values = multiply_rows(grad_x_hat, W_dec, indices)
        grad_W_enc, grad_W_dec, grad_b_enc = torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.empty_like(W_enc[:, 0])
        sum_rows(grad_W_enc, x, tokens, grad_values.flatten()[by_feature], starts, totals=grad_b_enc)
        sum_rows(grad_W_dec, grad_x_hat, tokens, values.flatten()[by_feature], starts)
        if grad_error_hat is not None:
            dead, code_of_dead, dead_W_dec = ctx.dead
            with torch.autocast(x.device.type, enabled=False):
                of_dead = code_of_dead.gradients(grad_error_hat, x, dead_W_dec)
            for whole, part in zip((grad_W_enc, grad_b_enc, grad_W_dec), of_dead, strict=True):
                whole.index_add_(0, dead, part)
        grad_b_dec = grad_x_hat.sum(dim=0)
        if ctx.apply_b_dec_to_input:
            grad_b_dec.addmv_(W_enc.t(), grad_b_enc, alpha=-1)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None, None, None, None


def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int, dead: Tensor | None, k_aux: int, dtype: torch.dtype
) -> tuple[TopK, TopK | None]:
    """The k largest pre-activations of each token, and the k_aux largest of the dead features, by their places in ``dead``."""
    from saeens_models.kernels.triton_topk import multiply_rows, select_topk

    rows, columns = x.to(dtype), W_enc.t().to(dtype)
    n_block = min(max(_BLOCK_BYTES // (len(W_enc) * dtype.itemsize), 1), len(x))
    block = torch.empty(n_block, len(W_enc), dtype=dtype, device=x.device)
    selected, of_dead = [], []
    for some in rows.split(n_block):
        pre = torch.mm(some, columns, out=block[: len(some)])
        selected.append(select_topk(pre, k, b_enc))
        if dead is not None:
            of_dead.append(select_topk(pre, min(k_aux, len(dead)), b_enc, dead))

    def joined(parts: list[TopK], candidates: Tensor | None) -> TopK:
        values, indices = map(torch.cat, zip(*parts, strict=True))
        if dtype != torch.float32:
            features = indices if candidates is None else candidates[indices]
            values = multiply_rows(x, W_enc, features) + b_enc[features]
        return TopK(values, indices)

    return joined(selected, None), None if dead is None else joined(of_dead, dead)


@cache
def agrees_with_reference(device: torch.device, encoder_dtype: torch.dtype, d_in: int, d_sae: int, k: int) -> bool:
    """Whether the sparse step computes on this device, for this shape, what the reference does in float64; a warning if not.

    Tried once in a process, on few tokens. No rounding can change the selection: pre-activations are whole numbers up to 8, exact
    in every type, and a bias that differs between features.
    """
    try:
        differences = _differences_from_reference(device, encoder_dtype, d_in, d_sae, k)
    except Exception as error:  # whatever a compiler or a driver raises
        differences = [f"{type(error).__name__}: {error}"]
    if differences:
        warnings.warn(
            f"the TopK kernels failed their check on {device} (d_in {d_in}, d_sae {d_sae}, k {k}, encoder in {encoder_dtype}), and the "
            f"reference is used instead, which is slower: {'; '.join(differences)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not differences


def _differences_from_reference(device: torch.device, encoder_dtype: torch.dtype, d_in: int, d_sae: int, k: int) -> list[str]:
    n = 16
    generator = torch.Generator(device).manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator, device=device).float()

    b_enc = -1 - torch.arange(d_sae, device=device) / 2 ** d_sae.bit_length()
    b_dec = whole(d_in)
    used = torch.randint(d_in, (n, 8), generator=generator, device=device)
    x = b_dec + torch.zeros(n, d_in, device=device).scatter_(1, used, 1.0)
    x[0] = b_dec  # a token with no active feature
    weights = [whole(d_sae, d_in).t(), b_enc, torch.randn(d_sae, d_in, generator=generator, device=device), b_dec]
    settings: dict[str, Any] = {"k": k, "dead_mask": torch.arange(d_sae, device=device) % 3 == 0, "k_aux": k}
    weight_of_x_hat, weight_of_error_hat = (torch.randn(n, d_in, generator=generator, device=device) for _ in range(2))

    def results(dtype: torch.dtype, step: Any, **more: Any) -> dict[str, Tensor]:
        leaves = [weight.to(dtype, copy=True).requires_grad_() for weight in weights]
        with torch.enable_grad():
            top = step(x.to(dtype), *leaves, **settings, **more)
            loss = (top.x_hat * weight_of_x_hat).sum() + (top.error_hat * weight_of_error_hat).sum()
        gradients = torch.autograd.grad(loss, leaves)
        names = ("gradient of W_enc", "gradient of b_enc", "gradient of W_dec", "gradient of b_dec")
        outputs = {"x_hat": top.x_hat.detach(), "error_hat": top.error_hat.detach(), "fire_counts": top.fire_counts}
        return outputs | dict(zip(names, gradients, strict=True))

    found = results(torch.float32, sparse_topk_reconstruction, encoder_dtype=encoder_dtype)
    differences = []
    for name, expected in results(torch.float64, reference.topk_reconstruction).items():
        error = float((found[name].double() - expected).abs().max() / expected.abs().max())
        if not error <= _TOLERANCE:
            differences.append(f"{name} is off by {error:.1e} of its largest entry")
    return differences
