"""`l0_target`: JumpReLU's quadratic term against a dense computation, and the control of the coefficient of standard and gated SAEs."""

from __future__ import annotations

from collections.abc import Iterator
from math import exp, log
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.architectures.registry import sae_class
from saeens_models.kernels import cpu_team
from saeens_models.training.l0_control import L0Control
from saeens_models.training.micro_batches import backpropagate

D_IN, D_SAE, N = 16, 64, 96
CONTROLLED = ("standard", "gated")


def config(architecture: str, **fields: Any) -> sm.SAEConfig:
    return sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, **fields)


def rows(n_batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_IN, generator=generator)
    return [torch.randn(N, 40, generator=generator).relu().pow(3) @ directions / 10 for _ in range(n_batches)]


def jumprelu(threshold: float, **fields: Any) -> sm.SAE:
    """A JumpReLU SAE with thresholds around a value."""
    sae = sm.build_sae(config("jumprelu", decoder_init_norm=1.0, bandwidth=0.3, **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.get_parameter("threshold").copy_(threshold + 0.2 * torch.rand(D_SAE, generator=generator))
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE, generator=generator))
    return sae


def dense_gradients(sae: sm.SAE, x: Tensor, coefficient: float, target: float, bandwidth: float) -> tuple[float, dict[str, Tensor]]:
    """Term and gradients in float64, with steps that are replaced by ramps of the kernel's width in the backward pass."""
    leaves = {name: each.detach().double().requires_grad_() for name, each in sae.named_parameters()}
    x = x.double()
    pre = (x - leaves["b_dec"]) @ leaves["W_enc"] + leaves["b_enc"]
    theta = leaves["threshold"]
    active = (pre > theta).double()
    ramp = ((pre.detach() - theta) / bandwidth).clamp(-0.5, 0.5)  # its derivative by theta is the rectangle kernel's
    step = active + ramp - ramp.detach()
    x_hat = (pre * active + pre.detach() * 0 + theta.detach() * (ramp - ramp.detach())) @ leaves["W_dec"] + leaves["b_dec"]
    term = coefficient * (step.sum(dim=1).mean() / target - 1) ** 2
    ((x_hat - x).square().sum(dim=1).mean() + term).backward()
    return term.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


@pytest.mark.parametrize("threshold", [0.2, 1.5])  # many and few active features: whole blocks and single entries
@pytest.mark.parametrize("way", ["torch", "compiled", "micro-batches", "compiled micro-batches"])
def test_the_quadratic_term_agrees_with_a_dense_computation(threshold: float, way: str) -> None:
    sae, (x,) = jumprelu(threshold, l0_target=5.0, l0_coefficient=7.0), rows(1)
    term, expected = dense_gradients(sae, x, 7.0, 5.0, 0.3)
    with cpu_team("cpu") as team:
        tokens = 40 if "micro" in way else None
        found = backpropagate(sae, x, torch.zeros(D_SAE).bool(), 1.0, team if "compiled" in way else None, micro_batch_tokens=tokens)
        assert float(found.terms["l0"]) == pytest.approx(term, rel=1e-5)
        for name, gradient in expected.items():
            got = sae.get_parameter(name).grad
            assert got is not None
            assert (got - gradient).abs().max() <= 2e-5 * gradient.abs().max(), name
    assert expected["threshold"].abs().max() > 0


def test_warm_up_scales_the_quadratic_term() -> None:
    sae, (x,) = jumprelu(0.2, l0_target=5.0, l0_coefficient=7.0), rows(1)
    whole, half = (sae.objective(x, None, scale).terms["l0"] for scale in (1.0, 0.5))
    assert float(half) == pytest.approx(float(whole) / 2)


def test_jumprelu_comes_nearer_to_its_target_with_a_larger_coefficient() -> None:
    def l0(coefficient: float) -> float:
        settings = config("jumprelu", l0_target=3.0, l0_coefficient=coefficient, bandwidth=0.3, init_threshold=0.1)
        training = sm.TrainingConfig(learning_rate=0.02, dead_after_tokens=10_000)
        (sae,) = sm.train([settings], rows(150), training)
        return float((sae.encode(torch.cat(rows(2))) > 0).sum(dim=1).float().mean())

    near, far = l0(300.0), l0(0.5)
    assert near == pytest.approx(3, rel=0.1)
    assert abs(far - 3) > 3 * abs(near - 3)


