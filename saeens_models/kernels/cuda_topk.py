"""The TopK training step on CUDA: cuBLAS for the encoder, and Triton kernels, whose cost grows with k, for the rest.

The encoder runs over blocks of tokens and selects their features while the pre-activations are in the L2 cache; pre-activations of a
whole batch are never allocated. The active entries are sorted by feature once; a feature's gradients are then sums over its tokens.

J SAEs of one shape are computed as one SAE with ``J d_sae`` features on J copies of the batch; each copy selects among the features of
one SAE. They share kernel launches, because launches of small SAEs take longer than their work.

Kernels are used on a device only after they agreed there with the reference on weights of the same shape.
"""

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any, Unpack

import torch
from torch import Tensor

from saeens_models.kernels import reference
from saeens_models.kernels.reference import TopK, TopKReconstruction, TopKSettings

FourWeights = tuple[Tensor, Tensor, Tensor, Tensor]
"""W_enc `[d_in, d_sae]`, b_enc, W_dec and b_dec of an SAE, as in :class:`~saeens_models.architectures.SAE`."""

TRITON_STEP_MAX_DENSITY = 0.01
"""Share k / d_sae below which the sparse step is faster. Estimated for an H200 from bytes and multiplications, not measured."""
_BLOCK_BYTES = 32 << 20
"""Bytes of pre-activations in a block: about half the L2 cache of an H200, two tiles of a product per multiprocessor. Not measured."""
_MOST_SELECTED = 8192  # half of triton_topk.MOST_CANDIDATES, which is not imported: Triton may be missing
_TOLERANCE = 5e-3  # relative to the largest entry: products in TF32, if torch uses it, are no more exact


def topk_reconstruction(
    x: Tensor, *weights: Tensor, dead_mask: Tensor | None = None, **settings: Unpack[TopKSettings]
) -> TopKReconstruction:
    """Compute :func:`saeens_models.kernels.reference.topk_reconstruction`, with the sparse step if it is faster and passed its check.

    Under ``torch.autocast`` the sparse step selects features by an encoder product in autocast's type; see
    :func:`sparse_topk_reconstructions`.
    """
    W_enc, b_enc, W_dec, b_dec = weights
    sparse = topk_reconstructions(x, [(W_enc, b_enc, W_dec, b_dec)], dead_masks=[dead_mask], **settings)
    return reference.topk_reconstruction(x, *weights, dead_mask=dead_mask, **settings) if sparse is None else sparse[0]


def topk_reconstructions(
    x: Tensor, weights: Sequence[FourWeights], *, dead_masks: Sequence[Tensor | None], **settings: Unpack[TopKSettings]
) -> list[TopKReconstruction] | None:
    """Compute :func:`topk_reconstruction` for several SAEs of one shape on the same tokens, in the kernel launches of one.

    Returns None if the sparse step is not faster or failed its check.
    """
    (d_sae, d_in), k = weights[0][2].shape, settings["k"]
    most = max(k, settings.get("k_aux", 1))
    if not x.is_cuda or x.dtype != torch.float32 or k >= TRITON_STEP_MAX_DENSITY * d_sae or most > _MOST_SELECTED:
        return None
    encoder_dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
    with torch.cuda.device(x.device), torch.autocast("cuda", enabled=False):
        if not agrees_with_reference(x.device, encoder_dtype, d_in, d_sae, k, n_saes=len(weights)):
            return None
        return sparse_topk_reconstructions(x, weights, dead_masks=dead_masks, encoder_dtype=encoder_dtype, **settings)


