"""Layers of a source that are requested together, so that one forward pass serves them all."""

from __future__ import annotations

import dagster as dg
from dagster import DagsterRunStatus, RunsFilter

LAYERS_TAG = "saeens/layers"  # tag of command-line runs: all layers of the command's stages


def requested_layers(context: dg.AssetExecutionContext) -> tuple[int, ...]:
    """Return the layers that this run's command requests, or that unfinished runs request of the same assets.

    A backfill, an automation tick or the choice of several partitions in the UI starts a run for each layer. Runs that are queued or wait
    for the device count. Registered layers without a request do not, because activations take disk space.
    """
    if LAYERS_TAG in context.run.tags:
        return tuple(int(layer) for layer in context.run.tags[LAYERS_TAG].split(",") if layer)
    return tuple(sorted({*_layers_of_unfinished_runs(context)}))


def _layers_of_unfinished_runs(context: dg.AssetExecutionContext) -> list[int]:
    waiting = [DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]
    runs = context.instance.get_runs(RunsFilter(statuses=waiting))
    keys = [run.tags.get("dagster/partition", "") for run in runs if context.selected_asset_keys <= (run.asset_selection or set())]
    return [int(key) for key in keys if key.isdecimal()]
