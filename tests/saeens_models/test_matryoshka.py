"""Matryoshka dictionaries: the sum of the losses of nested prefixes, against a dense computation written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import saeens_models as sm
from saeens_models.kernels import cpu_team
from saeens_models.training.micro_batches import backpropagate

D_IN, D_SAE, N, K = 16, 64, 96, 4
PREFIXES = [4, 16]  # of 64
ARCHITECTURES = ("topk", "batch_topk")


def config(architecture: str, **fields: Any) -> sm.SAEConfig:
    return sm.SAEConfig(**{"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": K, "matryoshka": [1 / 16, 0.25]} | fields)


def rows(n_batches: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, D_IN, generator=generator)
    return [torch.randn(N, 40, generator=generator).relu().pow(3) @ directions / 10 for _ in range(n_batches)]


def dense_code(architecture: str, pre: Tensor) -> Tensor:
    least = pre.flatten().topk(K * N).values[-1] if architecture == "batch_topk" else pre.topk(K, dim=1).values[:, -1:]
    return (pre * (pre >= least)).relu()


def dense_losses(sae: sm.SAE, architecture: str, x: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Squared errors of the prefixes and of the whole, and the weights that they depend on, in float64."""
    weights = {name: each.detach().double().requires_grad_() for name, each in sae.named_parameters()}
    z = dense_code(architecture, (x.double() - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"])
    x_hats = [z[:, :m] @ weights["W_dec"][:m] + weights["b_dec"] for m in (*PREFIXES, D_SAE)]
    return [(x_hat - x).square().sum(dim=1).mean() for x_hat in x_hats], weights


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("micro_batch_tokens", [None, 40])
def test_the_objective_is_the_sum_over_nested_prefixes(architecture: str, micro_batch_tokens: int | None) -> None:
    sae, (x,) = sm.build_sae(config(architecture, aux_loss_coefficient=0)), rows(1)
    losses, weights = dense_losses(sae, architecture, x)
    torch.stack(losses).sum().backward()
    with cpu_team("cpu") as team:
        found = backpropagate(sae, x, torch.zeros(D_SAE).bool(), 1.0, team, micro_batch_tokens=micro_batch_tokens)
    assert found.loss.item() == pytest.approx(sum(each.item() for each in losses), rel=1e-5)
    assert found.terms["mse"].item() == pytest.approx(losses[-1].item(), rel=1e-5)
    for name, weight in weights.items():
        got = sae.get_parameter(name).grad
        assert got is not None and weight.grad is not None
        assert (got - weight.grad).abs().max() <= 2e-5 * weight.grad.abs().max(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_auxiliary_loss_is_that_of_the_whole_dictionary(architecture: str) -> None:
    (x,), dead = rows(1), torch.arange(D_SAE) % 3 == 0
    nested, plain = (sm.build_sae(config(architecture, matryoshka=shares)).objective(x, dead).terms for shares in ([0.25], []))
    assert nested["auxiliary"].item() == pytest.approx(plain["auxiliary"].item(), rel=1e-5)
    assert nested["mse"].item() == pytest.approx(plain["mse"].item(), rel=1e-5)
    assert plain.keys() == {"mse", "auxiliary"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_features_alone_reconstruct_better_than_without_nesting(architecture: str) -> None:
    training = sm.TrainingConfig(learning_rate=0.01, dead_after_tokens=2000)
    configs = [config(architecture), config(architecture, matryoshka=[])]
    errors = []
    for sae in sm.train(configs, rows(120), training):
        (x,) = rows(1)
        z = sae.encode(x)
        z[:, PREFIXES[1] :] = 0
        errors.append((sae.decode(z) - x).square().sum(dim=1).mean().item())
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_is_saved_as_a_plain_sae_and_encodes_as_one(tmp_path: Path, architecture: str) -> None:
    nested, plain = (sm.build_sae(config(architecture, matryoshka=shares)) for shares in ([0.25], []))
    (x,) = rows(1)
    assert torch.equal(nested.encode(x), plain.encode(x))
    sm.save_sae(nested, tmp_path)
    loaded = sm.load_sae(tmp_path)
    assert torch.equal(loaded.encode(x), nested.inference_form().encode(x))
    assert loaded.config.architecture == ("topk" if architecture == "topk" else "jumprelu")


def test_saes_of_one_stream_do_not_share_launches_with_nested_ones() -> None:
    saes = [sm.build_sae(config("topk", init_seed=seed)) for seed in (1, 2)]
    assert saes[0].backpropagate_together(saes, rows(1)[0], [None, None]) is None


@pytest.mark.parametrize("shares", [[0.5, 0.25], [0.001], [0.25, 0.2501], [1.0], [0.0], [0.999]])
def test_wrong_prefixes_are_refused(shares: list[float]) -> None:
    with pytest.raises(ValidationError, match="matryoshka"):
        config("topk", matryoshka=shares)


def test_recipes_without_prefixes_do_not_name_them_and_wider_saes_keep_the_shares() -> None:
    plain, nested = (sm.SAESettings(architecture="topk", expansion=4, k=K, matryoshka=shares) for shares in ([], [0.0625, 0.25]))
    assert "matryoshka" not in plain.to_json()
    assert nested.to_json()["matryoshka"] == [0.0625, 0.25]
    assert sm.SAESettings.joined([nested] * 2).config(D_IN).prefixes == (8, 32)  # pyright: ignore[reportAttributeAccessIssue]
