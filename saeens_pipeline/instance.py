"""The Dagster instance: where runs and events are kept."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from saeens_pipeline.errors import SaeensError
from saeens_pipeline.resources import data_root
from saeens_pipeline.storage.recipes import is_alive

if TYPE_CHECKING:
    from dagster import DagsterInstance

_COMMAND_LINE_FILE = "command_line.yaml"
PROCESS_TAG = "saeens/process"

_SETTINGS = """\
# Where Dagster keeps runs and events, one op at a time on the GPU, and no telemetry.
# `saeens` writes this file into DAGSTER_HOME; the one beside workspace.yaml serves a plain `dagster dev -w workspace.yaml`.
storage:
  sqlite:
    base_dir: {storage}
compute_logs:
  module: dagster._core.storage.local_compute_log_manager
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
    return _SETTINGS.format(storage=json.dumps(f"{home}/storage"), compute_logs=json.dumps(f"{home}/compute_logs"))


def prepare_home() -> Path:
    """DAGSTER_HOME, or `dagster` below the data root where it is not set: made and set up where it is not there yet.

    The environment variable is set for this process and its children. Files that are there are left as they are, unless the folder was
    copied or moved: settings of ours that name another one are made anew.
    """
    home = Path(os.environ.get("DAGSTER_HOME") or data_root() / "dagster").absolute()
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
    return home


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
    settings["compute_logs"] = {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager"}
    (home / _COMMAND_LINE_FILE).write_text("# Made anew from dagster.yaml by every `saeens run`.\n" + yaml.safe_dump(settings))
    return DagsterInstance.from_config(str(home), _COMMAND_LINE_FILE)


def process_tag() -> dict[str, str]:
    """The tag of a run that this process executes itself: who to ask whether it still lives."""
    return {PROCESS_TAG: f"{socket.gethostname()}:{os.getpid()}"}


def end_dead_runs(instance: DagsterInstance) -> None:
    """Report runs as failed whose process on this machine was killed, and free the GPU slot that they would hold for ever."""
    from dagster import DagsterRunStatus, RunsFilter

    for run in instance.get_runs(RunsFilter(statuses=[DagsterRunStatus.STARTED])):
        host, _, pid = run.tags.get(PROCESS_TAG, "").rpartition(":")
        if host == socket.gethostname() and not is_alive(int(pid)):
            instance.report_run_failed(run, "The process that executed this run was killed.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def register_layers(instance: DagsterInstance, source: str, layers: Sequence[int]) -> None:
    """Make Dagster know the layers of a source, in numeric order."""
    name = f"{source}_layers"
    known = set(instance.get_dynamic_partitions(name))
    new = [str(layer) for layer in sorted(layers) if str(layer) not in known]
    if new:
        instance.add_dynamic_partitions(name, new)
