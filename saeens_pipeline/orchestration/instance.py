"""The Dagster instance: home folder, settings, dead runs, and the partitions that hold a source's layers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from dagster import DagsterInstance, DagsterRun, DagsterRunStatus, RunsFilter

from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.orchestration.dagster_internals import LOCAL_COMPUTE_LOGS, NO_COMPUTE_LOGS
from saeens_pipeline.storage.locks import holding_one_of
from saeens_pipeline.storage.recipes import is_alive
from saeens_pipeline.storage.root import data_root

_COMMAND_LINE_FILE = "command_line.yaml"
_DATABASE_MARK = ".database_is_set_up"
PROCESS_TAG = "saeens/process"
_SERVER_TAG = ".dagster/grpc_info"  # Dagster's tag on runs that it launched: the socket of the code server

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
    """Return the content of `dagster.yaml` for an instance in `home`."""
    folders = {name: json.dumps(f"{home}/{name}") for name in ("storage", "compute_logs")}
    return _SETTINGS.format(**folders, compute_log_module=LOCAL_COMPUTE_LOGS)


def home_folder() -> Path:
    """Return DAGSTER_HOME or, if it is not set, `dagster` below the data root."""
    return Path(os.environ.get("DAGSTER_HOME") or data_root() / "dagster").absolute()


def prepare_home() -> Path:
    """Create and set up the home folder if necessary, set DAGSTER_HOME for this process and its children, and return the folder.

    Existing files stay unchanged, except for a `dagster.yaml` written by `saeens` that names another folder, after a copy or a move.
    Raises SaeensError for a folder that cannot be written, ConfigurationError for a path that Dagster cannot use.
    """
    home = home_folder()
    if re.search(r"\?|%[0-9a-fA-F]{2}", str(home)):  # Dagster puts the path into a URL as it is
        raise ConfigurationError(f"{home}: Dagster cannot keep its databases in a path with ? or %20: set DAGSTER_HOME to another")
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name, content in (("dagster.yaml", instance_settings(home.as_posix())), ("workspace.yaml", WORKSPACE)):
            file = home / name
            if not file.exists() or (name == "dagster.yaml" and _is_ours(file.read_text())):
                file.write_text(content)
    except OSError as error:
        way_out = "set DAGSTER_HOME or SAEENS_DATA to a folder that can be"
        raise SaeensError(f"{home} cannot be written ({error.strerror}): {way_out}") from error
    os.environ["DAGSTER_HOME"] = str(home)
    if not (home / _DATABASE_MARK).exists():  # two processes that create the database at the same time leave one that cannot be opened
        with holding_one_of(home, ["database"]), DagsterInstance.from_config(str(home)):
            (home / _DATABASE_MARK).touch()
    return home


def _is_ours(settings: str) -> bool:
    """Return True for a `dagster.yaml` as `saeens` writes it, for any folder."""
    named = re.search(r"^    base_dir: \"?(.*)/storage\"?$", settings, re.MULTILINE)
    return named is not None and settings.replace('"', "") == instance_settings(named[1]).replace('"', "")


def command_line_instance() -> DagsterInstance:
    """Return the instance of DAGSTER_HOME for runs in this process, without Dagster's capture of the output of steps.

    The capture's helper processes would break progress bars and print tracebacks after Ctrl-C.
    """
    home = prepare_home()
    settings = yaml.safe_load((home / "dagster.yaml").read_text()) or {}
    settings["compute_logs"] = {"module": NO_COMPUTE_LOGS, "class": "NoOpComputeLogManager"}
    (home / _COMMAND_LINE_FILE).write_text("# Written from dagster.yaml by every `saeens run`.\n" + yaml.safe_dump(settings))
    return DagsterInstance.from_config(str(home), _COMMAND_LINE_FILE)


def recorded_instance() -> contextlib.AbstractContextManager[DagsterInstance | None]:
    """Give the instance of DAGSTER_HOME for commands that only read; None if it does not exist. None is created."""
    return command_line_instance() if (home_folder() / "dagster.yaml").exists() else contextlib.nullcontext()


def process_tag() -> dict[str, str]:
    """Return the tag with host and process of a run in this process, by which other processes find out if it is alive."""
    return {PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}"}


def process_is_dead(run: DagsterRun) -> bool:
    """Return True if a run was executed by a process on this machine that has ended."""
    host, _, pid = run.tags.get(PROCESS_TAG, "").rpartition(":")
    return host == socket.gethostname() and not is_alive(int(pid))


def end_dead_runs(instance: DagsterInstance) -> None:
    """Cancel runs whose process on this machine was killed, and free their GPU slots, which they would hold forever.

    They do not count as failed, so that the automation requests their artefacts again. A command-line run is dead if its process is, a run
    of the UI or the automation if its code server is.
    """
    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
        if process_is_dead(run):
            instance.report_run_canceled(run, "The process that executed this run was killed.")
        elif not _answers(json.loads(run.tags.get(_SERVER_TAG, "{}"))):
            instance.report_run_canceled(run, "The code server that executed this run is gone.")
        else:
            continue
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def _answers(server: dict[str, Any]) -> bool:
    """Return True if the code server of a run's tag listens. One on another machine counts as listening."""
    if "socket" not in server:
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(server["socket"]) == 0


def layers_name(source: str) -> str:
    """Return the name of the dynamic partitions that hold the layers of a source."""
    return f"{source}_layers"


def declared_layers_name(source: str) -> str:
    """Return the name of the dynamic partitions that record the layers from the experiment file, which are removed with the file's."""
    return f"{source}/declared_layers"  # no source can have this name


def layer_changes(instance: DagsterInstance, source: str, declared: Sequence[int]) -> list[tuple[str, list[str], list[str]]]:
    """Return the name of both dynamic partitions of a source, the layers to add in numeric order, and those that left its file.

    Layers added by hand stay.
    """
    now, names = [str(layer) for layer in sorted(declared)], (layers_name(source), declared_layers_name(source))
    known = {name: instance.get_dynamic_partitions(name) for name in names}
    gone = [layer for layer in known[names[1]] if layer not in now]
    return [(name, [layer for layer in now if layer not in known[name]], gone) for name in names]


def declare_layers(instance: DagsterInstance, source: str, declared: Sequence[int]) -> None:
    """Update the partitions of a source to the layers of its experiment file."""
    for name, added, gone in layer_changes(instance, source, declared):
        if added:
            instance.add_dynamic_partitions(name, added)
        for layer in gone:
            instance.delete_dynamic_partition(name, layer)


def register_layers(instance: DagsterInstance, source: str, layers: Sequence[int]) -> list[int]:
    """Add layers to a source, in numeric order, and return the new ones."""
    known = instance.get_dynamic_partitions(layers_name(source))
    new = [layer for layer in sorted(set(layers)) if str(layer) not in known]
    if new:
        instance.add_dynamic_partitions(layers_name(source), [str(layer) for layer in new])
    return new


def added_layers(instance: DagsterInstance, source: str) -> list[str]:
    """Return the layers that were added by hand and not by the experiment file. In the UI any text can be added."""
    declared = set(instance.get_dynamic_partitions(declared_layers_name(source)))
    return [layer for layer in instance.get_dynamic_partitions(layers_name(source)) if layer not in declared]
