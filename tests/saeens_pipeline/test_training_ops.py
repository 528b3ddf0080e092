"""Ops that train SAEs: observations during training, and smaller groups if memory is short."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import dagster as dg
import numpy as np
import pytest
import torch
import zarr
from tiny_experiment import LAYER, NAME, SEEDS, Laboratory

import saeens_models as sm
from saeens_pipeline.assets import memory, training
from saeens_pipeline.storage.names import Partition

SEED = SEEDS[0]
MEMBERS = [f"{NAME}/bagging/member_{j}" for j in (1, 2, 3)]


@pytest.fixture
def untrained(finished: Laboratory) -> Laboratory:
    """Activations are there and no SAE is."""
    shutil.rmtree(finished.root / "experiments")
    return finished


def _weights(laboratory: Laboratory) -> list[dict[str, torch.Tensor]]:
    return [sm.load_sae(laboratory.artefact(f"bagging/member_{j}", SEED).path).state_dict() for j in (1, 2, 3)]


def test_members_that_exceed_memory_are_trained_in_smaller_groups(
    untrained: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    train, together = sm.train, []

    def on_a_small_device(configs: Any, *arguments: Any, **options: Any) -> Any:
        together.append(len(configs))
        if len(configs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(configs, *arguments, **options)

    monkeypatch.setattr(sm, "train", on_a_small_device)
    events = untrained.materialise(MEMBERS, Partition(LAYER, SEED))
    assert together == [3, 2, 1]
    for ours, theirs in zip(_weights(untrained), _weights(finished_laboratory), strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    assert events[MEMBERS[0]].metadata["out of memory with"].value == "3 SAEs at once, whole batches"
    assert untrained.artefact("bagging/member_3", SEED).provenance["trained_together"] == 1


def test_one_sae_that_does_not_fit_is_trained_in_micro_batches_with_a_log_message(
    untrained: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(memory, "FEWEST_TOKENS", 8)
    train = sm.train

    def on_a_small_device(configs: Any, *arguments: Any, micro_batch_tokens: int | None, **options: Any) -> Any:
        if len(configs) > 1 or micro_batch_tokens is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train(configs, *arguments, micro_batch_tokens=micro_batch_tokens, **options)

    monkeypatch.setattr(sm, "train", on_a_small_device)
    events = untrained.materialise(MEMBERS[:1], Partition(LAYER, SEED))
    batch_tokens = untrained.catalogue.experiments[NAME].training["batch_tokens"]
    assert events[MEMBERS[0]].metadata["micro-batch [tokens]"].value == batch_tokens // 2
    ours, theirs = (laboratory.artefact("bagging/member_1", SEED).path for laboratory in (untrained, finished_laboratory))
    for name, weight in sm.load_sae(ours).state_dict().items():
        torch.testing.assert_close(weight, sm.load_sae(theirs).state_dict()[name], rtol=1e-2, atol=1e-3)


def test_the_memory_budget_of_the_environment_limits_the_first_group(
    untrained: Laboratory, finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch
):
    config = sm.load_sae(finished_laboratory.artefact("bagging/member_1", SEED).path).config
    batch_tokens = untrained.catalogue.experiments[NAME].training["batch_tokens"]
    of_one = 16 * (2 * config.d_in * config.d_sae + 2 * config.d_sae + config.d_in) + 4 * batch_tokens * (config.d_sae + 8 * config.d_in)
    train, together = sm.train, []
    monkeypatch.setattr(sm, "train", lambda configs, *a, **o: (together.append(len(configs)), train(configs, *a, **o))[1])
    monkeypatch.setenv("SAEENS_MEMORY_GB", str(1.5 * of_one / 1e9))
    untrained.materialise(MEMBERS, Partition(LAYER, SEED))
    assert together == [1, 1, 1]


def test_a_long_training_logs_a_few_asset_observations(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "INTERVAL_SECONDS", 0)
    observed: list[dg.AssetObservation] = []
    log_event = dg.AssetExecutionContext.log_event
    monkeypatch.setattr(dg.AssetExecutionContext, "log_event", lambda self, event: (observed.append(event), log_event(self, event)))
    untrained.materialise(MEMBERS[:2], Partition(LAYER, SEED))
    per_sae = Counter(each.asset_key.to_user_string() for each in observed)
    assert set(per_sae) == set(MEMBERS[:2])
    assert all(2 <= n <= training.MOST_OBSERVATIONS for n in per_sae.values())
    first, tokens = observed[0], [each.metadata["tokens"].value for each in observed]
    assert first.partition == dg.MultiPartitionKey({"layer": str(LAYER), "seed": str(SEED)})
    assert set(first.metadata) == {"tokens", "loss", "explained variance", "L0 [features per token]", "dead features", "learning rate"}
    assert tokens == sorted(tokens, key=lambda value: int(str(value)))
    assert tokens[0] != tokens[-1]


def test_a_short_training_logs_no_asset_observations(untrained: Laboratory, monkeypatch: pytest.MonkeyPatch):
    observed: list[Any] = []
    monkeypatch.setattr(dg.AssetExecutionContext, "log_event", lambda self, event: observed.append(event))
    untrained.materialise(MEMBERS[:1], Partition(LAYER, SEED))
    assert observed == []


def test_the_model_name_in_an_saes_folder_is_a_string_as_saelens_uses_it(finished_laboratory: Laboratory):
    metadata = sm.load_sae(finished_laboratory.artefact("bagging/member_1", SEED).path).metadata
    assert metadata["model_name"] == str(finished_laboratory.model)
    assert metadata["model_name"] == metadata["language_model"]["name"]
    assert "sha256" in metadata["language_model"]


@pytest.mark.parametrize("boosting_scale", ["shared", "per_round"])
def test_rounds_are_trained_in_the_scale_of_the_activations_or_each_in_its_own(
    untrained: Laboratory, monkeypatch: pytest.MonkeyPatch, boosting_scale: str
):
    untrained.declare(ensemble={"members": 3, "seeds": SEEDS, "boosting_scale": boosting_scale}, keep_residuals="all")
    train, scales = sm.train, []

    def recorded(configs: Any, batches: Any, training: sm.TrainingConfig, *arguments: Any, **options: Any) -> Any:
        scales.append(training.input_scale)
        return train(configs, batches, training, *arguments, **options)

    monkeypatch.setattr(sm, "train", recorded)
    untrained.materialise([f"{NAME}/boosting/{key}" for key in ("round_1", "residual_1", "round_2")], Partition(LAYER, SEED))
    folders = [untrained.root / f"sources/{NAME}/layer={LAYER}/activations.zarr", untrained.artefact("boosting/residual_1", SEED).path]
    rows = [np.asarray(zarr.open_array(folder / "train" / "activations", mode="r")[:], np.float64) for folder in folders]
    own = [each.shape[1] ** 0.5 / np.linalg.norm(each, axis=1).mean() for each in rows]
    assert own[1] > 1.1 * own[0]
    assert scales == pytest.approx([own[0], own[0] if boosting_scale == "shared" else own[1]], rel=1e-4)


def test_only_later_rounds_of_scaled_inputs_have_the_boosting_scale_in_their_recipes(finished_laboratory: Laboratory):
    scales = {
        key: finished_laboratory.artefact(key, SEED).recipe["settings"].get("boosting_scale")
        for key in ("bagging/member_2", "boosting/round_1", "boosting/round_2", "boosting/round_3")
    }
    assert scales == {"bagging/member_2": None, "boosting/round_1": None, "boosting/round_2": "shared", "boosting/round_3": "shared"}
