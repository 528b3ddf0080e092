"""The device of a run in the launchpad: enumerations and limits, refused before the run starts; offered by every job."""

from __future__ import annotations

from typing import Any

import dagster as dg
import pytest
from tiny_experiment import NAME, Laboratory

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.instance import declare_layers
from saeens_pipeline.orchestration.resources import ComputeResource
from saeens_pipeline.orchestration.retraining import Mark, due_requests


def _config(**compute: Any) -> dict[str, Any]:
    return {"resources": {"compute": {"config": compute}}}


@pytest.fixture(params=["assets", "retraining"])
def job(empty: Laboratory, request: pytest.FixtureRequest) -> dg.JobDefinition:
    definitions = empty.catalogue.definitions()
    if request.param == "assets":
        return definitions.resolve_implicit_global_asset_job_def()
    return definitions.resolve_job_def(NAME)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:0", "cuda:15"])
def test_devices_of_every_machine_are_accepted(job: dg.JobDefinition, device: str):
    resolved = dg.validate_run_config(job, _config(device=device, precision="tf32", memory_gb=0.5, threads=1024))
    chosen = {"device": device, "precision": "tf32", "memory_gb": 0.5, "threads": 1024}
    assert resolved["resources"]["compute"] == {"config": chosen}  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]


@pytest.mark.parametrize(("field", "value"), [("device", "gpu"), ("device", "cuda:16"), ("precision", "float16"), ("threads", "two")])
def test_other_values_are_refused_by_the_schema_that_the_launchpad_has(job: dg.JobDefinition, field: str, value: Any):
    with pytest.raises(dg.DagsterInvalidConfigError, match=field):
        dg.validate_run_config(job, _config(**{field: value}))


@pytest.mark.parametrize(("field", "value"), [("threads", -1), ("threads", 1025), ("memory_gb", -0.1), ("memory_gb", 10_001.0)])
def test_numbers_out_of_their_limits_are_refused_before_the_run_starts(job: dg.JobDefinition, field: str, value: Any):
    with dg.DagsterInstance.ephemeral() as instance:
        with pytest.raises(dg.DagsterConfigMappingFunctionError) as refused:
            job.execute_in_process(instance=instance, run_config=_config(**{field: value}), raise_on_error=False)
        assert instance.get_runs() == []
    assert isinstance(refused.value.__cause__, ConfigurationError)
    assert f"compute: {field}: {value}, input should be" in str(refused.value.__cause__)


def test_the_device_and_limits_of_a_run_are_those_of_its_configuration(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_THREADS", "2")
    job = empty.catalogue.definitions().resolve_implicit_global_asset_job_def()
    assert dg.validate_run_config(job)["resources"]["compute"]["config"]["threads"] == 2  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    with dg.DagsterInstance.ephemeral() as instance:
        job.execute_in_process(
            instance=instance, asset_selection=[dg.AssetKey([NAME, "tokens"])], run_config=_config(device="cpu", threads=3)
        )
    assert ", 3 threads)" in empty.artefact("tokens", layer=None).provenance["device"]


def test_the_environment_has_its_own_errors(empty: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SAEENS_DEVICE", "cuda:3")
    assert ComputeResource.from_environment().compute.device == "cuda:3"
    monkeypatch.setenv("SAEENS_DEVICE", "gpu")
    with pytest.raises(ConfigurationError, match="SAEENS_DEVICE is 'gpu'; it can be auto, cpu, mps, cuda, or cuda:0 to cuda:15"):
        empty.catalogue.definitions()


def test_the_runs_of_a_retraining_have_the_device_that_was_chosen_for_its_job(empty: Laboratory):
    catalogue, chosen = empty.catalogue, _config(device="cpu", threads=1)
    experiment = catalogue.experiment(NAME)
    with dg.DagsterInstance.ephemeral() as instance:
        declare_layers(instance, NAME, catalogue.source(NAME).layers)
        job = catalogue.definitions().resolve_job_def(NAME)
        for run_config, expected in ((chosen, chosen), ({}, {})):
            job.execute_in_process(instance=instance, run_config=run_config)
            (mark,) = instance.get_dynamic_partitions(f"{NAME}/retraining")
            requests = due_requests(catalogue, experiment, instance, [Mark.read(mark)]).requests
            assert requests
            assert all(request.run_config == expected for request in requests)
            instance.delete_dynamic_partition(f"{NAME}/retraining", mark)
            instance.wipe()
