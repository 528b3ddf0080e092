"""SAE folders between this project and SAELens, both ways: the same codes, the same reconstructions, the same metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens  # pyright: ignore[reportMissingImports]  # in an environment of its own: `make test-interop`
import torch
from random_weights import with_random_weights
from torch import Tensor

import saeens_models as sm
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Recipe, Store

pytestmark = pytest.mark.interop

D_IN, D_SAE, K = 16, 48, 6
OWN_FIELDS = {"standard": {"l1_coefficient": 0.3}, "topk": {"k": K}, "jumprelu": {"l0_coefficient": 0.3, "init_threshold": 0.2}}
ARCHITECTURES = sorted(OWN_FIELDS)
SCALE = 7.0  # activations of language models are far from unit norm


def activations(seed: int, n: int = 256) -> Tensor:
    """Rows around a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return SCALE * (torch.randn(n, D_IN, generator=generator) + torch.linspace(-1, 1, D_IN))


def train(architecture: str, normalised: bool) -> sm.SAE:
    """A few steps, so that no weight is at its initial value."""
    batches = [activations(seed) for seed in range(20)]
    x = torch.cat(batches)
    training = sm.TrainingConfig(
        learning_rate=1e-2,
        normalize_activations="expected_average_only_in" if normalised else "none",
        input_scale=D_IN**0.5 / float(x.norm(dim=1).mean()) if normalised else None,
        input_mean=tuple(x.mean(dim=0).tolist()),
    )
    config = sm.SAEConfig(architecture=architecture, d_in=D_IN, d_sae=D_SAE, init_seed=5, **OWN_FIELDS[architecture])
    (sae,) = sm.train([config], batches, training)
    return sae


@torch.no_grad()
def assert_same_function(ours: sm.SAE, theirs: Any) -> None:
    x = activations(seed=100)
    z = ours.encode(x)
    assert 0 < (z > 0).float().mean() < 1  # neither dead nor dense: the activation function matters
    torch.testing.assert_close(theirs.encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.decode(z), ours.decode(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)


def saelens_sae(architecture: str, **fields: Any) -> Any:
    """An SAE of SAELens with random weights."""
    shape = {"d_in": D_IN, "d_sae": D_SAE, "metadata": sae_lens.saes.sae.SAEMetadata(hook_name="blocks.1.hook_resid_post"), **fields}
    match architecture:
        case "standard":
            sae = sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**shape))
        case "topk":
            sae = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(k=K, **shape))
        case _:
            sae = sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**shape))
    return with_random_weights(sae, D_IN)


@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_computes_the_codes_and_reconstructions_of_a_saved_sae(architecture: str, normalised: bool, tmp_path: Path) -> None:
    ours = train(architecture, normalised)
    sm.save_sae(ours, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.architecture() == architecture
    assert_same_function(ours, theirs)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_saelens_folders_load_with_the_codes_of_saelens(architecture: str, apply_b_dec_to_input: bool, tmp_path: Path) -> None:
    theirs = saelens_sae(architecture, apply_b_dec_to_input=apply_b_dec_to_input)
    theirs.save_model(tmp_path)
    assert_same_function(sm.load_sae(tmp_path), theirs)


def test_topk_that_saelens_rescales_by_decoder_norms_loads_with_its_reconstructions(tmp_path: Path) -> None:
    theirs = saelens_sae("topk", rescale_acts_by_decoder_norm=True)
    theirs.save_model(tmp_path)
    assert_same_function(sm.load_sae(tmp_path), theirs)


def test_topk_that_saelens_saves_after_training_loads_with_the_codes_that_saelens_reads(tmp_path: Path) -> None:
    config = sae_lens.TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)
    with_random_weights(sae_lens.TopKTrainingSAE(config), D_IN).save_inference_model(tmp_path)
    assert_same_function(sm.load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path))


def test_members_of_a_saved_ensemble_are_folders_that_saelens_reads(tmp_path: Path) -> None:
    ensemble = sm.Boosting([train("topk", normalised=False), train("jumprelu", normalised=True)])
    sm.save_ensemble(ensemble, tmp_path)
    for j, ours in enumerate(ensemble, start=1):
        assert_same_function(ours, sae_lens.SAE.load_from_disk(tmp_path / f"member_{j}"))


def test_saelens_reads_an_artefact_of_the_pipeline(tmp_path: Path) -> None:
    store, address, partition = Store(tmp_path), Address("quickstart", "bagging", "member_1"), Partition(layer=1, seed=42)
    ours = train("topk", normalised=True)
    with store.write_folder(address, partition, Recipe("sae", 1, {}), {"seconds": 1.0}) as folder:
        sm.save_sae(ours, folder)
        (folder / "training_curve.parquet").write_bytes(b"what else the pipeline keeps there")
    assert_same_function(ours, sae_lens.SAE.load_from_disk(store.require(address, partition).path))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_metadata_and_configuration_survive_a_round_trip_through_saelens(architecture: str, tmp_path: Path) -> None:
    ours = train(architecture, normalised=False)
    sm.save_sae(ours, tmp_path / "ours", metadata={"model_name": "pythia-160m", "hook_name": "blocks.8.hook_resid_post"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert (theirs.cfg.metadata.model_name, theirs.cfg.metadata.hook_name) == ("pythia-160m", "blocks.8.hook_resid_post")
    theirs.save_model(tmp_path / "theirs")
    before, after = (json.loads((tmp_path / name / "cfg.json").read_text())["metadata"] for name in ("ours", "theirs"))
    assert after == before
    assert sm.load_sae(tmp_path / "theirs").config == ours.config
