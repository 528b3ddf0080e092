"""dictionary_learning: its trainers' ``update``, as ``trainSAE`` calls it for each trainer."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
from dictionary_learning.trainers.jumprelu import JumpReluTrainer
from dictionary_learning.trainers.standard import StandardTrainer
from dictionary_learning.trainers.top_k import TopKTrainer
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm
from benchmarks.peers import PeerSetting, Workload

_TRAINERS = {"topk": TopKTrainer, "standard": StandardTrainer, "jumprelu": JumpReluTrainer}
_MANY_STEPS = 10**6
_COMMON = "the common learning rate without warm-up, b_dec from 0; trainSAE has no autocast on a CPU"
_TEXTS = {
    "topk": f"TopKTrainer, auxk_alpha 1/32, gradients clipped at norm 1, unit decoder, {_COMMON}",
    "standard": f"StandardTrainer, l1_penalty 0.1 without warm-up, unit decoder, no clipping, {_COMMON}",
    "jumprelu": "JumpReluTrainer, bandwidth 0.001, target_l0 20 without warm-up, Adam (0, 0.999), unit decoder, gradients clipped "
    f"at norm 1, {_COMMON}",
}
_OURS: dict[str, dict[str, Any]] = {
    "topk": {"sae": {"decoder_init_norm": 1.0}},
    "standard": {"sae": {"decoder_init_norm": 0.1, "l1_coefficient": 0.1}, "training": {"gradient_clip_norm": None}},
    "jumprelu": {
        "sae": {
            "decoder_init_norm": 1.0,
            "apply_b_dec_to_input": False,
            "init_threshold": 0.001,
            "bandwidth": 0.001,
            "l0_coefficient": 0.1,
        },
        "training": {"adam_betas": (0.0, 0.999)},
        "difference": "the sparsity term is (L0 / 20 - 1)^2, here it is 0.1 L0",
    },
}


def settings(workload: Workload) -> list[PeerSetting]:
    """Return its defaults, which have no faster alternative on a CPU."""
    if workload.dead_after_steps:
        return []  # the number of tokens is not an argument of its trainers
    return [PeerSetting("dictionary_learning", "defaults", _TEXTS[workload.architecture], _Trainer, **_OURS[workload.architecture])]


class _Trainer:
    def __init__(self, initial: sm.SAE, workload: Workload) -> None:
        own: dict[str, Any] = {"k": workload.k} if workload.architecture == "topk" else {"sparsity_warmup_steps": None}
        self._trainer = _TRAINERS[workload.architecture](
            steps=_MANY_STEPS,
            activation_dim=workload.d_in,
            dict_size=workload.d_sae,
            layer=0,
            lm_name="",
            lr=workload.learning_rate,
            warmup_steps=0,
            device="cpu",
            **own,
        )
        self._step = 0
        with torch.no_grad():
            for name, weight in _weights(initial, workload.architecture).items():
                self._trainer.ae.get_parameter(name).copy_(weight)

    def step(self, x: Tensor) -> None:
        self._step += 1  # not from 0: the first update would replace b_dec by the batch's geometric median
        self._trainer.update(self._step, x)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self._trainer.ae(x)


def _weights(sae: sm.SAE, architecture: str) -> dict[str, Tensor]:
    W_dec = F.normalize(sae.W_dec, dim=1)  # as its training keeps it
    if architecture == "jumprelu":
        return {**dict(sae.named_parameters()), "W_dec": W_dec}
    b_dec = "b_dec" if architecture == "topk" else "bias"
    return {"encoder.weight": sae.W_enc.t(), "encoder.bias": sae.b_enc, "decoder.weight": W_dec.t(), b_dec: sae.b_dec}
