"""Layers requested together by several runs: the language model runs once for all of them."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import dagster as dg
import pytest
import torch
from tiny_experiment import LAYER, NAME, Laboratory

from saeens_pipeline.language_models.hook_checks import random_windows
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.orchestration.instance import register_layers
from saeens_pipeline.orchestration.layers import LAYERS_TAG
from saeens_pipeline.storage.names import Partition

KEY = dg.AssetKey([NAME, "activations"])


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The layers that each forward pass over tokens of the corpus reads."""
    seen: list[list[int]] = []
    activations = LanguageModel.activations

    def counted(self: LanguageModel, tokens: torch.Tensor, hook: str, layers: Collection[int]) -> dict[int, torch.Tensor]:
        if tokens.any() and not torch.equal(tokens.cpu(), random_windows(self.description)):  # not those that tell the width or test hooks
            seen.append(sorted(layers))
        return activations(self, tokens, hook, layers)

    monkeypatch.setattr(LanguageModel, "activations", counted)
    return seen


@pytest.fixture
def instance(empty: Laboratory):
    empty.materialise([f"{NAME}/tokens"], Partition())
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, NAME, [0, LAYER, 2, 99])
        yield instance


def _ask(
    instance: dg.DagsterInstance, layer: int, status: dg.DagsterRunStatus = dg.DagsterRunStatus.NOT_STARTED, key: dg.AssetKey = KEY
) -> None:
    """A run that a backfill or an automation tick has made."""
    instance.add_run(dg.DagsterRun("__ASSET_JOB", tags={"dagster/partition": str(layer)}, asset_selection=frozenset([key]), status=status))


def _materialise(
    laboratory: Laboratory, instance: dg.DagsterInstance, layer: int, tags: dict[str, str] | None = None
) -> dg.AssetMaterialization:
    result = (
        laboratory.catalogue.definitions()
        .resolve_implicit_global_asset_job_def()
        .execute_in_process(
            instance=instance,
            partition_key=str(layer),
            asset_selection=[KEY],
            tags=tags,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    )
    (event,) = result.get_asset_materialization_events()
    return event.step_materialization_data.materialization


def _made(laboratory: Laboratory) -> list[int | None]:
    declaration = laboratory.declarations()[f"{NAME}/activations"]
    return [where.layer for where in laboratory.store.partitions(declaration.address, "layer")]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.STARTED])
def test_layers_of_queued_runs_are_read_in_the_same_forward_pass(
    empty: Laboratory, instance: dg.DagsterInstance, passes: list[list[int]], status: dg.DagsterRunStatus
):
    for layer in (0, 2):
        _ask(instance, layer, status)
    _materialise(empty, instance, LAYER)
    assert _made(empty) == [0, LAYER, 2]
    assert passes
    assert all(layers == [0, LAYER, 2] for layers in passes)


def test_each_layer_has_its_own_materialisation_and_later_ones_are_cache_hits(
    empty: Laboratory, instance: dg.DagsterInstance, passes: list[list[int]]
):
    _ask(instance, 2)
    events = {LAYER: _materialise(empty, instance, LAYER)}
    n_passes = len(passes)
    events[2] = _materialise(empty, instance, 2)
    assert len(passes) == n_passes
    for layer, event in events.items():
        artefact = empty.artefact("activations", layer=layer)
        assert event.partition == str(layer)
        assert event.metadata["path"].value == str(artefact.path)
        assert event.metadata["cache_hit"].value is (layer == 2)
        norm = artefact.provenance["statistics"]["train"]["mean_norm"]
        assert event.metadata["mean norm (train)"].value == pytest.approx(norm, abs=1e-4)
    assert events[LAYER].metadata["mean norm (train)"] != events[2].metadata["mean norm (train)"]


def test_a_run_of_several_layers_reads_them_in_one_pass_and_gives_each_its_own_version(
    empty: Laboratory, instance: dg.DagsterInstance, passes: list[list[int]]
):
    """A backfill of activations is one run, with a range of layers."""
    ends = {"dagster/asset_partition_range_start": "0", "dagster/asset_partition_range_end": "2"}
    job = empty.catalogue.definitions(disk_checks=False).resolve_implicit_global_asset_job_def()
    for is_hit in (False, True):
        result = job.execute_in_process(instance=instance, asset_selection=[KEY], tags=ends)
        events = [event.step_materialization_data.materialization for event in result.get_asset_materialization_events()]
        assert [event.partition for event in events] == ["0", str(LAYER), "2"]
        for event in events:
            artefact = empty.artefact("activations", layer=int(event.partition or ""))
            assert (event.tags or {})["dagster/data_version"] == artefact.data_version
            assert event.metadata["cache_hit"].value is is_hit or event.partition != "0"
        checks = result.get_asset_check_evaluations()
        assert checks
        assert all(check.passed for check in checks)
    assert passes
    assert all(layers == [0, LAYER, 2] for layers in passes)


def test_a_registered_layer_without_a_run_is_not_cached(empty: Laboratory, instance: dg.DagsterInstance, passes: list[list[int]]):
    _materialise(empty, instance, LAYER)
    assert _made(empty) == [LAYER]


@pytest.mark.parametrize("status", [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED, dg.DagsterRunStatus.FAILURE])
def test_a_layer_of_a_finished_run_is_not_cached(empty: Laboratory, instance: dg.DagsterInstance, status: dg.DagsterRunStatus):
    _ask(instance, 2, status)
    _materialise(empty, instance, LAYER)
    assert _made(empty) == [LAYER]


def test_an_invalid_layer_of_another_run_is_left_to_that_run(empty: Laboratory, instance: dg.DagsterInstance):
    _ask(instance, 99)
    _materialise(empty, instance, LAYER)
    assert _made(empty) == [LAYER]


def test_runs_of_other_assets_request_no_layer_of_this_source(empty: Laboratory, instance: dg.DagsterInstance):
    _ask(instance, 2, key=dg.AssetKey([NAME, "eval", "stability"]))
    _materialise(empty, instance, LAYER)
    assert _made(empty) == [LAYER]


def test_a_command_requests_its_own_layers_alone(empty: Laboratory, instance: dg.DagsterInstance):
    _ask(instance, 2)
    layers: Sequence[int] = (0, LAYER)
    _materialise(empty, instance, LAYER, {LAYERS_TAG: ",".join(map(str, layers))})
    assert _made(empty) == [0, LAYER]
