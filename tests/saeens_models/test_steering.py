"""Steering and ablation against the blocks of a language model run one by one, with the vector added by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

import saeens_models as sm
from saeens_models.steering import save_lm_eval_steering, steering_vector

D_IN, D_SAE, K, LAYER = 16, 24, 4, 1


@pytest.fixture(scope="module")
def model() -> GPTNeoXForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": D_IN,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "vocab_size": 50,
    }
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape, max_position_embeddings=32)).eval()


def saes() -> dict[str, sm.SAE | sm.Ensemble]:
    torch.manual_seed(1)
    members = [sm.build_sae(sm.SAEConfig(architecture="topk", d_in=D_IN, d_sae=D_SAE, k=K, init_seed=j)) for j in range(2)]
    return {"sae": members[0], "bagging": sm.Bagging(members), "boosting": sm.Boosting(members)}


TOKENS = torch.arange(20)[None]


@torch.no_grad()
def probabilities(model: GPTNeoXForCausalLM, stream: Tensor) -> Tensor:
    """Next-token probabilities of a residual stream `[1, L, d_in]` after block LAYER, by the later blocks one by one."""
    base = model.gpt_neox
    positions = torch.arange(stream.shape[1])[None]
    rotary = base.rotary_emb(stream, position_ids=positions)
    mask = torch.full((stream.shape[1],) * 2, float("-inf")).triu(1)[None, None]
    for block in base.layers[LAYER + 1 :]:
        output = block(stream, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        stream = output[0] if isinstance(output, tuple) else output
    return model.get_output_embeddings()(base.final_layer_norm(stream)).softmax(-1)


@torch.no_grad()
def stream_of(model: GPTNeoXForCausalLM) -> Tensor:
    return model(TOKENS, output_hidden_states=True).hidden_states[LAYER + 1]


@pytest.mark.parametrize("kind", ["sae", "bagging", "boosting"])
@pytest.mark.parametrize("hook", [f"layers.{LAYER}", f"gpt_neox.layers.{LAYER}", None])
def test_steering_changes_probabilities_as_adding_the_vector_by_hand(model: GPTNeoXForCausalLM, kind: str, hook: str | None):
    sae, stream = saes()[kind], stream_of(model)
    features = [3, sae.W_dec.shape[0] - 1]
    by_hand = probabilities(model, stream + 5.0 * sae.W_dec[features[0]] - 2.5 * sae.W_dec[features[1]])
    with torch.no_grad():
        plain = model(TOKENS).logits.softmax(-1)
        torch.testing.assert_close(plain, probabilities(model, stream))
        with sm.steer(model, sae, {features[0]: 5.0, features[1]: -2.5}, hook or model.gpt_neox.layers[LAYER]):
            steered = model(TOKENS).logits.softmax(-1)
        torch.testing.assert_close(steered, by_hand)
        assert (steered - plain).abs().max() > 1e-3
        torch.testing.assert_close(model(TOKENS).logits.softmax(-1), plain)  # the hook is gone


@pytest.mark.parametrize("kind", ["sae", "bagging", "boosting"])
def test_an_ablated_feature_no_longer_contributes(model: GPTNeoXForCausalLM, kind: str):
    sae, stream = saes()[kind], stream_of(model)
    with torch.no_grad():
        z = sae.encode(stream)
        features = z[0].sum(0).topk(3).indices.tolist()
        kept = z.clone()
        kept[..., features] = 0
        by_hand = probabilities(model, stream + sae.decode(kept) - sae.decode(z))
        with sm.ablate(model, sae, features, f"layers.{LAYER}"):
            ablated = model(TOKENS).logits.softmax(-1)
        torch.testing.assert_close(ablated, by_hand)


def test_a_feature_counts_once_whatever_its_type(model: GPTNeoXForCausalLM):
    sae, hook = saes()["bagging"], f"layers.{LAYER}"
    with torch.no_grad():
        with sm.ablate(model, sae, [5], hook):
            once = model(TOKENS).logits
        for features in ([5, 5], np.array([5, 5]), torch.tensor([5])):
            with sm.ablate(model, sae, features, hook):
                assert torch.equal(model(TOKENS).logits, once)
    of_numpy: Any = {np.int64(3): 2.0}
    torch.testing.assert_close(steering_vector(sae, of_numpy), 2 * sae.W_dec[3])


def test_what_does_not_exist_is_named(model: GPTNeoXForCausalLM):
    sae = saes()["sae"]
    wrong: list[tuple[Any, str, str]] = [
        ({D_SAE: 1.0}, "layers.1", f"feature {D_SAE} does not exist: there are features 0 to {D_SAE - 1}"),
        ({-1: 1.0}, "layers.1", "feature -1 does not exist"),
        ({}, "layers.1", "no feature is given"),
        ([0], "layers.1", "strengths are a mapping such as"),
        ({0: float("nan")}, "layers.1", "the strength of feature 0 is nan, expected a finite number"),
        ({0: "much"}, "layers.1", "the strength of feature 0 is 'much'"),
        ({True: 1.0}, "layers.1", "feature True does not exist"),
        ({0: 1.0}, "layers.9", r"no module 'layers\.9'; did you mean .*layers\."),
        ({0: 1.0}, "lm_head", r"the output at lm_head is \[1, 20, 50\], expected \[\.\.\., 16\]"),
    ]
    for strengths, hook, why in wrong:
        with pytest.raises(ValueError, match=why), sm.steer(model, sae, strengths, hook):
            model(TOKENS)


def test_the_harness_file_holds_the_vector_that_steering_adds(model: GPTNeoXForCausalLM, tmp_path: Path):
    sae, strengths = saes()["boosting"], {3: 5.0, D_SAE + 1: 2.0}
    save_lm_eval_steering(sae, strengths, f"layers.{LAYER}", tmp_path / "steer.pt")
    ((hookpoint, found),) = torch.load(tmp_path / "steer.pt", weights_only=True).items()
    assert hookpoint in dict(model.base_model.named_modules()), "where the harness looks for it"
    assert (found["action"], found["bias"]) == ("add", None)
    torch.testing.assert_close(found["steering_coefficient"] * found["steering_vector"], steering_vector(sae, strengths))
    with pytest.raises(ValueError, match="absent is no folder"):
        save_lm_eval_steering(sae, strengths, "layers.1", tmp_path / "absent" / "steer.pt")
    with pytest.raises(ValueError, match=r"end with \.pt"):
        save_lm_eval_steering(sae, strengths, "layers.1", tmp_path / "steer.safetensors")
