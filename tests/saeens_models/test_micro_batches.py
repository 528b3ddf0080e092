"""A batch in parts gives the result of the batch at once."""

from __future__ import annotations

import pytest
import torch

import saeens_models as sm
from saeens_models.architectures import build_sae
from saeens_models.training.micro_batches import backpropagate

_ARCHITECTURES = [
    {"architecture": "topk", "k": 4},
    {"architecture": "standard", "l1_coefficient": 0.3},
    {"architecture": "jumprelu", "bandwidth": 0.4, "init_threshold": 0.2},
    {"architecture": "batch_topk", "k": 4, "threshold_rate": 0.2},
    {"architecture": "gated", "l1_coefficient": 0.3},
    {"architecture": "matching_pursuit", "max_iterations": 4},
]


@pytest.mark.parametrize("architecture", _ARCHITECTURES, ids=lambda each: each["architecture"])
@pytest.mark.parametrize("size", [1, 7, 50])
def test_objective_and_gradients_of_micro_batches_equal_those_of_the_whole_batch(architecture, size):
    sae = build_sae(sm.SAEConfig(**architecture, d_in=10, d_sae=64, init_seed=2))
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1))
    dead = torch.arange(64) % 3 == 0
    whole = sae.backpropagate(x, dead, 0.5)
    expected = {name: parameter.grad.clone() for name, parameter in sae.named_parameters() if parameter.grad is not None}
    found = backpropagate(sae, x, dead, 0.5, None, micro_batch_tokens=size)
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(found.loss, whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.terms, whole.terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.x_hat, whole.x_hat, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.fire_counts, whole.fire_counts)


@pytest.mark.parametrize("architecture", _ARCHITECTURES, ids=lambda each: each["architecture"])
def test_training_in_micro_batches_gives_the_same_sae_up_to_rounding(architecture):
    x = torch.randn(20, 64, 12, generator=torch.Generator().manual_seed(1)).cumsum(-1)
    config = sm.SAEConfig(**architecture, d_in=12, d_sae=60)
    training = sm.TrainingConfig(learning_rate=3e-3, dead_after_tokens=200)
    (whole,) = sm.train([config], x, training)
    (in_parts,) = sm.train([config], x, training, micro_batch_tokens=24)
    for name, weight in in_parts.state_dict().items():
        torch.testing.assert_close(weight, whole.state_dict()[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
