"""Names of Dagster that are private and have no public alternative, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence

from dagster import AssetKey, DagsterInstance
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable as Events
from dagster._core.storage.event_log.sql_event_log import SqlEventLogStorage

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
