"""The layers of a source: those of its experiment file, and those that were added while it runs. Its experiments get all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.orchestration.instance import added_layers, declare_layers, recorded_instance, register_layers

if TYPE_CHECKING:
    from dagster import DagsterInstance

    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.settings import SourceSettings


class Layers(NamedTuple):
    """The layers that a source has, in numeric order, and what was added in the UI although the language model lacks it."""

    layers: list[int]
    impossible: list[str]


def recorded_layers(source: SourceSettings) -> Layers:
    """All layers of a source, for a command that only looks: the instance of DAGSTER_HOME is asked where there is one."""
    with recorded_instance() as instance:
        return layers_of_source(source, instance) if instance else Layers(sorted(source.layers), [])


def layers_of_source(source: SourceSettings, instance: DagsterInstance) -> Layers:
    """All layers of a source: those of its experiment file, and those that were added to the instance."""
    added = added_layers(instance, source.name)
    others = [layer for layer in added if layer not in map(str, source.layers)]
    if not others:
        return Layers(sorted(source.layers), [])
    from saeens_pipeline.language_models.models import describe_language_model

    there = range(describe_language_model(source.language_model, source.revision).n_layers)
    possible = {layer: int(layer) for layer in others if layer.isdecimal() and int(layer) in there}
    return Layers(sorted({*source.layers, *possible.values()}), [layer for layer in others if layer not in possible])


class AddedLayers(NamedTuple):
    """What `saeens layers add` did, and the experiments that get the layers: those that make them without asking, and the others."""

    new: list[int]
    known: list[int]
    automated: list[str]
    on_request: list[str]


def add_layers(catalogue: Experiments, name: str, layers: Sequence[int]) -> AddedLayers:
    """Add layers to a source of that name. Raises ConfigurationError, before anything is added, for those that the model lacks."""
    from saeens_pipeline.assets.sources import validate_source
    from saeens_pipeline.orchestration.instance import command_line_instance

    source = catalogue.sources.get(name)
    if source is None:
        message = f"there is no source {name!r}; there are: {', '.join(sorted(catalogue.sources)) or 'none'}"
        raise ConfigurationError("\n".join([message, *catalogue.broken.values()]))
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