def sparse_topk_reconstructions(
    x: Tensor,
    weights: Sequence[FourWeights],
    *,
    dead_masks: Sequence[Tensor | None],
    encoder_dtype: torch.dtype = torch.float32,
    **settings: Unpack[TopKSettings],
) -> list[TopKReconstruction]:
    """Compute the sparse step for float32 tensors on one CUDA device (or on any device if Triton interprets its kernels).

    ``weights`` and ``dead_masks`` `[d_sae]` are those of J SAEs of one shape; each encodes ``x`` `[n, d_in]`. Up to rounding, the result
    of an SAE does not depend on the others. With an ``encoder_dtype`` other than float32, the encoder product in that type decides which
    features are selected; their values are computed again in float32, like all the rest. Auxiliary codes are usually not sparse: they
    are decoded densely, one SAE after another.
    """
    dead = _marked_features(dead_masks)
    W_enc, b_enc, W_dec, b_dec = (_stacked(each) for each in zip(*((W.t(), *others) for W, *others in weights), strict=True))
    x_hat, fire_counts, *error_hats = _SparseTopKReconstructions.apply(x, W_enc, b_enc, W_dec, b_dec, dead, encoder_dtype, settings)
    n_dead = [0 if features is None else len(features) for features in dead]
    return [TopKReconstruction(*each) for each in zip(_unstacked(x_hat), error_hats, n_dead, _unstacked(fire_counts), strict=True)]


def _marked_features(masks: Sequence[Tensor | None]) -> list[Tensor | None]:
    marking = [mask for mask in masks if mask is not None]
    if len(marking) > 1 and not torch.stack(marking).any():  # one question for all masks: the host waits for the device only once
        return [None] * len(masks)
    return [reference.marked_features(mask) for mask in masks]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)  # unsqueeze does not copy


