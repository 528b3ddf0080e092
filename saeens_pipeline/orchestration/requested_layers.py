"""Which layers of a source are asked for together, so that one forward pass can serve them all."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import dagster as dg

LAYERS_TAG = "saeens/layers"  # on a run of the command line: all layers that its stages ask for


def requested_layers(context: dg.AssetExecutionContext) -> tuple[int, ...]:
    """The layers that this run's command asks for, or that unfinished runs ask for of the same assets.

    A backfill, an automation tick or a click on several partitions in the UI makes a run for each layer. Those that are queued, or that
    wait for the device while this one works, are found here. Layers that are merely registered are not: nobody may want their disk space.
    """
    if LAYERS_TAG in context.run.tags:
        return tuple(int(layer) for layer in context.run.tags[LAYERS_TAG].split(",") if layer)
    return tuple(sorted({*_layers_of_unfinished_runs(context)}))


def _layers_of_unfinished_runs(context: dg.AssetExecutionContext) -> list[int]:
    from dagster import DagsterRunStatus, RunsFilter

    waiting = [DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]
    runs = context.instance.get_runs(RunsFilter(statuses=waiting))
    keys = [run.tags.get("dagster/partition", "") for run in runs if context.selected_asset_keys <= (run.asset_selection or set())]
    return [int(key) for key in keys if key.isdecimal()]