def controlled(architecture: str, batches: list[Tensor] | Iterator[Tensor], n: int, **options: Any) -> sm.SAE:
    training = sm.TrainingConfig(
        learning_rate=0.01, learning_rate_decay_fraction=0.5, total_tokens=n * N, dead_after_tokens=1000, sparsity_warmup_fraction=0.05
    )
    (sae,) = sm.train([config(architecture, l0_target=4.0)], batches, training, **options)
    return sae


@pytest.mark.parametrize("architecture", CONTROLLED)
def test_the_coefficient_is_adjusted_until_l0_is_on_target(architecture: str) -> None:
    sae = controlled(architecture, rows(300), 300)
    assert float((sae.encode(torch.cat(rows(2))) > 0).sum(dim=1).float().mean()) == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize("architecture", CONTROLLED)
def test_a_stopped_training_resumes_with_the_same_coefficient(tmp_path: Path, architecture: str) -> None:
    whole = controlled(architecture, rows(40), 40)
    checkpoints = sm.Checkpoints(tmp_path / "training.ckpt", interval_seconds=0)

    def stopping() -> Iterator[Tensor]:
        yield from rows(40)[:25]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        controlled(architecture, stopping(), 40, checkpoints=checkpoints)
    resumed = controlled(architecture, rows(40), 40, checkpoints=checkpoints)
    assert checkpoints.resumed_at_tokens == [25 * N]
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_the_control_follows_its_definition_and_rests_in_the_last_fifth() -> None:
    control = L0Control(8.0, 1000)
    smoothed, integral = log(8), 0.0
    assert control.factor == 1
    for i, l0 in enumerate([100.0, 20.0, 9.0, 0.0, 4.0, 8.0, 8.5, 8.0], start=1):
        control.update(l0, 100, 100 * i)
        smoothed += 1.0 * (log(max(l0, 1e-3)) - smoothed)  # a step of a tenth of the training is longer than the window
        error = min(max(smoothed - log(8), -0.3), 0.3)
        integral += 15 * 0.1 * error
        assert control.factor == pytest.approx(exp(integral + 0.5 * error))
    rests = control.factor
    control.update(100.0, 100, 900)
    assert control.factor == rests


@pytest.mark.parametrize("architecture", CONTROLLED)
def test_the_control_needs_the_length_of_the_training(architecture: str) -> None:
    with pytest.raises(ValueError, match="l0_target needs total_tokens"):
        sm.train([config(architecture, l0_target=4.0)], rows(1), sm.TrainingConfig())


@pytest.mark.parametrize("architecture", [*CONTROLLED, "jumprelu"])
def test_saes_without_a_target_keep_their_recipes_and_those_with_one_are_joined(architecture: str) -> None:
    plain, aimed = (sm.SAESettings(architecture=architecture, expansion=2, **own) for own in ({}, {"l0_target": 4}))
    assert "l0_target" not in plain.to_json()
    assert "l0_target" not in plain.config(16).model_dump(mode="json")
    assert (plain.l0, aimed.l0) == (None, 4)
    joined = sm.SAESettings.joined([aimed] * 3, add_l0=True)
    assert (joined.width, joined.l0) == (6, 12)
    assert sm.SAESettings.model_validate(joined.to_json()).config(16).model_dump()["l0_target"] == 12
    with pytest.raises(ValueError, match="give l0_target; possible without a target with: batch_topk, matching_pursuit, topk"):
        sm.SAESettings.joined([plain] * 3, add_l0=True)


def test_a_target_of_more_features_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="l0_target = 65 is larger than d_sae = 64"):
        config("standard", l0_target=65)


@pytest.mark.parametrize("architecture", [*CONTROLLED, "jumprelu"])
def test_an_sae_with_a_target_is_saved_and_loaded(tmp_path: Path, architecture: str) -> None:
    sae = sm.build_sae(config(architecture, l0_target=4.0))
    sm.save_sae(sae, tmp_path)
    assert sm.load_sae(tmp_path).config == sae.config
    assert sae_class(architecture).config_class.l0_field == "l0_target"
