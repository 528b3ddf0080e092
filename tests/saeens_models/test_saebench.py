"""The object that SAEBench evaluates, without SAEBench: units of codes and weights, moves, and what is refused. Scores: tests/saebench."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.interop.saebench import for_saebench

D_IN, D_SAE, HOOK = 6, 10, "blocks.3.hook_resid_post"
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matching_pursuit": {"max_iterations": 3},
}


@torch.no_grad()
def member(architecture: str, seed: int = 0, **fields: Any) -> sm.SAE:
    """An SAE with random weights, whose decoder rows have all sorts of norms."""
    sae = sm.build_sae(sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, **OWN_FIELDS[architecture], **fields))
    generator = torch.Generator().manual_seed(seed)
    for weight in sae.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    sae.metadata = {"model_name": "tiny", "hook_name": HOOK, "context_size": 16}
    return sae


def activations() -> Tensor:
    return torch.randn(4, 7, D_IN, generator=torch.Generator().manual_seed(9)) * 2


SAES = [
    *(member(architecture) for architecture in OWN_FIELDS),
    sm.Bagging([member("topk", 1), member("gated", 2), member("matching_pursuit", 3)]),
    sm.Boosting([member("topk", 1), member("jumprelu", 2), member("standard", 3)]),
]


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("sae", SAES, ids=lambda sae: getattr(sae, "kind", None) or sae.config.architecture)
@torch.no_grad()
def test_codes_are_in_the_unit_of_decoder_rows_of_norm_1(sae: sm.SAE | sm.Ensemble, scaled: bool) -> None:
    adapter, x = for_saebench(sae, scaled=scaled), activations()
    z = adapter.encode(x)
    own = sae.encode(x, scaled) if isinstance(sae, sm.Ensemble) else sae.encode(x)
    n_members = len(sae) if isinstance(sae, sm.Bagging) and not scaled else 1
    assert (z != 0).any()
    torch.testing.assert_close(z, own * sae.W_dec.norm(dim=1))
    torch.testing.assert_close(adapter.W_dec.norm(dim=1), torch.full((adapter.cfg.d_sae,), 1 / n_members))
    torch.testing.assert_close(adapter.decode(z), z @ adapter.W_dec + adapter.b_dec)
    torch.testing.assert_close(adapter.decode(z), sae(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter(x[0]), sae(x[0]))
    assert adapter.W_enc.shape == (D_IN, adapter.cfg.d_sae)
    assert adapter.b_enc.shape == (adapter.cfg.d_sae,)


@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_the_encoder_of_a_bag_gives_its_codes(scaled: bool) -> None:
    adapter, x = (
        for_saebench(sm.Bagging([member("standard", seed, apply_b_dec_to_input=False) for seed in range(3)]), scaled=scaled),
        activations(),
    )
    torch.testing.assert_close(torch.relu(x @ adapter.W_enc + adapter.b_enc), adapter.encode(x))


@torch.no_grad()
def test_the_bias_of_a_gated_sae_is_that_of_its_magnitudes() -> None:
    sae = member("gated")
    adapter = for_saebench(sae)
    expected = sae.get_parameter("b_mag") * sae.W_dec.norm(dim=1)
    for found in (adapter.b_enc, adapter.b_mag):
        torch.testing.assert_close(found, expected)


def test_rows_of_zeros_stay() -> None:
    sae = member("standard")
    with torch.no_grad():
        sae.W_dec[4] = 0
    adapter = for_saebench(sae)
    assert adapter.W_dec[4].tolist() == [0] * D_IN
    assert adapter.encode(activations()).isfinite().all()


def test_a_move_changes_number_type_weights_and_configuration() -> None:
    adapter = for_saebench(sm.Boosting([member("topk", 1), member("jumprelu", 2)]))
    assert (adapter.cfg.dtype, adapter.dtype, str(adapter.device)) == ("float32", torch.float32, "cpu")
    assert adapter.to(device="cpu", dtype=torch.bfloat16) is adapter
    assert (adapter.cfg.dtype, adapter.dtype) == ("bfloat16", torch.bfloat16)
    assert {adapter.encode(activations().bfloat16()).dtype, adapter.W_enc.dtype, adapter.b_enc.dtype, adapter.W_dec.dtype} == {
        torch.bfloat16
    }


def test_the_results_file_describes_the_ensemble() -> None:
    adapter = for_saebench(sm.Bagging([member("topk", 1), member("gated", 2)]), model_name="pythia-70m-deduped", scaled=False)
    described = json.loads(json.dumps(adapter.cfg.to_dict()))
    assert (described["model_name"], described["hook_layer"], described["context_size"]) == ("pythia-70m-deduped", 3, 16)
    assert (described["architecture"], described["scaled"], described["d_sae"]) == ("bagging", False, 2 * D_SAE)
    assert [each["architecture"] for each in described["members"]] == ["topk", "gated"]
    assert described["origin"]["model_name"] == "tiny"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_name": None}, "no model_name: .*model_name="),
        ({"hook_name": ""}, "no hook_name: .*hook_name="),
        ({"hook_name": "layers.6"}, "'layers.6'.*blocks.8.hook_resid_post"),
        ({"hook_name": "blocks.2.attn.hook_z"}, "hook_z.*one vector per token"),
    ],
)
def test_a_model_or_hook_that_saebench_cannot_find_is_refused(change: dict[str, Any], message: str) -> None:
    sae = member("topk")
    sae.metadata |= change
    with pytest.raises(ValueError, match=message):
        for_saebench(sae)
    for_saebench(sae, model_name="tiny", hook_name=HOOK)
    with pytest.raises(TypeError, match="got str"):
        for_saebench("my_sae")  # pyright: ignore[reportArgumentType]
