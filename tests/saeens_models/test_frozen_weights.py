"""Frozen decoders and encoders: the controls in which no direction is learned, or only a part of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import saeens_models as sm

FIELDS = {"topk": {"k": 4}, "standard": {}, "jumprelu": {}, "gated": {}, "batch_topk": {"k": 4}}


def config(architecture: str) -> sm.SAEConfig:
    return sm.SAEConfig(architecture=architecture, d_in=16, d_sae=32, **FIELDS[architecture])


def rows(n_batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(64, 16, generator=generator) + 1 for _ in range(n_batches)]


def train(architecture: str, n_batches: int, **training: Any) -> tuple[sm.SAE, sm.SAE]:
    """The SAE after training, and before."""
    (trained,) = sm.train([config(architecture)], rows(n_batches), sm.TrainingConfig(dead_after_tokens=1000, **training))
    return trained, sm.build_sae(config(architecture))


@pytest.mark.parametrize("architecture", sorted(FIELDS))
@pytest.mark.parametrize(("frozen", "kept", "moved"), [("decoder", "W_dec", "W_enc"), ("encoder", "W_enc", "W_dec")])
def test_a_frozen_weight_keeps_its_bits_and_the_others_are_trained(architecture: str, frozen: str, kept: str, moved: str) -> None:
    trained, before = train(architecture, 6, learning_rate=0.01, frozen=frozen, unit_norm_decoder=False)
    assert torch.equal(trained.get_parameter(kept), before.get_parameter(kept))
    assert not torch.equal(trained.get_parameter(moved), before.get_parameter(moved))
    assert not torch.equal(trained.b_dec, before.b_dec)


def test_a_frozen_decoder_with_unit_norms_keeps_its_directions() -> None:
    trained, before = train("topk", 6, learning_rate=0.01, frozen="decoder", unit_norm_decoder=True)
    assert trained.W_dec.detach().norm(dim=1) == pytest.approx(1, abs=1e-6)
    assert (F.normalize(trained.W_dec, dim=1) - F.normalize(before.W_dec, dim=1)).abs().max() < 1e-6


@pytest.mark.parametrize("unit_norm_decoder", [True, False])
def test_softly_frozen_rows_keep_a_cosine_of_at_least_four_fifths(unit_norm_decoder: bool) -> None:
    settings: dict[str, Any] = {"learning_rate": 0.05, "unit_norm_decoder": unit_norm_decoder}
    soft, before = train("topk", 60, frozen="decoder_soft", **settings)
    free, _ = train("topk", 60, **settings)
    cosines, free_cosines = (F.cosine_similarity(each.W_dec, before.W_dec).detach() for each in (soft, free))
    assert free_cosines.min() < 0.7, "the training has to reach the limit"
    assert cosines.min().item() == pytest.approx(0.8, abs=1e-5)
    assert ((cosines > 0.8001) & (cosines < 0.9999)).any(), "rows within the limit move freely"
    if unit_norm_decoder:
        assert soft.W_dec.detach().norm(dim=1).numpy() == pytest.approx(1, abs=1e-5)


def test_steps_with_and_without_compiled_loops_restrain_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, _ = train("topk", 20, learning_rate=0.05, frozen="decoder_soft")
    monkeypatch.setattr("saeens_models.kernels.team._has_numba", lambda: False)
    plain, _ = train("topk", 20, learning_rate=0.05, frozen="decoder_soft")
    assert (compiled.W_dec - plain.W_dec).abs().max() < 1e-3


def test_a_stopped_training_resumes_with_the_same_limits(tmp_path: Any) -> None:
    training = sm.TrainingConfig(learning_rate=0.05, frozen="decoder_soft", dead_after_tokens=1000)
    (whole,) = sm.train([config("topk")], rows(40), training)
    checkpoints = sm.Checkpoints(tmp_path / "training.ckpt", interval_seconds=0)

    def stopping() -> Any:
        yield from rows(40)[:25]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sm.train([config("topk")], stopping(), training, checkpoints=checkpoints)
    (resumed,) = sm.train([config("topk")], rows(40), training, checkpoints=checkpoints)
    assert torch.equal(whole.W_dec, resumed.W_dec)


def test_an_encoder_that_does_not_exist_cannot_be_frozen() -> None:
    pursuit = sm.SAEConfig(architecture="matching_pursuit", d_in=16, d_sae=32, max_iterations=4)
    with pytest.raises(ValueError, match="frozen: encoder, but matching_pursuit has no W_enc of its own"):
        sm.train([pursuit], rows(1), sm.TrainingConfig(frozen="encoder"))
