"""SAELens: its ``SAETrainer``, stepped as ``SAETrainer.fit`` does (and ``MultiSAETrainer.fit``, for several on one stream)."""

# pyright: reportMissingImports=false

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.standard_sae import StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

import saeens_models as sm
from benchmarks.peers import PeerSetting, Workload, products_at

_MANY_STEPS = 10**6  # the learning rate is constant, so the number of steps has no effect
_CLASSES = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "standard": (StandardTrainingSAE, StandardTrainingSAEConfig),
    "jumprelu": (JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig),
}
_COMMON = "Adam (0.9, 0.999), constant learning rate, gradients clipped at norm 1, decoder free, rows from norm 0.1, float32"


def settings(workload: Workload) -> list[PeerSetting]:
    """Return the defaults, and the faster documented options that work on a CPU."""
    ours = {"sae": {"decoder_init_norm": 0.1}, "training": {"unit_norm_decoder": False, **_dead_after(workload)}}
    if workload.architecture != "topk":
        return [
            _setting("defaults", _COMMON, {}, **ours),
            *_by_onednn("", _COMMON, {}, ours),
            _setting("autocast", f"{_COMMON}; autocast=True; products in bfloat16 on both sides", {}, autocast=True, bfloat16=True, **ours),
        ]
    unscaled = {"rescale_acts_by_decoder_norm": False}
    sparse = {**unscaled, "use_sparse_activations": True}
    in_full = f"{_COMMON}; rescale_acts_by_decoder_norm=False, use_sparse_activations=True"
    return [
        _setting(
            "defaults",
            f"{_COMMON}; rescale_acts_by_decoder_norm=True",
            {},
            sae=ours["sae"],
            training={**ours["training"], "unit_norm_decoder": True},
            difference="codes are scaled by the decoder norms, which are learnt; compared with decoder rows kept at norm 1",
        ),
        _setting("without rescaling", f"{_COMMON}; rescale_acts_by_decoder_norm=False", unscaled, **ours),
        _setting("sparse", in_full, sparse, **ours),
        *_by_onednn("sparse, ", in_full, sparse, ours),
        _setting("autocast", f"{_COMMON}; rescale_acts_by_decoder_norm=False, autocast=True (bfloat16)", unscaled, autocast=True, **ours),
    ]


def _by_onednn(name: str, text: str, fields: dict[str, Any], ours: dict[str, Any]) -> list[PeerSetting]:
    """Return the setting with products by oneDNN, on processors where it is faster than torch's choice. It is no option of SAELens.

    At precision "medium" torch asks oneDNN, which stays in float32 where it has no AMX.
    """
    processor = torch.cpu.get_capabilities()
    if not (processor.get("avx512_f") and str(processor.get("cpu_name")).startswith("AMD")) or processor.get("amx_bf16"):
        return []
    text = f"{text}; torch.set_float32_matmul_precision('medium'), with which oneDNN multiplies instead of MKL, in float32 as well"
    return [_setting(f"{name}products by oneDNN", text, fields, precision="medium", **ours)]


def _setting(
    name: str, text: str, fields: dict[str, Any], *, autocast: bool = False, precision: str = "highest", **ours: Any
) -> PeerSetting:
    return PeerSetting("SAELens", name, text, partial(_Trainer, fields, autocast, precision), **ours)


def _dead_after(workload: Workload) -> dict[str, int]:
    return {"dead_after_tokens": (workload.dead_after_steps or SAETrainerConfig.dead_feature_window) * workload.batch_tokens}


class _Trainer:
    def __init__(self, fields: dict[str, Any], autocast: bool, precision: str, initial: sm.SAE, workload: Workload) -> None:
        sae_class, config_class = _CLASSES[workload.architecture]
        own = {"k": workload.k} if workload.architecture == "topk" else {}
        self._sae = sae_class(config_class(d_in=workload.d_in, d_sae=workload.d_sae, device="cpu", **own, **fields))
        with torch.no_grad():
            for name, weight in initial.named_parameters():
                self._sae.get_parameter(name).copy_(weight)
        dead = {"dead_feature_window": workload.dead_after_steps} if workload.dead_after_steps else {}
        config = SAETrainerConfig(
            total_training_samples=_MANY_STEPS * workload.batch_tokens,
            train_batch_size_samples=workload.batch_tokens,
            lr_end=workload.learning_rate / 10,  # of schedules that decay; the default one is constant
            lr=workload.learning_rate,
            device="cpu",
            autocast=autocast,
            **dead,
        )
        self._precision = precision
        self._trainer = SAETrainer(cfg=config, sae=self._sae, data_provider=iter(()))

    def step(self, x: Tensor) -> None:
        self._trainer.maybe_reset_sparsity()
        with products_at(self._precision):
            self._trainer.step(x)
        self._trainer.n_training_steps += 1

    def reconstruct(self, x: Tensor) -> Tensor:
        return self._sae.eval()(x)
