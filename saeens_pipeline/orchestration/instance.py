"""The Dagster instance: where runs and events are kept, and which layers of a source it knows."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.orchestration.dagster_internals import LOCAL_COMPUTE_LOGS, NO_COMPUTE_LOGS
from saeens_pipeline.storage.locks import holding_one_of
from saeens_pipeline.storage.recipes import is_alive
from saeens_pipeline.storage.root import data_root

if TYPE_CHECKING:
    from dagster import DagsterInstance

_COMMAND_LINE_FILE = "command_line.yaml"
_DATABASE_MARK = ".database_is_set_up"
PROCESS_TAG = "saeens/process"
_SERVER_TAG = ".dagster/grpc_info"  # by Dagster, on a run that it launched: where its code server listens

_SETTINGS = """\
# Where Dagster keeps runs and events, one op at a time on the GPU, runs tried again whose process was killed, and no telemetry.
# `saeens` writes this file into DAGSTER_HOME; the one beside workspace.yaml serves a plain `dagster dev -w workspace.yaml`.
storage:
  sqlite:
    base_dir: {storage}
compute_logs:
  module: {compute_log_module}
  class: LocalComputeLogManager
  config:
    base_dir: {compute_logs}
concurrency:
  pools:
    default_limit: 1
    granularity: op
run_monitoring:
  enabled: true
  free_slots_after_run_end_seconds: 60
run_retries:
  enabled: true
  max_retries: 2
  retry_on_asset_or_op_failure: false
telemetry:
  enabled: false
nux:
  enabled: false
"""
WORKSPACE = """\
load_from:
  - python_module:
      module_name: saeens_pipeline.definitions
      location_name: saeens
"""


def instance_settings(home: str) -> str:
    """The content of `dagster.yaml` for an instance that lies in `home`."""
    return _SETTINGS.format(
        storage=json.dumps(f"{home}/storage"), compute_logs=json.dumps(f"{home}/compute_logs"), compute_log_module=LOCAL_COMPUTE_LOGS
    )


def home_folder() -> Path:
    """DAGSTER_HOME, or `dagster` below the data root where it is not set."""
    return Path(os.environ.get("DAGSTER_HOME") or data_root() / "dagster").absolute()


def prepare_home() -> Path:
    """DAGSTER_HOME, or `dagster` below the data root where it is not set: made and set up where it is not there yet.

    The environment variable is set for this process and its children. Files that are there are left as they are, unless the folder was
    copied or moved: settings of ours that name another one are made anew.
    """
    home = home_folder()
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name, content in (("dagster.yaml", instance_settings(home.as_posix())), ("workspace.yaml", WORKSPACE)):
            file = home / name
            if not file.exists() or (name == "dagster.yaml" and _is_ours(file.read_text())):
                file.write_text(content)
    except OSError as error:
        raise SaeensError(
            f"{home} cannot be written ({error.strerror}): set DAGSTER_HOME or SAEENS_DATA to a folder that can be"
        ) from error
    os.environ["DAGSTER_HOME"] = str(home)
    _set_up_database(home)
    return home


def _set_up_database(home: Path) -> None:
    """Once for each home, by one process: two that do it at the same time leave a database that none can open."""
    from dagster import DagsterInstance

    done = home / _DATABASE_MARK
    if not done.exists():
        with holding_one_of(home, ["database"]), DagsterInstance.from_config(str(home)):
            done.touch()


def _is_ours(settings: str) -> bool:
    """Whether a `dagster.yaml` is as it was written, for whichever folder."""
    named = re.search(r"^    base_dir: \"?(.*)/storage\"?$", settings, re.MULTILINE)
    return named is not None and settings.replace('"', "") == instance_settings(named[1]).replace('"', "")


def command_line_instance() -> DagsterInstance:
    """The instance for runs in this process: that of DAGSTER_HOME, without Dagster's capture of what steps print.

    The capture runs helper processes that stand between a terminal and its progress bars, and answer Ctrl-C with tracebacks.
    """
    import yaml
    from dagster import DagsterInstance

    home = prepare_home()
    settings = yaml.safe_load((home / "dagster.yaml").read_text()) or {}
    settings["compute_logs"] = {"module": NO_COMPUTE_LOGS, "class": "NoOpComputeLogManager"}
    (home / _COMMAND_LINE_FILE).write_text("# Made anew from dagster.yaml by every `saeens run`.\n" + yaml.safe_dump(settings))
    return DagsterInstance.from_config(str(home), _COMMAND_LINE_FILE)


@contextlib.contextmanager
def recorded_instance() -> Iterator[DagsterInstance | None]:
    """The instance of DAGSTER_HOME for a command that only looks; None where there is none yet, and none is made."""
    if (home_folder() / "dagster.yaml").exists():
        with command_line_instance() as instance:
            yield instance
    else:
        yield None


def process_tag() -> dict[str, str]:
    """The tag of a run that this process executes itself: who to ask whether it still lives."""
    return {PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}"}


def end_dead_runs(instance: DagsterInstance) -> None:
    """Cancel runs whose process on this machine was killed, and free the GPU slot that they would hold for ever.

    They did not fail: the machine or its user ended them, and the automation asks for what they were to make again. A run of the
    command line is dead when its process is, one of the UI or the automation when its code server is gone.
    """
    from dagster import DagsterRunStatus, RunsFilter

    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
        host, _, pid = run.tags.get(PROCESS_TAG, "").rpartition(":")
        if host == socket.gethostname() and not is_alive(int(pid)):
            instance.report_run_canceled(run, "The process that executed this run was killed.")
        elif _SERVER_TAG in run.tags and not _answers(json.loads(run.tags[_SERVER_TAG])):
            instance.report_run_canceled(run, "The code server that executed this run is gone.")
        else:
            continue
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _answers(server: dict[str, Any]) -> bool:
    """Whether a code server listens where a run's tag says. One on another machine is left alone."""
    if "socket" not in server:
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(server["socket"]) == 0


