"""sparsify: its ``SparseCoder``, stepped as ``Trainer.fit`` does with loss ``fvu`` and no accumulation of gradients.

Its trainer takes a language model instead of activations, so its step is called here part by part, in the same order.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
from functools import partial
from typing import Any, Literal

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its kernels are for CUDA; on a CPU it has embedding_bag and index_add

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify.config import SparseCoderConfig
from sparsify.sign_sgd import SignSGD
from sparsify.sparse_coder import SparseCoder
from torch import Tensor

import saeens_models as sm
from benchmarks.peers import PeerSetting, Workload, products_at

_COMMON = "SPARSIFY_DISABLE_TRITON=1, matrix products at precision 'high' as in Trainer.fit, auxk_alpha 0, unit decoder, b_dec from 0"
_OURS = {"sae": {"decoder_init_norm": 1.0}, "training": {"gradient_clip_norm": None}}
_MOMENTUM = 0.95


def settings(workload: Workload) -> list[PeerSetting]:
    """Return its default optimiser, Adam, and its cheaper selection of features. TopK is its only architecture."""
    if workload.architecture != "topk" or workload.dead_after_steps:
        return []
    signum = "the optimiser is schedule-free signum, not Adam"
    return [
        PeerSetting(
            "sparsify", "defaults", f"{_COMMON}; optimizer='signum'", partial(_Trainer, "topk", "signum"), **_OURS, difference=signum
        ),
        PeerSetting("sparsify", "adam", f"{_COMMON}; optimizer='adam', constant learning rate", partial(_Trainer, "topk", "adam"), **_OURS),
        PeerSetting(
            "sparsify",
            "groupmax",
            f"{_COMMON}; optimizer='adam', constant learning rate, activation='groupmax'",
            partial(_Trainer, "groupmax", "adam"),
            **_OURS,
            difference="the largest of each of k groups of features instead of the k largest",
        ),
    ]


class _Trainer:
    def __init__(
        self, activation: Literal["topk", "groupmax"], optimiser: Literal["signum", "adam"], initial: sm.SAE, workload: Workload
    ) -> None:
        config = SparseCoderConfig(num_latents=workload.d_sae, k=workload.k, activation=activation)
        self._sae = SparseCoder(workload.d_in, config)
        with torch.no_grad():
            self._sae.encoder.weight.copy_(initial.W_enc.t())
            self._sae.encoder.bias.copy_(initial.b_enc)
            self._sae.W_dec.copy_(initial.W_dec)
            self._sae.b_dec.copy_(initial.b_dec)
        self._optimiser: Any
        if optimiser == "adam":
            self._optimiser = torch.optim.Adam(self._sae.parameters(), lr=workload.learning_rate)
        else:
            self._optimiser = ScheduleFreeWrapper(SignSGD(self._sae.parameters(), lr=workload.learning_rate), momentum=_MOMENTUM)
            self._optimiser.train()
        self._tokens_since_fired = torch.zeros(workload.d_sae, dtype=torch.long)
        self._did_fire = torch.zeros(workload.d_sae, dtype=torch.bool)

    def step(self, x: Tensor) -> None:
        with products_at("high"):
            self._step(x)

    def _step(self, x: Tensor) -> None:
        self._sae.set_decoder_norm_to_unit_norm()
        total_variance = (x - x.mean(0)).pow(2).sum()
        out = self._sae(x, dead_mask=None, total_variance=total_variance)
        self._did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        out.fvu.backward()
        self._sae.remove_gradient_parallel_to_decoder_directions()
        self._optimiser.step()
        self._optimiser.zero_grad()
        self._tokens_since_fired += len(x)
        self._tokens_since_fired[self._did_fire] = 0
        self._did_fire.zero_()

    def reconstruct(self, x: Tensor) -> Tensor:
        if isinstance(self._optimiser, ScheduleFreeWrapper):
            self._optimiser.eval()  # the evaluation weights are an average
        self._sae.set_decoder_norm_to_unit_norm()
        return self._sae(x).sae_out
