"""SAEs of every architecture against SAELens' values, and properties that all architectures share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

import saeens_models as sm
from saeens_models.architectures import architectures, validate_l0_multiple
from saeens_models.architectures.batch_topk import BatchTopKConfig, BatchTopKSAE
from saeens_models.architectures.topk import TopKConfig, TopKSAE

GOLDEN = Path(__file__).parents[1] / "golden"
D_IN, D_SAE, K = 16, 48, 6
OWN_FIELDS = {
    "batch_topk": {"k": K},
    "gated": {"l1_coefficient": 0.75},
    "jumprelu": {"l0_coefficient": 0.75, "bandwidth": 0.05},
    "matching_pursuit": {"max_iterations": K, "residual_threshold": 0.5},
    "standard": {"l1_coefficient": 0.75},
    "topk": {"k": K},
}
"""Settings of each architecture; a new architecture is added here."""
ARCHITECTURES = architectures()
IN_GOLDEN_FOLDERS = ["jumprelu", "standard", "topk"]
OF_SAELENS: dict[str, str] = {"batchtopk": "batch_topk", "topk_aux": "topk"}  # names of golden training steps
PURSUITS: dict[str, dict[str, Any]] = {
    "matching_pursuit": {"architecture": "matching_pursuit", "max_iterations": 6, "residual_threshold": 0.5},
    "matching_pursuit_long": {
        "architecture": "matching_pursuit",
        "max_iterations": 12,
        "residual_threshold": 0.0,
        "stop_on_duplicate_support": False,
    },
}
"""Golden training steps of matching pursuit, with their settings."""
TERMS = {"mse_loss": "mse", "l1_loss": "l1", "l0_loss": "l0", "auxiliary_reconstruction_loss": "auxiliary"}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tensors.safetensors")


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads((GOLDEN / "expected.json").read_text())


def config(architecture: str, **fields) -> sm.SAEConfig:
    return sm.SAEConfig(**{"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, **OWN_FIELDS[architecture], **fields})


def random_sae(architecture: str, **fields) -> sm.SAE:
    sae = sm.build_sae(config(architecture, **fields))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in sae.named_parameters():
            weight.copy_(torch.rand(weight.shape, generator=generator) * 0.3 if name == "threshold" else weight_noise(weight, generator))
    return sae


def weight_noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(weight.shape, generator=generator) * 0.3


# SAELens' own values


@pytest.mark.parametrize("member", range(4))
@pytest.mark.parametrize("architecture", IN_GOLDEN_FOLDERS)
def test_saelens_folder_gives_the_codes_and_reconstructions_of_saelens(golden, architecture, member):
    sae = sm.load_sae(GOLDEN / "sae_lens" / architecture / f"member_{member}")
    z = sae.encode(golden["activations"])
    torch.testing.assert_close(z, golden[f"{architecture}.member.{member}.codes"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sae.decode(z), golden[f"{architecture}.member.{member}.reconstruction"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["standard", "topk", "topk_aux", "jumprelu", "batchtopk", "gated", *PURSUITS])
def test_objective_and_gradients_equal_those_of_saelens(golden, expected, name):
    sae = sm.build_sae(config(**PURSUITS.get(name, {"architecture": OF_SAELENS.get(name, name)})))
    weights = {key.rsplit(".", 1)[1]: value for key, value in golden.items() if key.startswith(f"training.{name}.param.")}
    sae.load_state_dict(weights, strict=name != "batchtopk")  # whose threshold is not one of the weights
    dead_mask = golden["training.topk_aux.dead_mask"].bool() if name == "topk_aux" else None
    objective = sae.objective(golden["training.batch"], dead_mask)
    objective.loss.backward()

    assert objective.loss.item() == pytest.approx(expected["training"][name]["loss"], rel=1e-5)
    for key, value in expected["training"][name]["losses"].items():
        assert objective.terms[TERMS[key]].item() == pytest.approx(value, rel=1e-5)
    for weight_name, weight in sae.named_parameters():
        torch.testing.assert_close(weight.grad, golden[f"training.{name}.grad.{weight_name}"], rtol=1e-4, atol=1e-6)


# Objectives


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "batch_topk"])  # which encodes by its threshold
def test_objective_counts_firings_of_the_code(golden, architecture):
    sae = random_sae(architecture)
    x = golden["training.batch"]
    objective = sae.objective(x)
    z = sae.encode(x)
    assert torch.equal(objective.fire_counts, (z > 0).sum(0))
    assert objective.l0.item() == pytest.approx((z > 0).sum(1).double().mean().item())
    torch.testing.assert_close(objective.x_hat, sae(x).detach())
    assert objective.loss.item() == pytest.approx(sum(term.item() for term in objective.terms.values()))


@pytest.mark.parametrize(("architecture", "term"), [("standard", "l1"), ("gated", "l1"), ("jumprelu", "l0")])
def test_sparsity_scale_multiplies_the_sparsity_term_only(golden, architecture, term):
    sae = random_sae(architecture)
    whole, half = (sae.objective(golden["training.batch"], sparsity_scale=scale) for scale in (1.0, 0.5))
    assert half.terms[term].item() == pytest.approx(whole.terms[term].item() / 2)
    assert half.terms["mse"] == whole.terms["mse"]


def test_jumprelu_threshold_gradient_is_the_rectangle_kernel_estimate(golden):
    sae = random_sae("jumprelu", bandwidth=0.2)
    x = golden["training.batch"]
    sae.objective(x).loss.backward()
    with torch.no_grad():
        pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
        theta = sae.get_parameter("threshold")
        grad_z = 2 * (sae(x) - x) / len(x) @ sae.W_dec.t()
        kernel = (((pre - theta) / 0.2).abs() < 0.5).float() / 0.2
        by_hand = -(kernel * (theta * grad_z + 0.75 / len(x))).sum(0)
    assert by_hand.abs().max() > 0
    torch.testing.assert_close(sae.get_parameter("threshold").grad, by_hand, rtol=1e-4, atol=1e-6)


def test_jumprelu_threshold_is_kept_at_or_above_zero():
    sae = random_sae("jumprelu")
    threshold = sae.get_parameter("threshold")
    with torch.no_grad():
        threshold[:3] = -1.0
    untouched = threshold[3:].clone()
    sae.apply_constraints()
    assert (threshold[:3] == 0).all()
    assert torch.equal(threshold[3:], untouched)


def test_topk_keeps_at_most_k_features_and_no_negative_values(golden):
    sae = random_sae("topk")
    with torch.no_grad():
        sae.b_enc.sub_(1.5)  # so that some of the k largest are negative
    z = sae.encode(golden["activations"])
    pre = sae.pre_activations(golden["activations"])
    active = (z > 0).sum(1)
    assert active.max() <= K and active.min() < K
    assert torch.equal(active, (pre > 0).sum(1).clamp(max=K))


def test_topk_auxiliary_loss_scales_with_the_number_of_dead_features(golden):
    sae = random_sae("topk")
    dead_mask = torch.zeros(D_SAE, dtype=torch.bool)
    dead_mask[[3, 17]] = True
    x = golden["training.batch"]
    auxiliary = sae.objective(x, dead_mask).terms["auxiliary"]
    pre = sae.pre_activations(x)
    error = x - sae(x)
    by_hand = (pre[:, [3, 17]] @ sae.W_dec[[3, 17]] - error).square().sum(1).mean() * 2 / (D_IN // 2)
    torch.testing.assert_close(auxiliary, by_hand.detach())
    assert random_sae("topk", aux_loss_coefficient=0).objective(x, dead_mask).terms["auxiliary"] == 0


def test_batch_topk_keeps_the_largest_of_the_batch_and_decodes_them(golden):
    sae = random_sae("batch_topk")
    x = golden["training.batch"]
    objective = sae.objective(x)
    pre = sae.pre_activations(x).detach()
    kept = pre >= pre.flatten().sort().values[-K * len(x)]
    assert objective.fire_counts.sum() == K * len(x)
    assert kept.sum(1).max() > K > kept.sum(1).min()  # not k of each token
    torch.testing.assert_close(objective.x_hat, (pre * kept) @ sae.W_dec.detach() + sae.b_dec.detach())


def test_batch_topk_keeps_no_negative_values(golden):
    sae = random_sae("batch_topk", k=40)
    x = golden["training.batch"]
    assert torch.equal(sae.objective(x).fire_counts, (sae.pre_activations(x) > 0).sum(0))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
    sae.backpropagate(x)  # a batch that keeps nothing
    assert sae.get_buffer("threshold") == 0


def test_batch_topk_auxiliary_loss_is_that_of_topk(golden):
    x, dead_mask = golden["training.batch"], torch.arange(D_SAE) % 4 == 0
    batch_topk, topk = random_sae("batch_topk"), random_sae("topk")
    error = (x - batch_topk.objective(x).x_hat, x - topk.objective(x).x_hat)
    pre = topk.pre_activations(x)[:, dead_mask]
    top = pre.topk(D_IN // 2)
    e_hat = torch.zeros_like(pre).scatter(1, top.indices, top.values) @ topk.W_dec[dead_mask]
    for sae, e in zip((batch_topk, topk), error, strict=True):
        torch.testing.assert_close(sae.objective(x, dead_mask).terms["auxiliary"], (e_hat - e).square().sum(1).mean().detach())


def test_batch_topk_threshold_follows_the_smallest_value_that_batches_keep(golden):
    sae = random_sae("batch_topk", threshold_rate=0.25)
    threshold, batches = 0.0, golden["training.batch"].split(64)
    for x in batches:
        sae.backpropagate(x)
        smallest = sae.pre_activations(x).flatten().sort().values[-K * len(x)].item()
        threshold += 0.25 * (smallest - threshold)
    assert sae.get_buffer("threshold").item() == pytest.approx(threshold)
    pre, threshold = sae.pre_activations(batches[-1]), threshold / (1 - 0.75 ** len(batches))  # the average over batches alone
    assert torch.equal(sae.encode(batches[-1]), pre * (pre > threshold))


def test_batch_topk_has_the_l0_of_training_after_few_batches():
    x = torch.randn(5, 400, D_IN, generator=torch.Generator().manual_seed(4))
    (sae,) = sm.train([config("batch_topk")], x, sm.TrainingConfig(learning_rate=1e-6, unit_norm_decoder=False))
    assert sae.encode(x[0]).count_nonzero() / 400 == pytest.approx(K, rel=0.05)


def test_batch_topk_is_saved_as_a_jumprelu_sae_with_its_threshold(tmp_path, golden):
    sae = random_sae("batch_topk")
    assert isinstance(sae, BatchTopKSAE)
    sae.threshold.fill_(0.4)
    sm.save_sae(sae, tmp_path)
    cfg, loaded = json.loads((tmp_path / "cfg.json").read_text()), sm.load_sae(tmp_path)
    assert cfg["architecture"] == loaded.config.architecture == "jumprelu"
    assert cfg["metadata"]["saeens_trained_as"] == sae.config.model_dump()
    assert torch.equal(loaded.get_parameter("threshold"), torch.full((D_SAE,), 0.4))
    z = loaded.encode(golden["activations"])
    assert 0 < (z > 0).float().mean() < 1
    assert torch.equal(z, sae.encode(golden["activations"]))


def test_gated_features_fire_if_their_gate_is_open(golden):
    sae = random_sae("gated")
    b_gate, b_mag, r_mag = (sae.get_parameter(name) for name in ("b_gate", "b_mag", "r_mag"))
    x = golden["activations"]
    pre = (x - sae.b_dec) @ sae.W_enc
    magnitude = ((x - sae.b_dec) @ (sae.W_enc * r_mag.exp()) + b_mag).clamp(min=0)
    torch.testing.assert_close(sae.encode(x), torch.where(pre + b_gate > 0, magnitude, 0))


def test_folding_the_input_scale_lowers_the_residual_threshold_of_matching_pursuit():
    sae = random_sae("matching_pursuit")
    sae.fold_input_scale(4.0)
    assert sae.config == config("matching_pursuit", residual_threshold=0.125)


# What every architecture does


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name not in {"gated", "matching_pursuit"}])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_b_dec_is_subtracted_from_the_input_if_configured(golden, architecture, apply_b_dec_to_input):
    sae = random_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    x = golden["activations"][:8]
    offset = sae.b_dec if apply_b_dec_to_input else 0
    torch.testing.assert_close(sae.pre_activations(x), (x - offset) @ sae.W_enc + sae.b_enc)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sae_outputs_keep_leading_dimensions(golden, architecture):
    sae = random_sae(architecture)
    x = golden["activations"]
    z = sae.encode(x.view(6, 100, D_IN))
    assert z.shape == (6, 100, D_SAE)
    torch.testing.assert_close(z.view(600, D_SAE), sae.encode(x))
    assert sae.decode(z).shape == (6, 100, D_IN)
    assert sae(x[0]).shape == (D_IN,)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_wrong_shapes_and_dtypes_are_refused(architecture):
    sae = random_sae(architecture)
    with pytest.raises(ValueError, match=r"x has shape \[4, 17\].*d_in = 16"):
        sae.encode(torch.zeros(4, 17))
    with pytest.raises(ValueError, match=r"z has shape \[4, 16\].*d_sae = 48"):
        sae.decode(torch.zeros(4, 16))
    with pytest.raises(ValueError, match=r"int64.*floating"):
        sae.encode(torch.zeros(4, 16, dtype=torch.int64))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("scale", [0.25, 0.37])
def test_folding_the_input_scale_is_the_sae_of_the_scaled_input(golden, architecture, scale):
    sae, folded = random_sae(architecture), random_sae(architecture)
    folded.fold_input_scale(scale)
    x = golden["activations"]
    rtol, atol = (0.0, 0.0) if scale == 0.25 else (1e-4, 1e-5)  # a power of two changes no rounding
    torch.testing.assert_close(folded.encode(x) * scale, sae.encode(x * scale), rtol=rtol, atol=atol)
    torch.testing.assert_close(folded(x) * scale, sae(x * scale), rtol=rtol, atol=atol)
    assert torch.equal(folded.W_dec, sae.W_dec) and torch.equal(folded.W_enc, sae.W_enc)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_initial_weights_depend_on_the_init_seed_alone(architecture):
    global_state = torch.get_rng_state()
    sae, again, other = (sm.build_sae(config(architecture, init_seed=seed, decoder_init_norm=0.3)) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(sae.W_dec, again.W_dec)
    assert not torch.isclose(sae.W_dec, other.W_dec).all(dim=1).any()
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.full((D_SAE,), 0.3))
    assert torch.equal(sae.W_enc, sae.W_dec.t())
    biases = [weight for name, weight in sae.named_parameters() if name not in {"W_enc", "W_dec", "threshold"}]
    assert all((bias == 0).all() for bias in biases)


def test_a_given_b_dec_replaces_the_zero_bias():
    b_dec = torch.arange(D_IN).float()
    assert torch.equal(sm.build_sae(config("topk"), b_dec=b_dec).b_dec, b_dec)
    with pytest.raises(ValueError, match=r"b_dec has shape \[3\]"):
        sm.build_sae(config("topk"), b_dec=torch.zeros(3))


@pytest.mark.parametrize("architecture", ["batch_topk", "jumprelu", "standard", "topk"])
def test_flops_count_two_matrix_products_for_encoding_and_decoding_and_five_for_training(architecture):
    product = 2 * D_IN * D_SAE
    assert config(architecture).inference_flops_per_token == 2 * product
    assert config(architecture).train_flops_per_token == 5 * product


def test_flops_of_gated_and_matching_pursuit_count_their_own_products():
    product = 2 * D_IN * D_SAE
    assert (config("gated").inference_flops_per_token, config("gated").train_flops_per_token) == (2 * product, 8 * product)
    pursuit = config("matching_pursuit", max_iterations=10)
    assert pursuit.inference_flops_per_token == 10 * (product + 2 * D_IN)
    assert pursuit.train_flops_per_token == 10 * (product + 12 * D_IN)


# Configurations


def test_architecture_chooses_the_configuration_class():
    assert type(config("topk")) is TopKConfig
    assert type(config("batch_topk")) is BatchTopKConfig
    for architecture in architectures():
        made = config(architecture)
        config_class = type(made)
        assert config_class.model_fields["architecture"].default == architecture
        assert type(sm.SAEConfig.model_validate(made.model_dump())) is config_class
        assert sm.SAEConfig.model_validate_json(made.model_dump_json()) == made


def test_configuration_can_be_a_field_of_another_model():
    class Experiment(BaseModel):
        sae: sm.SAEConfig

    assert Experiment.model_validate({"sae": config("topk").model_dump()}).sae == config("topk")


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"architecture": "topk", "k": 0}, "k", "greater than 0"),
        ({"architecture": "topk"}, "k", "required"),
        ({"architecture": "topk", "k": 4, "l1_coefficient": 1.0}, "l1_coefficient", "not permitted"),
        ({"architecture": "jumprelu", "bandwidth": -1}, "bandwidth", "greater than 0"),
        ({"architecture": "standard", "l1_coefficient": float("nan")}, "l1_coefficient", "finite"),
        ({"architecture": "top_k", "k": 4}, "architecture", f"one of: {', '.join(architectures())}"),
        ({"k": 4}, "architecture", "missing"),
    ],
)
def test_wrong_configurations_name_the_field_and_the_allowed_values(settings, field, message):
    with pytest.raises(ValidationError) as caught:
        sm.SAEConfig(**settings, d_in=16, d_sae=48)
    (error,) = caught.value.errors()
    assert error["loc"] == (field,)
    assert message in error["msg"]


def test_k_larger_than_d_sae_is_refused():
    for architecture in ("topk", "batch_topk"):
        with pytest.raises(ValidationError, match="k = 49 is larger than d_sae = 48"):
            config(architecture, k=49)


def test_only_some_architectures_set_their_l0_directly():
    direct = [architecture for architecture in architectures() if config(architecture).requires_l0()]
    assert {"topk", "batch_topk", "matching_pursuit"} <= set(direct)
    for architecture in direct:
        validate_l0_multiple(config(architecture))
    indirect = set(architectures()) - set(direct)
    assert {"standard", "jumprelu", "gated"} <= indirect
    for architecture in indirect:
        with pytest.raises(ValueError, match=f"{architecture}.*possible without a target with: {', '.join(direct)}"):
            validate_l0_multiple(config(architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saved_sae_loads_with_its_configuration_and_bits(tmp_path, architecture):
    sae = random_sae(architecture, init_seed=11, apply_b_dec_to_input=False)
    sm.save_sae(sae, tmp_path / "new" / "folder", metadata={"model_name": "m", "hook_name": "blocks.0.hook_resid_post"})
    loaded = sm.load_sae(tmp_path / "new" / "folder")
    sae = sae.inference_form()
    assert loaded.config == sae.config
    for name, weight in sae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)
    assert loaded.W_enc.t().is_contiguous()


@pytest.mark.parametrize("architecture", IN_GOLDEN_FOLDERS)
def test_saved_folder_has_the_files_keys_and_shapes_of_saelens(tmp_path, architecture):
    sm.save_sae(random_sae(architecture), tmp_path, metadata={"model_name": "m"})
    saelens = GOLDEN / "sae_lens" / architecture / "member_0"
    ours, theirs = (json.loads((folder / "cfg.json").read_text()) for folder in (tmp_path, saelens))
    assert ours.keys() == theirs.keys()
    assert {name: ours[name] for name in ours.keys() - {"metadata"}} == {name: theirs[name] for name in theirs.keys() - {"metadata"}}
    assert ours["metadata"]["model_name"] == "m"
    assert int(ours["metadata"]["sae_lens_version"].split(".")[0]) >= 6  # older or none: SAELens drops the metadata
    ours, theirs = (load_file(folder / "sae_weights.safetensors") for folder in (tmp_path, saelens))
    assert {name: weight.shape for name, weight in ours.items()} == {name: weight.shape for name, weight in theirs.items()}


def test_topk_rescaling_by_decoder_norm_is_folded_into_the_weights(tmp_path, golden):
    sae = random_sae("topk")
    sm.save_sae(sae, tmp_path)
    edit_cfg(tmp_path, rescale_acts_by_decoder_norm=True)
    x = golden["activations"]
    norms = sae.W_dec.norm(dim=1)
    rescaled = ((x - sae.b_dec) @ sae.W_enc + sae.b_enc) * norms
    top = rescaled.topk(K)
    z = torch.zeros_like(rescaled).scatter(1, top.indices, top.values.relu())
    loaded = sm.load_sae(tmp_path)
    torch.testing.assert_close(loaded.encode(x), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded(x), (z / norms) @ sae.W_dec + sae.b_dec, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", [{}, {"architecture": "standard"}, {"architecture": "topk"}])
@pytest.mark.parametrize("field", ["activation_fn_str", "activation_fn"])
def test_topk_folders_of_saelens_3_to_5_load_as_topk(tmp_path, golden, architecture, field):
    sae = random_sae("standard")
    save_old_folder(sae, tmp_path, **architecture, **{field: "topk", "activation_fn_kwargs": {"k": 3}, "normalize_activations": False})
    x = golden["activations"]
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    top = pre.topk(3)
    loaded = sm.load_sae(tmp_path)
    torch.testing.assert_close(loaded.encode(x), torch.zeros_like(pre).scatter(1, top.indices, top.values.relu()))
    assert loaded.config.architecture == "topk"


def test_relu_folders_of_saelens_3_to_5_load_as_they_are(tmp_path, golden):
    sae = random_sae("standard")
    save_old_folder(sae, tmp_path, activation_fn_str="relu", activation_fn_kwargs={}, apply_b_dec_to_input=False)
    x = golden["activations"]
    torch.testing.assert_close(sm.load_sae(tmp_path).encode(x), (x @ sae.W_enc + sae.b_enc).relu())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_fn_str": "tanh-relu"}, "activation function 'tanh-relu' of architecture 'standard' is not supported"),
        ({"activation_fn_str": "topk", "architecture": "gated"}, "'topk' of architecture 'gated'"),
        ({"activation_fn": ["topk"]}, "activation function"),
        ({"activation_fn_str": "topk"}, "no k"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": "three"}}, "k: Input should be a valid integer"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": 3}, "no k"),
        ({"normalize_activations": True}, "normalize_activations is 'expected_average_only_in'"),
    ],
)
def test_activation_functions_that_are_not_there_are_refused(tmp_path, fields, message):
    save_old_folder(random_sae("standard"), tmp_path, **fields)
    with pytest.raises(ValueError, match=message) as caught:
        sm.load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def save_old_folder(sae: sm.SAE, folder: Path, **fields) -> None:
    """Write a folder of SAELens 3 to 5, which has no `metadata`."""
    sm.save_sae(sae, folder)
    (folder / "cfg.json").write_text(json.dumps({"d_in": sae.config.d_in, "d_sae": sae.config.d_sae, "dtype": "torch.float32", **fields}))


def edit_cfg(folder: Path, **fields) -> None:
    file = folder / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(folder: Path, **weights: Tensor | None) -> None:
    file = folder / "sae_weights.safetensors"
    changed = load_file(file) | weights
    save_file({name: weight for name, weight in changed.items() if weight is not None}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: edit_cfg(folder, architecture="p_anneal"),
            "architecture: 'p_anneal' is unknown; one of: batch_topk, gated, jumprelu",
        ),
        (lambda folder: edit_cfg(folder, d_sae=47), r"W_dec \[48, 16\] \(expected \[47, 16\]\)"),
        (lambda folder: edit_cfg(folder, d_in="wide"), "d_in must be a positive integer, found 'wide'"),
        (lambda folder: edit_cfg(folder, k=49), "k = 49 is larger than d_sae = 48"),
        (lambda folder: edit_cfg(folder, normalize_activations="layer_norm"), "normalize_activations is 'layer_norm'"),
        (lambda folder: (folder / "cfg.json").write_text("{"), "not JSON"),
        (lambda folder: edit_weights(folder, b_enc=None), r"b_enc missing \(expected \[48\]\)"),
        (lambda folder: edit_weights(folder, scale=torch.ones(2)), r"scale \[2\] \(expected none\)"),
        (lambda folder: edit_weights(folder, b_dec=torch.full((16,), torch.nan)), "b_dec holds values that are not finite"),
        (lambda folder: (folder / "sae_weights.safetensors").write_bytes(b"\x10"), "not a whole safetensors file"),
        (lambda folder: edit_weights(folder, b_dec=torch.ones(16, dtype=torch.int8)), "b_dec is torch.int8, expected floating point"),
        (lambda folder: edit_weights(folder, b_dec=torch.ones(16, dtype=torch.complex64)), "b_dec is torch.complex64"),
        (lambda folder: edit_cfg(folder, d_in=True), "d_in must be a positive integer, found True"),
        (lambda folder: edit_cfg(folder, d_sae=10**30), "d_sae must be a positive integer"),
        (lambda folder: edit_cfg(folder, metadata="none"), "metadata and its saeens_config must be objects"),
        (lambda folder: edit_cfg(folder, metadata={"saeens_config": [1]}), "metadata and its saeens_config must be objects"),
        (lambda folder: edit_cfg(folder, metadata={"saeens_config": {"self": 1, "cls": 2}}), "self: Extra inputs"),
        (lambda folder: edit_cfg(folder, architecture=["topk"]), "architecture: .*is unknown"),
        (lambda folder: edit_cfg(folder, k=[3]), "k: Input should be a valid integer"),
        (lambda folder: edit_cfg(folder, k=float("nan")), "k: Input should be a finite number"),
        (lambda folder: (folder / "cfg.json").write_text("[" * 100_000), "not JSON"),
        (lambda folder: (folder / "cfg.json").write_text(f'{{"d_in": {"1" * 5000}}}'), "not JSON"),
        (lambda folder: (folder / "cfg.json").write_bytes(b"\xff\xfe{"), "not JSON"),
    ],
)
def test_damaged_folder_is_refused_with_a_reason(tmp_path, damage, message):
    sm.save_sae(random_sae("topk"), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        sm.load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["cfg.json", "sae_weights.safetensors"])
def test_missing_file_is_named(tmp_path, name):
    sm.save_sae(random_sae("topk"), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        sm.load_sae(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    sae = random_sae("standard")
    with torch.no_grad():
        sae.W_dec[0, 0] = torch.inf
    with pytest.raises(ValueError, match="W_dec"):
        sm.save_sae(sae, tmp_path / "sae")
    assert not (tmp_path / "sae").exists()


def test_an_architecture_is_registered_once():
    from saeens_models.architectures import register

    with pytest.raises(ValueError, match="'topk' is registered twice"):
        register(TopKConfig)(TopKSAE)


def test_topk_forward_is_decode_of_encode_where_pre_activations_are_equal():
    sae = sm.build_sae(sm.SAEConfig(architecture="topk", d_in=4, d_sae=12, k=5))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([1.0, 1.0, 2.0]).repeat(4).expand(4, 12))
        x = torch.ones(3, 4)
        assert sae.encode(x).nonzero()[:, 1].tolist() == [0, 2, 5, 8, 11] * 3
        assert torch.equal(sae.reconstruct(x).code.feature.view(3, 5).sort().values, torch.tensor([[0, 2, 5, 8, 11]] * 3))
        torch.testing.assert_close(sae(x), sae.decode(sae.encode(x)))


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read_weights(tmp_path, umask):
    before = os.umask(umask)
    try:
        sm.save_sae(random_sae("topk"), tmp_path)
    finally:
        os.umask(before)
    assert {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {
        "cfg.json": 0o666 & ~umask,
        "sae_weights.safetensors": 0o666 & ~umask,
    }


def test_a_loaded_sae_keeps_the_metadata_of_its_folder_and_new_ones_are_added(tmp_path):
    sm.save_sae(random_sae("batch_topk"), tmp_path / "a", metadata={"model_name": "m", "neuronpedia_id": "n"})
    sae = sm.load_sae(tmp_path / "a")
    sm.save_sae(sae, tmp_path / "b", metadata={"hook_layer": 3, "model_name": "other"})
    before, after = (json.loads((tmp_path / name / "cfg.json").read_text())["metadata"] for name in "ab")
    assert after == before | {"hook_layer": 3, "model_name": "other"}
    assert after["saeens_trained_as"]["architecture"] == "batch_topk"


def test_metadata_of_saelens_3_to_5_are_read(tmp_path):
    save_old_folder(random_sae("standard"), tmp_path, model_name="gpt2", hook_point="blocks.8.hook_resid_pre", context_size=128, lr=1)
    assert sm.load_sae(tmp_path).metadata == {"model_name": "gpt2", "hook_name": "blocks.8.hook_resid_pre", "context_size": 128}
