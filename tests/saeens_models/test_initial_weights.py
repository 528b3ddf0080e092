"""Training from another SAE's weights: the same function at the first step, for any scale of the training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.training import CurvePoint

D_IN, D_SAE = 8, 24
SETTINGS = {
    "standard": {"l1_coefficient": 0.0},
    "topk": {"k": 3},
    "jumprelu": {"l0_coefficient": 0.0, "init_threshold": 0.05},
}
SCALE = 0.25


def _config(architecture: str = "topk", init_seed: int = 0, **changes) -> sm.SAEConfig:
    return sm.SAEConfig(
        architecture=architecture, init_seed=init_seed, **{"d_in": D_IN, "d_sae": D_SAE, **SETTINGS[architecture], **changes}
    )


def _batches(n: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(40, D_IN, generator=generator) * 5 + 2 for _ in range(n)]


def _training(**changes) -> sm.TrainingConfig:
    return sm.TrainingConfig(**{"learning_rate": 0.01, "normalize_activations": "expected_average_only_in", "input_scale": SCALE} | changes)


def _trained(architecture: str = "topk") -> sm.SAE:
    return sm.train([_config(architecture, 7)], _batches(seed=1), _training(input_scale=0.1))[0]


def _copy(sae: sm.SAE) -> dict[str, Tensor]:
    return {name: weight.clone() for name, weight in sae.state_dict().items()}


@pytest.mark.parametrize("architecture", sorted(SETTINGS))
def test_the_first_loss_is_that_of_the_initial_sae_at_the_training_scale(architecture: str):
    start, (x, *_) = _trained(architecture), _batches()
    points: list[list[CurvePoint]] = []
    sm.train([_config(architecture)], [x], _training(input_mean=(9.0,) * D_IN), lambda each: points.append(list(each)), initial=[start])
    with torch.no_grad():
        z = start.encode(x)
        squared_error = (start.decode(z) - x).square().sum(dim=1).mean()
    assert points[-1][0].loss == pytest.approx(float(squared_error) * SCALE**2, rel=1e-4)
    assert points[-1][0].l0 == pytest.approx(float((z > 0).sum(dim=1).float().mean()))


@pytest.mark.parametrize("architecture", sorted(SETTINGS))
def test_weights_are_unchanged_at_a_negligible_learning_rate(architecture: str):
    start = _trained(architecture)
    (same,) = sm.train([_config(architecture)], _batches(), _training(learning_rate=1e-12), initial=[start])
    for name, weight in start.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], weight, rtol=1e-5, atol=1e-6)


def test_steps_from_initial_weights_equal_those_of_adam():
    start, batches = _trained("standard"), _batches()
    training = _training(unit_norm_decoder=False, gradient_clip_norm=None)
    (sae,) = sm.train([_config("standard")], batches, training, initial=[start])
    W_enc, b_enc, W_dec, b_dec = (start.get_parameter(name).detach().clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    parameters = [W_enc, b_enc * SCALE, W_dec, b_dec * SCALE]
    for parameter in parameters:
        parameter.requires_grad_()
    adam = torch.optim.Adam(parameters, lr=training.learning_rate)
    for x in batches:
        W_enc, b_enc, W_dec, b_dec = parameters
        z = torch.relu((x * SCALE - b_dec) @ W_enc + b_enc)
        adam.zero_grad()
        (z @ W_dec + b_dec - x * SCALE).square().sum(dim=1).mean().backward()
        adam.step()
    for name, expected, scale in zip(("W_enc", "b_enc", "W_dec", "b_dec"), parameters, (1, SCALE, 1, SCALE), strict=True):
        torch.testing.assert_close(sae.get_parameter(name).detach(), expected.detach() / scale, rtol=1e-3, atol=1e-4)


def test_other_saes_are_drawn_as_usual_and_the_initial_sae_does_not_change():
    start = _trained()
    before = _copy(start)
    drawn, started = sm.train([_config(init_seed=1), _config(init_seed=2)], _batches(), _training(), initial=[None, start])
    (alone,) = sm.train([_config(init_seed=1)], _batches(), _training())
    assert all(torch.equal(weight, alone.state_dict()[name]) for name, weight in drawn.state_dict().items())
    assert all(torch.equal(weight, before[name]) for name, weight in start.state_dict().items())
    assert not torch.equal(started.W_dec, before["W_dec"])


def test_init_seed_has_no_effect_with_initial_weights():
    start = _trained()
    one, other = sm.train([_config(init_seed=1), _config(init_seed=2)], _batches(), _training(), initial=[start, start])
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in one.state_dict().items())


def test_an_interrupted_training_from_initial_weights_resumes_with_the_same_bits(tmp_path: Path):
    start, batches = _trained(), _batches()
    (whole,) = sm.train([_config()], batches, _training(), initial=[start])

    def cut():
        yield from batches[:3]
        raise ConnectionError

    checkpoints = sm.Checkpoints(tmp_path / "training.safetensors", interval_seconds=0)
    with pytest.raises(ConnectionError):
        sm.train([_config()], cut(), _training(), initial=[start], checkpoints=checkpoints)
    (resumed,) = sm.train([_config()], batches, _training(), initial=[start], checkpoints=checkpoints)
    assert checkpoints.resumed_at_tokens == [120]
    assert all(torch.equal(weight, whole.state_dict()[name]) for name, weight in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_config("standard"), "cannot start from topk with d_in 8 and d_sae 24: it is standard"),
        (_config(d_sae=32), "it is topk with d_in 8 and d_sae 32"),
    ],
    ids=["another architecture", "another width"],
)
def test_an_sae_of_another_shape_is_refused(config: sm.SAEConfig, message: str):
    with pytest.raises(ValueError, match=message):
        sm.train([config], _batches(), _training(), initial=[_trained()])


def test_a_different_number_of_initial_saes_is_refused():
    with pytest.raises(ValueError, match="2 initial SAEs for 1 configurations"):
        sm.train([_config()], _batches(), _training(), initial=[None, None])


def test_decoder_rows_that_are_not_unit_vectors_are_refused_where_training_keeps_them_so():
    start = _trained()
    with torch.no_grad():
        start.W_dec[3] *= 2
    with pytest.raises(ValueError, match="unit_norm_decoder = False"):
        sm.train([_config()], _batches(), _training(), initial=[start])
    sm.train([_config()], _batches(), _training(unit_norm_decoder=False), initial=[start])
