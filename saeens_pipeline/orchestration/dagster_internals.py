"""Names of Dagster that are private and have no public alternative, each with its reason."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import dagster
import yaml
from dagster import AssetExecutionContext, AssetKey, DagsterInstance, DagsterRun, JobDefinition
from dagster._core.errors import DagsterMaxRetriesExceededError
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Events
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage

MaxRetriesExceededError = DagsterMaxRetriesExceededError
"""The error of a step that failed after its retries; its message is a trace, and the step's own error is found in it only."""
LOCAL_COMPUTE_LOGS = "dagster._core.storage.local_compute_log_manager"
"""Module of the default capture of the steps' output; `dagster.yaml` has to name it to choose its folder."""
NO_COMPUTE_LOGS = "dagster._core.storage.noop_compute_log_manager"
"""Module that captures nothing. The default capture runs helper processes between a terminal and its progress bars."""


def forget_partitions(instance: DagsterInstance, key: Sequence[str], partitions: Sequence[str]) -> None:
    """Let Dagster count these partitions of an asset as never materialised and never tried; without partitions, all of the asset.

    Its SQL storages lack `wipe_asset_partitions`: in their index of asset events, these events are taken from the asset. They are not
    deleted: SQLite would give their numbers to new events, which the automation would take for old ones.
    """
    asset, storage = AssetKey(list(key)), instance.event_log_storage
    if not partitions:
        instance.wipe_assets([asset])
        return
    if not isinstance(storage, SqlEventLogStorage):
        instance.wipe_asset_partitions(asset, partitions)
        return
    with storage.index_connection() as connection:
        theirs = (Events.c.asset_key == asset.to_string(), Events.c.partition.in_(partitions))
        connection.execute(Events.update().where(*theirs).values(asset_key=None))
    storage.wipe_asset_cached_status(asset)


@contextlib.contextmanager
def code_servers(instance: DagsterInstance, workspace: Path, prefix: str) -> Iterator[Path]:
    """Start the code servers of a workspace file, as `dagster dev` does, and give a workspace file with their sockets.

    They are started again if they end, and end themselves if this process does. The sockets' folder has a name that begins with `prefix`:
    Dagster writes the socket into a tag of each run.
    """
    from dagster._cli.proxy_server_manager import ProxyServerManager
    from dagster._core.workspace.load_target import WorkspaceFileTarget

    with tempfile.TemporaryDirectory(prefix=prefix) as folder:
        tempfile.tempdir = folder
        with ProxyServerManager(instance, WorkspaceFileTarget([str(workspace)]), "WARNING") as servers:
            tempfile.tempdir = None
            sockets = Path(folder) / "workspace.yaml"
            sockets.write_text(yaml.safe_dump({"load_from": servers.get_code_server_specs()}))
            yield sockets


def webserver_context(instance: DagsterInstance, workspace: Path) -> AbstractContextManager[Any]:
    """Return the context that Dagster's webserver serves: an instance and the code locations of a workspace file."""
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import WorkspaceFileTarget

    return WorkspaceProcessContext(instance, WorkspaceFileTarget([str(workspace)]), version=dagster.__version__)


def name_code_location(instance: DagsterInstance, location: str) -> None:
    """Let the runs that this process creates in an instance name a code location: the timeline of the UI shows no others."""
    from dagster._core.definitions.repository_definition import SINGLETON_REPOSITORY_NAME
    from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

    create = instance.create_run_for_job

    def create_run_for_job(job_def: JobDefinition, **arguments: Any) -> DagsterRun:
        repository = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin(location), SINGLETON_REPOSITORY_NAME)
        return create(job_def=job_def, remote_job_origin=RemoteJobOrigin(repository, job_def.name), **arguments)

    setattr(instance, create.__name__, create_run_for_job)


def forget_input_version(context: AssetExecutionContext, key: AssetKey) -> None:
    """Let the materialisations of a step name the version of this input that was observed last, not the one at the step's beginning."""
    context.get_step_execution_context().wipe_input_asset_version_info(key)
