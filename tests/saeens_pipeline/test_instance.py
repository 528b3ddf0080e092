"""The Dagster instance: its folder, its settings, and its records of runs of the command line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin
from dagster._core.storage.tags import GRPC_INFO_TAG
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from privileges import read_only
from tiny_experiment import LAYER, MEMBERS, NAME, SEEDS, Laboratory

import saeens_pipeline
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration import instance as instance_module
from saeens_pipeline.orchestration import runs as runs_module
from saeens_pipeline.orchestration.instance import (
    PROCESS_TAG,
    command_line_instance,
    end_dead_runs,
    home_folder,
    instance_settings,
    prepare_home,
    process_tag,
    recorded,
    recorded_instance,
    register_layers,
    replace_damaged_database,
    servers_prefix,
)
from saeens_pipeline.storage.recipes import start_of, this_machine

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


@pytest.fixture(scope="module")
def home_with_a_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder whose database has layer 2 of the quickstart; for copies."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DAGSTER_HOME", str(home := tmp_path_factory.mktemp("homes") / "home"))
        assert _layers(2) == ["2"]
    return home


@pytest.fixture
def home(home_with_a_layer: Path) -> Path:
    """A copy at the place where it is looked for."""
    shutil.copytree(home_with_a_layer, home_folder())
    return prepare_home()


DATABASES = ["history/runs.db", "history/runs/index.db", "schedules/schedules.db"]


def _layers(*added: int) -> list[str]:
    """The layers of a source in the database, after these were added."""
    with command_line_instance() as instance:
        if added:
            register_layers(instance, "quickstart", added)
        return list(instance.get_dynamic_partitions("quickstart_layers"))


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "overwritten"])
@pytest.mark.parametrize("name", DATABASES)
def test_a_damaged_database_is_named_with_a_remedy(home: Path, name: str, damage: str):
    storage = home / "storage"
    whole = (storage / name).read_bytes()
    half = whole[: len(whole) // 2]
    damaged = {"text": b"not a database" * 100, "empty": b"", "cut": half, "overwritten": whole[:4096] + b"\7" * (len(whole) - 4096)}
    (storage / name).write_bytes(damaged[damage])
    with (
        pytest.raises(SaeensError, match=rf"{storage / name} is damaged .*: move {storage} away.*artefacts are not") as caught,
        command_line_instance() as instance,
    ):
        instance.get_runs()
        instance.get_dynamic_partitions("quickstart_layers")
        instance.all_instigator_state()
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_database_is_created_again(home: Path):
    (home / "storage").rename(home / "away")
    assert _layers() == []


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[", b"a: b: c", b"storage: 5", b"- 1", b"nonsense: {}", b"run_monitoring: 2024-13-01"], ids=repr
)
def test_a_damaged_dagster_yaml_is_named_with_a_remedy(home: Path, content: bytes):
    settings = home / "dagster.yaml"
    settings.write_bytes(content)
    with pytest.raises(SaeensError, match=rf"{settings} is wrong \(.*\): correct it, or remove it") as caught, command_line_instance():
        pass
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 700
    settings.unlink()
    prepare_home()
    assert settings.read_text() == instance_settings(home.as_posix())


def test_an_empty_dagster_yaml_is_written_again(home: Path):
    settings = home / "dagster.yaml"
    content = settings.read_text()
    settings.write_text("")  # a killed process of an earlier version
    prepare_home()
    assert settings.read_text() == content


@pytest.mark.parametrize("name", DATABASES)
def test_an_unfinished_database_of_an_interrupted_start_is_created_again(home: Path, name: str):
    (home / ".database_is_set_up").unlink()
    (home / "storage" / name).write_bytes(b"")
    assert _layers(3) == ["3"]
    assert (home / "storage.unfinished" / name).exists()
    assert _layers() == ["3"]


def test_an_interruption_leaves_no_database_under_its_name(monkeypatch: pytest.MonkeyPatch):
    made = dg.DagsterInstance.from_config

    def interrupted(*arguments: str) -> dg.DagsterInstance:
        made(*arguments).dispose()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dg.DagsterInstance, "from_config", interrupted)
        prepare_home()
    assert not (home_folder() / "storage").exists()
    assert _layers(1) == ["1"]
    assert not (home_folder() / "storage.new").exists()


def test_a_database_created_by_other_programs_is_kept(home: Path):
    (home / ".database_is_set_up").unlink()  # `dagster dev` writes no mark
    assert _layers() == ["2"]


@pytest.mark.parametrize("damage", ["empty", "overwritten"])
@pytest.mark.parametrize("name", DATABASES)
def test_a_damaged_database_stops_no_command(home: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture):
    file = home / "storage" / name
    whole = file.read_bytes()
    broken = {"empty": b"", "overwritten": whole[:4096] + b"\7" * (len(whole) - 4096)}[damage]
    file.write_bytes(broken)

    def read(instance: dg.DagsterInstance) -> str:
        instance.get_runs()
        instance.all_instigator_state()
        return str(instance.get_dynamic_partitions("quickstart_layers"))

    assert recorded(read, "none") == "none"  # commands that read
    assert f"records are left out: {file} is damaged" in caplog.text
    assert file.read_bytes() == broken
    replace_damaged_database()  # commands that compute
    assert f"{file} was damaged" in caplog.text
    assert _layers(3) == ["3"]
    assert (home / "storage.damaged" / name).read_bytes() == broken


def test_a_whole_database_and_settings_of_the_users_own_are_not_replaced(home: Path):
    replace_damaged_database()
    assert _layers() == ["2"]
    (home / "storage/history/runs.db").write_bytes(b"")
    (home / "dagster.yaml").write_text("telemetry: {enabled: true}\n")
    replace_damaged_database()
    assert (home / "storage/history/runs.db").read_bytes() == b""


def _times(folder: Path) -> dict[Path, int]:
    """When its files were written, without those that SQLite shares among readers."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*") if not file.name.endswith(("-shm", "-wal")) and file.is_file()}