class LayerChanges(NamedTuple):
    """What the partitions of a source lack to be in step with the layers of its experiment file."""

    new: list[str]  # not known yet, in numeric order
    newly_declared: list[str]  # known or not, not seen in the file before
    gone: list[str]  # that were in the file before


def layers_name(source: str) -> str:
    """The dynamic partitions that hold the layers of a source."""
    return f"{source}_layers"


def declared_layers_name(source: str) -> str:
    """The dynamic partitions that hold which of the layers came from the experiment file: they go when they leave it."""
    return f"{source}/declared_layers"  # no source can be called so


def layer_changes(instance: DagsterInstance, source: str, declared: Sequence[int]) -> LayerChanges:
    """Compare the layers of an experiment file with the partitions. Those that were added by hand stay."""
    known = instance.get_dynamic_partitions(layers_name(source))
    before = instance.get_dynamic_partitions(declared_layers_name(source))
    now = [str(layer) for layer in sorted(declared)]
    return LayerChanges(
        new=[layer for layer in now if layer not in known],
        newly_declared=[layer for layer in now if layer not in before],
        gone=[layer for layer in before if layer not in now],
    )


def declare_layers(instance: DagsterInstance, source: str, declared: Sequence[int]) -> None:
    """Make the partitions of a source follow the layers of its experiment file."""
    changes = layer_changes(instance, source, declared)
    for name, added in ((layers_name(source), changes.new), (declared_layers_name(source), changes.newly_declared)):
        if added:
            instance.add_dynamic_partitions(name, added)
        for layer in changes.gone:
            instance.delete_dynamic_partition(name, layer)


def register_layers(instance: DagsterInstance, source: str, layers: Sequence[int]) -> list[int]:
    """Add layers to a source, in numeric order. Gives those that were not there yet."""
    known = instance.get_dynamic_partitions(layers_name(source))
    new = [layer for layer in sorted(set(layers)) if str(layer) not in known]
    if new:
        instance.add_dynamic_partitions(layers_name(source), [str(layer) for layer in new])
    return new


def added_layers(instance: DagsterInstance, source: str) -> list[str]:
    """The layers of a source that were added while it runs, and not by its experiment file; in the UI anything can be added."""
    declared = set(instance.get_dynamic_partitions(declared_layers_name(source)))
    return [layer for layer in instance.get_dynamic_partitions(layers_name(source)) if layer not in declared]
