"""The Dagster instance: its folder, its settings, and its records of runs of the command line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import dagster as dg
import pytest
import yaml
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory

import saeens_pipeline
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration import runs as runs_module
from saeens_pipeline.orchestration.instance import PROCESS_TAG, end_dead_runs, instance_settings, prepare_home, process_tag, register_layers

CHECKOUT = Path(saeens_pipeline.__file__).parents[1]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAEENS_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DAGSTER_HOME", "")


def test_a_plain_dagster_dev_has_the_instance_settings_of_saeens():
    assert (CHECKOUT / "dagster.yaml").read_text() == instance_settings("data/dagster")


def test_dagster_home_is_below_the_data_root_by_default(tmp_path: Path):
    home = prepare_home()
    assert home == tmp_path / "data" / "dagster"
    assert os.environ["DAGSTER_HOME"] == str(home)
    settings = yaml.safe_load((home / "dagster.yaml").read_text())
    assert settings["storage"]["sqlite"]["base_dir"] == f"{home}/storage"
    assert settings["telemetry"] == {"enabled": False}
    assert settings["run_retries"] == {"enabled": True, "max_retries": 2, "retry_on_asset_or_op_failure": False}
    assert settings["concurrency"]["pools"] == {"default_limit": 1, "granularity": "op"}


def test_a_given_dagster_home_is_used_and_its_settings_are_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_text("telemetry: {enabled: true}\n")
    assert prepare_home() == tmp_path / "home"
    assert (tmp_path / "home" / "dagster.yaml").read_text() == "telemetry: {enabled: true}\n"
    assert not (tmp_path / "data").exists()


def test_a_copied_dagster_home_uses_its_own_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "first"))
    shutil.copytree(prepare_home(), tmp_path / "odd: #copy")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "odd: #copy"))
    settings = yaml.safe_load((prepare_home() / "dagster.yaml").read_text())
    assert settings["storage"]["sqlite"]["base_dir"] == f"{tmp_path}/odd: #copy/storage"
    assert settings["compute_logs"]["config"]["base_dir"] == f"{tmp_path}/odd: #copy/compute_logs"


def test_a_read_only_dagster_home_is_reported_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(SaeensError, match=r"home cannot be written .*DAGSTER_HOME or SAEENS_DATA"):
        prepare_home()


def test_layers_are_registered_once_and_in_numeric_order():
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, "quickstart", [10, 2])
        register_layers(instance, "quickstart", [2, 8, 10])
        assert instance.get_dynamic_partitions("quickstart_layers") == ["2", "10", "8"]
        register_layers(instance, "other", [1])
        assert instance.get_dynamic_partitions("other_layers") == ["1"]


def test_only_runs_of_killed_processes_are_cancelled():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = process_tag()[PROCESS_TAG].rpartition(":")[0]
    owners = {"gone": f"{host}:{gone.pid}", "here": process_tag()[PROCESS_TAG], "elsewhere": f"not-{host}:{gone.pid}"}

    @dg.op
    def nothing() -> None: ...

    @dg.job
    def job() -> None:
        nothing()

    with dg.DagsterInstance.ephemeral() as instance:
        runs = {
            name: instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: owner})
            for name, owner in owners.items()
        }
        runs["of the UI"] = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
        end_dead_runs(instance)
        states = {name: (instance.get_run_by_id(run.run_id) or run).status for name, run in runs.items()}
    started = dict.fromkeys(("here", "elsewhere", "of the UI"), dg.DagsterRunStatus.STARTED)
    assert states == {"gone": dg.DagsterRunStatus.CANCELED} | started


def test_only_runs_of_missing_code_servers_are_cancelled():
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def job() -> None:
        nothing()

    with dg.DagsterInstance.ephemeral() as instance, tempfile.TemporaryDirectory() as short, socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{short}/there")
        server.listen()
        places = {"there": {"socket": f"{short}/there"}, "gone": {"socket": f"{short}/gone"}, "elsewhere": {"port": 4000}}
        runs = {
            name: instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags={".dagster/grpc_info": json.dumps(place)})
            for name, place in places.items()
        }
        end_dead_runs(instance)
        states = {name: (instance.get_run_by_id(run.run_id) or run).status for name, run in runs.items()}
    started = dict.fromkeys(("there", "elsewhere"), dg.DagsterRunStatus.STARTED)
    assert states == {"gone": dg.DagsterRunStatus.CANCELED} | started


def test_a_run_with_nothing_to_do_cancels_killed_runs(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = process_tag()[PROCESS_TAG].replace(f":{os.getpid()}", f":{gone.pid}")
    with dg.DagsterInstance.ephemeral() as instance:
        job = finished.catalogue.definitions().resolve_implicit_global_asset_job_def()
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: owner})
        monkeypatch.setattr(runs_module, "recorded_instance", lambda: contextlib.nullcontext(instance))
        assert "nothing to do" in finished.run()
        ended = instance.get_run_by_id(run.run_id)
    assert ended is not None
    assert ended.status == dg.DagsterRunStatus.CANCELED


def test_runs_of_the_command_line_are_recorded_by_dagster(finished_laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DAGSTER_HOME", str(finished_laboratory.root / "dagster"))
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs()
        assert len(runs) == 4 + len(SEEDS)  # tokens, activations, each seed, tables that compare seeds, the page over all experiments
        assert {run.status for run in runs} == {dg.DagsterRunStatus.SUCCESS}
        assert {run.tags["user"] for run in runs} == {"saeens run"}
        assert instance.get_dynamic_partitions(f"{NAME}_layers") == [str(LAYER)]
        key = dg.AssetKey([NAME, "boosting", f"round_{MEMBERS}"])
        records = instance.fetch_materializations(key, limit=10).records
        seen = {record.partition_key: record.asset_materialization for record in records}
    assert seen.keys() == {dg.MultiPartitionKey({"layer": str(LAYER), "seed": str(seed)}) for seed in SEEDS}
    for seed in SEEDS:
        materialisation = seen[dg.MultiPartitionKey({"layer": str(LAYER), "seed": str(seed)})]
        assert materialisation is not None
        assert materialisation.tags is not None
        assert materialisation.tags["dagster/data_version"] == finished_laboratory.artefact(f"boosting/round_{MEMBERS}", seed).data_version
        assert materialisation.metadata["cache_hit"].value is False


@pytest.mark.slow
def test_concurrent_processes_create_one_database_that_all_can_open(tmp_path: Path):
    script = (
        "from saeens_pipeline.orchestration.instance import command_line_instance\n"
        "with command_line_instance() as i: print(len(i.get_runs()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DAGSTER_HOME"} | {"SAEENS_DATA": str(tmp_path)}
    at_once = [
        subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in at_once] == ["0"] * 3