def test_a_folder_that_cannot_be_written_is_read(home: Path):
    (home / "command_line.yaml").unlink()
    before = _times(home)
    with read_only(home), recorded_instance() as instance:
        assert instance
        assert instance.get_dynamic_partitions("quickstart_layers") == ["2"]
        assert instance.get_runs() == []
    assert _times(home) == before


def test_layers_are_registered_once_and_in_numeric_order():
    with dg.DagsterInstance.ephemeral() as instance:
        register_layers(instance, "quickstart", [10, 2])
        register_layers(instance, "quickstart", [2, 8, 10])
        assert instance.get_dynamic_partitions("quickstart_layers") == ["2", "10", "8"]
        register_layers(instance, "other", [1])
        assert instance.get_dynamic_partitions("other_layers") == ["1"]


@dg.op
def nothing() -> None: ...


@dg.job
def job() -> None:
    nothing()


def _gone() -> int:
    """The number of a process that has ended, and of no process group."""
    gone = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    gone.wait()
    return gone.pid


@pytest.fixture
def alive() -> Iterator[int]:
    """The number of a process that runs, the leader of a process group."""
    with subprocess.Popen(["sleep", "600"], start_new_session=True) as process:
        yield process.pid
        process.kill()


def _origin(location: str) -> RemoteJobOrigin:
    target = LoadableTargetOrigin(module_name="a_module")
    return RemoteJobOrigin(RemoteRepositoryOrigin(ManagedGrpcPythonEnvCodeLocationOrigin(target, location), "a_repository"), "a_job")


def _ended(runs: Mapping[str, tuple[dict[str, str], str | None]]) -> set[str]:
    """The runs, given by tags and code location, that are cancelled as dead."""
    with dg.DagsterInstance.ephemeral() as instance:
        made = {
            name: instance.create_run_for_job(
                job, status=dg.DagsterRunStatus.STARTED, tags=tags, remote_job_origin=_origin(location) if location else None
            )
            for name, (tags, location) in runs.items()
        }
        end_dead_runs(instance)
        states = {name: (instance.get_run_by_id(run.run_id) or run).status for name, run in made.items()}
    assert set(states.values()) <= {dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELED}
    return {name for name, status in states.items() if status == dg.DagsterRunStatus.CANCELED}


