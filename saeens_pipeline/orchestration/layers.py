"""The layers of a source: those of its experiment file, those added by hand, and those that runs request together.

Its experiments get all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import dagster as dg
from dagster import DagsterInstance, DagsterRunStatus, RunsFilter

from saeens_pipeline.assets.catalogue import Experiments
from saeens_pipeline.assets.sources import describe_source, validate_source
from saeens_pipeline.orchestration.instance import added_layers, command_line_instance, declare_layers, recorded, register_layers
from saeens_pipeline.settings import SourceSettings

LAYERS_TAG = "saeens/layers"  # tag of command-line runs: all layers of the command's stages


class Layers(NamedTuple):
    """The layers of a source in numeric order, and partitions added in the UI that are no layers of the language model."""

    layers: list[int]
    impossible: list[str]


def recorded_layers(source: SourceSettings) -> Layers:
    """Return all layers of a source, for commands that only read: with those of the instance of DAGSTER_HOME, if it exists."""
    return recorded(partial(layers_of_source, source), Layers(sorted(source.layers), []))


def layers_of_source(source: SourceSettings, instance: DagsterInstance) -> Layers:
    """Return all layers of a source: those of its experiment file and those added to the instance."""
    added = added_layers(instance, source.name)
    others = [layer for layer in added if layer not in map(str, source.layers)]
    if not others:
        return Layers(sorted(source.layers), [])
    there = range(describe_source(source).n_layers)
    possible = {layer: int(layer) for layer in others if layer.isdecimal() and int(layer) in there}
    return Layers(sorted({*source.layers, *possible.values()}), [layer for layer in others if layer not in possible])


class AddedLayers(NamedTuple):
    """The result of `saeens layers add`: new and known layers, and the experiments that get them, by their `automation`."""

    new: list[int]
    known: list[int]
    automated: list[str]
    on_request: list[str]


def add_layers(catalogue: Experiments, name: str, layers: Sequence[int]) -> AddedLayers:
    """Add layers to the source of this name. Raises ConfigurationError, before anything is added, for layers that the model lacks."""
    source = catalogue.source(name)
    validate_source(source, layers)
    with command_line_instance() as instance:
        declare_layers(instance, name, source.layers)
        new = register_layers(instance, name, layers)
    experiments = [experiment for experiment in sorted(catalogue.experiments.values(), key=lambda e: e.name) if experiment.source == name]
    return AddedLayers(
        new=new,
        known=sorted(set(layers) - set(new)),
        automated=[experiment.name for experiment in experiments if experiment.automation == "on"],
        on_request=[experiment.name for experiment in experiments if experiment.automation == "off"],
    )


def requested_layers(context: dg.AssetExecutionContext) -> tuple[int, ...]:
    """Return the layers that this run's command requests, or that unfinished runs request of the same assets.

    A backfill, an automation tick or the choice of several partitions in the UI starts a run for each layer; one forward pass serves them
    all. Runs that are queued or wait for the device count. Registered layers without a request do not: activations take disk space.
    """
    if LAYERS_TAG in context.run.tags:
        return tuple(int(layer) for layer in context.run.tags[LAYERS_TAG].split(",") if layer)
    waiting = [DagsterRunStatus.QUEUED, DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]
    runs = context.instance.get_runs(RunsFilter(statuses=waiting))
    keys = {run.tags.get("dagster/partition", "") for run in runs if context.selected_asset_keys <= (run.asset_selection or set())}
    return tuple(sorted(int(key) for key in keys if key.isdecimal()))