def _unstacked(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.unbind() if len(tensor) > 1 else [tensor.squeeze(0)]  # the gradient of squeeze is not copied


class _SparseTopKReconstructions(torch.autograd.Function):
    """Forward and hand-written backward for J SAEs; weights are `[J, ...]`, encoders are given feature by feature, `[J, d_sae, d_in]`.

    Feature i of SAE j has the number ``j d_sae + i``; token t in the batch of SAE j has the number ``j n + t``.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        dead: Sequence[Tensor | None],
        encoder_dtype: torch.dtype,
        settings: TopKSettings,
    ) -> tuple[Tensor | None, ...]:
        from saeens_models.kernels.triton_topk import sum_rows

        k, apply_b_dec_to_input = settings["k"], settings.get("apply_b_dec_to_input", True)
        n_tokens, n_features = len(W_enc) * len(x), W_enc[..., 0].numel()
        x = x - b_dec[:, None] if apply_b_dec_to_input else x.expand(len(W_enc), *x.shape).contiguous()  # [J, n, d_in]
        W_enc, b_enc, W_dec = W_enc.contiguous(), b_enc.contiguous(), W_dec.contiguous()
        code, dead_codes = _encode(x, W_enc, b_enc, k=k, dead=dead, k_aux=settings.get("k_aux", 1), dtype=encoder_dtype)
        values = code.values.relu()
        first_entries = torch.arange(0, n_tokens * k + 1, k, device=x.device)
        x_hat = sum_rows(b_dec[:, None].repeat(1, x.shape[1], 1), W_dec, code.indices, values, first_entries)

        # Entries in the order of their features; inactive entries come last, after the segments of all features.
        features, by_feature = torch.where(values > 0, code.indices, n_features).int().flatten().sort(stable=True)
        starts = torch.searchsorted(features, torch.arange(n_features + 1, dtype=torch.int32, device=x.device))
        fire_counts = starts.diff().view_as(b_enc)

        revived: dict[int, Any] = {}
        error_hats: list[Tensor | None] = [None] * len(dead)
        for sae, (features_of_sae, top) in enumerate(zip(dead, dead_codes, strict=True)):
            if features_of_sae is not None and top is not None:
                dead_W_dec = W_dec[sae].index_select(0, features_of_sae)
                code_of_dead = reference.code_of(top, len(features_of_sae), relu=False)
                error_hats[sae] = code_of_dead.decode(dead_W_dec)
                revived[sae] = (features_of_sae, code_of_dead, dead_W_dec)
        ctx.revived = revived
        ctx.save_for_backward(x, W_enc, W_dec, code.indices, values, by_feature, starts)
        ctx.apply_b_dec_to_input = apply_b_dec_to_input
        ctx.mark_non_differentiable(fire_counts)
        return x_hat, fire_counts, *error_hats

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        from saeens_models.kernels.triton_topk import multiply_rows, sum_rows

        grad_x_hat, _, *grad_error_hats = grad_outputs
        x, W_enc, W_dec, indices, values, by_feature, starts = ctx.saved_tensors
        assert grad_x_hat is not None
        grad_x_hat = grad_x_hat.contiguous()
        tokens = by_feature // indices.shape[-1]
        grad_values = multiply_rows(grad_x_hat, W_dec, indices)
        grad_W_enc, grad_W_dec, grad_b_enc = torch.zeros_like(W_enc), torch.zeros_like(W_dec), torch.empty_like(W_enc[..., 0])
        sum_rows(grad_W_enc, x, tokens, grad_values.flatten()[by_feature], starts, totals=grad_b_enc)
        sum_rows(grad_W_dec, grad_x_hat, tokens, values.flatten()[by_feature], starts)
        for sae, (dead, code_of_dead, dead_W_dec) in ctx.revived.items():
            if grad_error_hats[sae] is not None:
                with torch.autocast(x.device.type, enabled=False):
                    of_dead = code_of_dead.gradients(grad_error_hats[sae], x[sae], dead_W_dec)
                for whole, part in zip((grad_W_enc, grad_b_enc, grad_W_dec), of_dead, strict=True):
                    whole[sae].index_add_(0, dead, part)
        grad_b_dec = grad_x_hat.sum(dim=1)
        if ctx.apply_b_dec_to_input:
            grad_b_dec.unsqueeze(1).baddbmm_(grad_b_enc.unsqueeze(1), W_enc, alpha=-1)
        return None, grad_W_enc, grad_b_enc, grad_W_dec, grad_b_dec, None, None, None


def _encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, *, k: int, dead: Sequence[Tensor | None], k_aux: int, dtype: torch.dtype
) -> tuple[TopK, list[TopK | None]]:
    """Return the k largest pre-activations of each token, and the k_aux largest of each SAE's dead features.

    Indices of the former count features through all SAEs; indices of the latter are positions in ``dead``.
    """
    from saeens_models.kernels.triton_topk import select_topk

    n_saes, d_sae, _ = W_enc.shape
    rows, columns = x.to(dtype), W_enc.mT.to(dtype)
    n_block = min(max(_BLOCK_BYTES // (n_saes * d_sae * dtype.itemsize), 1), x.shape[1])
    block = torch.empty(n_saes * n_block * d_sae, dtype=dtype, device=x.device)
    selected: list[TopK] = []
    of_dead: list[list[TopK]] = [[] for _ in dead]
    for some in rows.split(n_block, dim=1):
        pre = torch.bmm(some, columns, out=block[: some.shape[1] * n_saes * d_sae].view(n_saes, -1, d_sae))
        selected.append(select_topk(pre, k, b_enc))  # adds b_enc, in float32
        for sae, features in enumerate(dead):
            if features is not None:
                of_dead[sae].append(select_topk(pre[sae], min(k_aux, len(features)), b_enc[sae], features))

    code, dead_codes = _joined(selected), [_joined(blocks) if blocks else None for blocks in of_dead]
    if dtype != torch.float32:
        code = _in_float32(code, code.indices, x, W_enc, b_enc)
        for sae, (top, features) in enumerate(zip(dead_codes, dead, strict=True)):
            if top is not None and features is not None:
                dead_codes[sae] = _in_float32(top, features[top.indices], x[sae], W_enc[sae], b_enc[sae])
    return code, dead_codes


def _in_float32(top: TopK, features: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor) -> TopK:
    """Return a selection with its values computed again in float32. The selection was computed in reduced precision."""
    from saeens_models.kernels.triton_topk import multiply_rows

    return TopK(multiply_rows(x, W_enc, features) + b_enc.flatten()[features], top.indices)


def _joined(blocks: Sequence[TopK]) -> TopK:
    """Return the selections of blocks of tokens as one."""
    values, indices = (torch.cat(parts, dim=-2) for parts in zip(*blocks, strict=True))
    return TopK(values, indices)


@cache
def agrees_with_reference(device: torch.device, encoder_dtype: torch.dtype, d_in: int, d_sae: int, k: int, *, n_saes: int = 1) -> bool:
    """Return True if the sparse step for so many SAEs of this shape agrees on this device with the reference in float64 for each alone.

    If it does not, a warning names the differences. Computed once per process, on few tokens. Rounding cannot change the selection:
    pre-activations are whole numbers up to 16, exact in every type, plus a bias that differs between features.
    """
    try:
        differences = _differences_from_reference(device, encoder_dtype, d_in, d_sae, k, n_saes=n_saes)
    except Exception as error:  # compilers and drivers raise errors of any type
        differences = [f"{type(error).__name__}: {error}"]
    if differences:
        warnings.warn(
            f"the TopK kernels failed their check on {device} (d_in {d_in}, d_sae {d_sae}, k {k}, encoder in {encoder_dtype}, "
            f"SAEs at once: {n_saes}) and are not used for it; training is slower without them: {'; '.join(differences)}",
            RuntimeWarning,
            stacklevel=2,
        )
    return not differences


def _differences_from_reference(
    device: torch.device, encoder_dtype: torch.dtype, d_in: int, d_sae: int, k: int, *, n_saes: int
) -> list[str]:
    n = 16
    generator = torch.Generator(device).manual_seed(0)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=generator, device=device).float()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def ones(n_rows: int) -> Tensor:
        """Return rows with at most 8 ones each."""
        places = torch.randint(d_in, (n_rows, 8), generator=generator, device=device)
        return torch.zeros(n_rows, d_in, device=device).scatter_(1, places, 1.0)

    mean, b_enc = whole(d_in), -1 - torch.arange(d_sae, device=device) / 2 ** d_sae.bit_length()
    x, b_decs = mean + ones(n), mean + ones(n_saes)
    x[0] = b_decs[0]  # a token with no active feature
    weights = [(whole(d_sae, d_in).t(), b_enc.roll(sae), normal(d_sae, d_in), b_dec) for sae, b_dec in enumerate(b_decs)]
    dead_masks = [torch.arange(d_sae, device=device) % 3 == sae for sae in range(n_saes)]  # from the fourth on there are none
    weight_of_x_hat, weight_of_error_hat = normal(n, d_in), normal(n, d_in)

    def results(dtype: torch.dtype, steps: Any) -> dict[str, Tensor]:
        leaves = [[weight.to(dtype, copy=True).requires_grad_() for weight in of_sae] for of_sae in weights]
        with torch.enable_grad():
            tops = steps(x.to(dtype), leaves)
            error_hats = [top.error_hat for top in tops if top.error_hat is not None]
            losses = [(top.x_hat * weight_of_x_hat).sum() for top in tops]
            losses += [(error_hat * weight_of_error_hat).sum() for error_hat in error_hats]
        gradients = torch.autograd.grad(losses, [leaf for of_sae in leaves for leaf in of_sae])
        outputs = {
            "x_hat": torch.stack([top.x_hat.detach() for top in tops]),
            "error_hat": torch.stack([error_hat.detach() for error_hat in error_hats]),
            "fire_counts": torch.stack([top.fire_counts for top in tops]),
        }
        names = ("W_enc", "b_enc", "W_dec", "b_dec")
        return outputs | {f"gradient of {name}": torch.stack(gradients[i :: len(names)]) for i, name in enumerate(names)}

    def alone(x: Tensor, leaves: Sequence[FourWeights]) -> list[TopKReconstruction]:
        masks = zip(leaves, dead_masks, strict=True)
        return [reference.topk_reconstruction(x, *of_sae, k=k, dead_mask=mask, k_aux=k) for of_sae, mask in masks]

    def together(x: Tensor, leaves: Sequence[FourWeights]) -> list[TopKReconstruction]:
        return sparse_topk_reconstructions(x, leaves, k=k, dead_masks=dead_masks, k_aux=k, encoder_dtype=encoder_dtype)

    found = results(torch.float32, together)
    differences = []
    for name, expected in results(torch.float64, alone).items():
        error = float((found[name].double() - expected).abs().max() / expected.abs().max())
        if not error <= _TOLERANCE:
            differences.append(f"{name} differs by {error:.1e} of its largest entry")
    return differences