def test_only_runs_of_killed_processes_are_cancelled():
    gone, machine = _gone(), this_machine()
    owners = {
        "gone": f"{machine}:{gone}",
        "here": process_tag()[PROCESS_TAG],
        "here, with an unknown start": f"{machine}:{os.getpid()}@",
        "before its number was used again": f"{machine}:{os.getpid()}@{int(start_of(os.getpid())) - 1}",
        "elsewhere": f"not-{machine}:{gone}",
        "before the machine started": f"{'0' * 8}:{gone}",
        "of an earlier version": f"{socket.gethostname()}:{gone}",
        "of nobody": f"{machine}:nobody",
    }
    runs: dict[str, tuple[dict[str, str], str | None]] = {name: ({PROCESS_TAG: owner}, None) for name, owner in owners.items()}
    assert _ended(runs | {"without a tag": ({}, None)}) == {"gone", "before its number was used again"}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_start_of_a_process_is_the_one_that_the_kernel_counts():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    with subprocess.Popen(["sleep", "600"]) as process:
        after, ticks = time.clock_gettime(time.CLOCK_BOOTTIME), os.sysconf("SC_CLK_TCK")
        found = start_of(process.pid)
        process.kill()
    assert before - 1 / ticks <= int(found) / ticks <= after
    assert start_of(process.pid) == ""


def test_only_runs_of_a_missing_ui_are_cancelled(alive: int):
    """None of the sockets can be seen from here, as in a container or with a temporary folder of one's own."""
    gone, machine = _gone(), this_machine()
    sockets = {
        "gone": f"/tmp/saeens-{machine}-{gone}-abc/tmp1",
        "alive": f"/tmp/saeens-{machine}-{alive}-abc/tmp1",
        "elsewhere": f"/tmp/saeens-{'0' * 8}-{gone}-abc/tmp1",
        "before its number was used again": f"/tmp/saeens-{machine}-{alive}-{int(start_of(alive)) - 1}-abc/tmp1",
        "with its start": f"/tmp/saeens-{machine}-{alive}-{start_of(alive)}-abc/tmp1",
        "of `dagster dev`": "/tmp/tmp1",
    }
    runs = {name: ({GRPC_INFO_TAG: json.dumps({"host": "localhost", "socket": each})}, "saeens") for name, each in sockets.items()}
    runs["of another code location"] = (runs["gone"][0], "another")
    dead_command_line = process_tag()[PROCESS_TAG].replace(f":{os.getpid()}", f":{gone}")
    runs["executed again in the UI"] = (runs["alive"][0] | {PROCESS_TAG: dead_command_line}, "saeens")
    runs["of a server with a port"] = ({GRPC_INFO_TAG: json.dumps({"host": "localhost", "port": 4000})}, "saeens")
    assert _ended(runs) == {"gone", "before its number was used again"}


def test_the_folder_of_the_code_servers_names_its_processes():
    match = re.fullmatch(r"saeens-([0-9a-f]{8})-(\d+)-(\d+)-", servers_prefix())
    assert match
    assert (match[1], int(match[2]), match[3]) == (this_machine(), os.getpid(), start_of(os.getpid()))


def test_a_run_with_nothing_to_do_cancels_killed_runs(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    owner = process_tag()[PROCESS_TAG].replace(f":{os.getpid()}", f":{gone.pid}")
    with dg.DagsterInstance.ephemeral() as instance:
        job = finished.catalogue.definitions().resolve_implicit_global_asset_job_def()
        run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED, tags={PROCESS_TAG: owner})
        monkeypatch.setattr(instance_module, "recorded_instance", lambda: contextlib.nullcontext(instance))
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


def test_runs_for_reports_are_tagged_with_their_command(finished: Laboratory, monkeypatch: pytest.MonkeyPatch):
    with dg.DagsterInstance.ephemeral() as instance:
        monkeypatch.setattr(runs_module, "command_line_instance", lambda: contextlib.nullcontext(instance))
        runs_module.make_reports(finished.catalogue, NAME, [])
        assert {run.tags["user"] for run in instance.get_runs()} == {"saeens report"}
