"""TopK in plain torch: exact selection, and a training step whose cost after the encoder grows with k instead of d_sae.

With k of d_sae features active, the products with the code (decoding, and the gradients of both weight matrices) are sums over
few rows. ``embedding_bag`` computes such sums: over the features of a token when decoding and, with active entries sorted by feature,
over the tokens of a feature for the gradients. The order of all sums is independent of threads, so the same input gives the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

import torch
from torch import Tensor
from torch.nn import functional as F

SPARSE_CODE_MAX_DENSITY = {"cpu": 0.15}
"""Share k / d_sae below which a sparse code is faster than a dense one, by device type; 0 for other devices. Measured."""
_GROUP_SIZE = 8
_GROUPED_FROM = 4096
_ENCODER_BYTES = 16 << 20


class TopK(NamedTuple):
    """The k largest entries of each row, in no particular order. Of equal entries those of the lowest index are among them."""

    values: Tensor
    """`[..., k]`"""
    indices: Tensor
    """`[..., k]`, int64."""


class TopKSettings(TypedDict):
    """Settings of a TopK SAE that decide its code."""

    k: int
    """Number of features that may be active per token."""
    apply_b_dec_to_input: NotRequired[bool]
    """Subtract b_dec from the input: the default."""
    k_aux: NotRequired[int]
    """Largest number of dead features per token in the auxiliary loss; 1 by default."""


class TopKReconstruction(NamedTuple):
    """A batch encoded and decoded by a TopK SAE."""

    x_hat: Tensor
    """Reconstruction `[n, d_in]`."""
    error_hat: Tensor | None
    """Reconstruction of the error from dead features, without b_dec `[n, d_in]`; None without dead features."""
    n_dead: int
    """Number of dead features."""
    fire_counts: Tensor
    """Number of tokens on which each feature is active, `[d_sae]`."""


def select_topk(pre: Tensor, k: int) -> TopK:
    """Return exactly the k largest entries along the last dimension of ``pre`` `[..., d_sae]`; of equal ones those of the lowest index.

    The result is unsorted. CUDA's topk takes equal entries by index. On other devices topk takes any of equal entries: k + 1 entries
    are selected there, and rows in which entry k + 1 equals entry k are selected again by index.
    """
    if pre.is_cuda or k == pre.shape[-1]:
        return TopK(*pre.topk(k, dim=-1, sorted=False))
    values, indices = _largest(pre, k + 1)
    next_value, place = torch.where(values.isnan(), torch.inf, values).min(-1, keepdim=True)  # NaN stays: the loss has to show it
    # The last one takes the place of the smallest: selecting k + 1 and dropping one is faster than sorting.
    values, indices = (each.scatter(-1, place, each[..., k:])[..., :k].contiguous() for each in (values, indices))
    least = values.amin(-1, keepdim=True)
    tied = (least == next_value).squeeze(-1)
    if tied.any():
        indices[tied] = _first_of_equal(pre[tied], least[tied], k)
        values = pre.gather(-1, indices)
    return TopK(values, indices)


def _largest(pre: Tensor, k: int) -> TopK:
    """Return the k largest entries of each row; of equal ones any.

    In long rows the maxima of groups of 8 entries are compared first. The k largest entries lie in the k groups with the largest maxima,
    because every entry of another group is at most as large as those k maxima. That leaves ``8 k`` candidates.
    """
    d_sae = pre.shape[-1]
    n_groups = d_sae // _GROUP_SIZE
    if d_sae < _GROUPED_FROM or d_sae % _GROUP_SIZE or 2 * k > n_groups or not pre.is_cpu:
        return TopK(*pre.topk(k, dim=-1, sorted=False))
    grouped = pre.unflatten(-1, (_GROUP_SIZE, n_groups))
    groups = grouped.amax(dim=-2).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(-1, groups.unsqueeze(-2).expand(*groups.shape[:-1], _GROUP_SIZE, k)).flatten(-2)
    values, chosen = candidates.topk(k, dim=-1, sorted=False)
    return TopK(values, (chosen // k) * n_groups + groups.gather(-1, chosen % k))


def _first_of_equal(pre: Tensor, least: Tensor, k: int) -> Tensor:
    """Return the indices `[n, k]`, ascending, of the k largest entries of rows `[n, d_sae]`, whose k-th largest is ``least`` `[n, 1]`."""
    equal, larger = pre == least, ~(pre <= least)  # NaN is larger, as for topk
    wanted = k - larger.sum(-1, keepdim=True)
    return (larger | (equal & (equal.cumsum(-1, dtype=torch.int32) <= wanted))).nonzero()[:, 1].view(-1, k)


def topk_reconstruction(
    x: Tensor, *weights: Tensor, dead_mask: Tensor | None = None, **settings: Unpack[TopKSettings]
) -> TopKReconstruction:
    """Encode and decode ``x`` `[n, d_in]` for training: ``x_hat = relu(topk(pre)) @ W_dec + b_dec``.

    If ``dead_mask`` `[d_sae]` marks features, ``error_hat = topk_aux(pre) @ W_dec`` over the ``k_aux`` largest pre-activations
    among the marked features, without ReLU and b_dec. Differentiable in the weights W_enc, b_enc, W_dec and b_dec, which have the shapes
    of :class:`~saeens_models.architectures.SAE`; ``x`` is held constant.
    """
    dead, (W_enc, *others) = marked_features(dead_mask), weights
    x_hat, error_hat, fire_counts = _TopKReconstruction.apply(x, W_enc.t(), *others, dead, settings)
    return TopKReconstruction(x_hat, error_hat, 0 if dead is None else len(dead), fire_counts)


def marked_features(mask: Tensor | None) -> Tensor | None:
    """Return the indices of the features that a mask `[d_sae]` marks; None if it marks none."""
    features = None if mask is None else mask.nonzero().squeeze(-1)
    return None if features is None or len(features) == 0 else features


class _TopKReconstruction(torch.autograd.Function):
    """Forward and hand-written backward of :func:`topk_reconstruction`; W_enc is given feature by feature, `[d_sae, d_in]`."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd functions take positional arguments
        ctx: Any, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, dead: Tensor | None, settings: TopKSettings
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        ctx.centres = settings.get("apply_b_dec_to_input", True)
        if ctx.centres:
            x = x - b_dec
        # In blocks of rows: the pre-activations stay in the cache, and blocks reuse the same memory.
        block = max(_ENCODER_BYTES // (W_enc.shape[0] * x.element_size()), 64)
        selected, of_dead = [], []
        for rows in x.split(block):
            pre = torch.mm(rows, W_enc.t()).add_(b_enc)  # addmm would copy b_enc into every row first
            selected.append(select_topk(pre, settings["k"]))
            if dead is not None:
                of_dead.append(pre.index_select(1, dead))
        code = code_of(TopK(*map(torch.cat, zip(*selected, strict=True))), W_enc.shape[0], relu=True)
        x_hat = code.decode(W_dec) + b_dec
        error_hat = None
        if dead is not None:
            dead_code = code_of(select_topk(torch.cat(of_dead), min(settings.get("k_aux", 1), len(dead))), len(dead), relu=False)
            dead_W_dec = W_dec.index_select(0, dead)
            error_hat = dead_code.decode(dead_W_dec)
            ctx.dead = (dead, dead_code, dead_W_dec)
        ctx.save_for_backward(x, W_enc, W_dec)
        ctx.code, fire_counts = code, code.fire_counts()
        ctx.mark_non_differentiable(fire_counts)
        return x_hat, error_hat, fire_counts

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_x_hat, grad_error_hat, _ = grad_outputs
        x, W_enc, W_dec = ctx.saved_tensors
        assert grad_x_hat is not None
        grads = ctx.code.gradients(grad_x_hat, x, W_dec)
        if grad_error_hat is not None:
            dead, dead_code, dead_W_dec = ctx.dead
            for whole, part in zip(grads, dead_code.gradients(grad_error_hat, x, dead_W_dec), strict=True):
                whole.index_add_(0, dead, part)
        grad_b_dec = grad_x_hat.sum(dim=0)
        if ctx.centres:
            grad_b_dec = grad_b_dec - grads.b_enc @ W_enc
        return None, grads.W_enc, grads.b_enc, grads.W_dec, grad_b_dec, None, None


class _Gradients(NamedTuple):
    W_enc: Tensor  # [d_sae, d_in]
    b_enc: Tensor  # [d_sae]
    W_dec: Tensor  # [d_sae, d_in]


def code_of(top: TopK, n_features: int, relu: bool) -> _SparseCode | _DenseCode:
    """Return the code for selected pre-activations, sparse or dense, in the faster form. ``relu``: negative entries become 0."""
    values = top.values.relu() if relu else top.values
    density = top.indices.shape[-1] / n_features
    if density < SPARSE_CODE_MAX_DENSITY.get(values.device.type, 0.0):
        return _SparseCode(values, top.indices, n_features, values > 0 if relu else None)
    z = values.new_zeros(len(values), n_features).scatter_(1, top.indices, values)
    if relu:
        return _DenseCode(z, z > 0)
    return _DenseCode(z, None if density == 1 else torch.zeros_like(z, dtype=torch.bool).scatter_(1, top.indices, True))


class _SparseCode(NamedTuple):
    values: Tensor  # [n, k]
    indices: Tensor  # [n, k]
    n_features: int
    gate: Tensor | None  # [n, k], bool: the gradient passes here; None: everywhere

    def decode(self, W_dec: Tensor) -> Tensor:
        return F.embedding_bag(self.indices, W_dec, mode="sum", per_sample_weights=self.values)

    def fire_counts(self) -> Tensor:
        inactive = self.n_features  # one more bin
        return torch.bincount(torch.where(self.values > 0, self.indices, inactive).flatten(), minlength=inactive + 1)[:inactive]

    def gradients(self, grad_decoded: Tensor, x: Tensor, W_dec: Tensor) -> _Gradients:
        (n, k), device = self.indices.shape, x.device
        features, starts = self.indices.flatten(), torch.arange(0, n * k, k, device=device)
        token_of = torch.arange(n, device=device).repeat_interleave(k)
        grad_values = torch.ops.aten._embedding_bag_per_sample_weights_backward(grad_decoded, W_dec, features, starts, token_of, 0)
        if self.gate is not None:
            grad_values *= self.gate.flatten()
        by_feature = features.int().argsort(stable=True)
        tokens = by_feature // k
        counts = torch.bincount(features, minlength=self.n_features)
        offsets = counts.cumsum(0) - counts

        def sum_over_tokens(rows: Tensor, weights: Tensor) -> Tensor:
            return F.embedding_bag(tokens, rows, offsets, mode="sum", per_sample_weights=weights[by_feature])

        return _Gradients(
            W_enc=sum_over_tokens(x, grad_values),
            b_enc=torch.bincount(features, grad_values, self.n_features),
            W_dec=sum_over_tokens(grad_decoded, self.values.flatten()),
        )


class _DenseCode(NamedTuple):
    z: Tensor  # [n, d_sae]
    gate: Tensor | None  # [n, d_sae], bool: the gradient passes here; None: everywhere

    def decode(self, W_dec: Tensor) -> Tensor:
        return self.z @ W_dec

    def fire_counts(self) -> Tensor:
        return (self.z > 0).sum(dim=0)

    def gradients(self, grad_decoded: Tensor, x: Tensor, W_dec: Tensor) -> _Gradients:
        grad_pre = grad_decoded @ W_dec.t()
        if self.gate is not None:
            grad_pre *= self.gate
        return _Gradients(W_enc=grad_pre.t() @ x, b_enc=grad_pre.sum(dim=0), W_dec=self.z.t() @ grad_decoded)
