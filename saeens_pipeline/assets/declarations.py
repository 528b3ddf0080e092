"""Declarations of artefacts and of the ops that make them. Recipes, cache hits, staleness, assets and lineage follow from them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.settings.files import recorded_file
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Recipe, Store, digest

Dimensions = Literal["none", "layer", "layer_and_seed"]
DIMENSION_NAMES: dict[Dimensions, tuple[str, ...]] = {"none": (), "layer": ("layer",), "layer_and_seed": ("layer", "seed")}


@dataclass(frozen=True)
class Reference:
    """An artefact as others refer to it: its address and its partition dimensions."""

    address: Address
    dimensions: Dimensions

    def narrow(self, partition: Partition) -> Partition:
        """Return the part of a partition that this artefact has: activations have no seed."""
        match self.dimensions:
            case "none":
                return Partition()
            case "layer":
                return Partition(layer=partition.layer)
            case _:
                return partition


@dataclass(frozen=True)
class Input:
    """One artefact that another is made from."""

    name: str
    artefact: Reference
    decides: bool = True
    """Whether it is part of the recipe; otherwise it only has to be made first."""
    optional: bool = False
    """Whether nothing waits for it: every partition of it that is on disk is part of the recipe, and none has to be there."""
    in_graph: bool = True
    """Whether Dagster knows of it. A control's tables have layers of another source, to which Dagster cannot map partitions."""


@dataclass(frozen=True)
class Declaration(Reference):
    """One artefact: what decides its content, and how the asset graph describes it.

    The first line of `description` leads with what differs from its neighbours.
    """

    builder: str
    version: int
    settings: Mapping[str, Any]
    """Equal for all partitions; they decide Dagster's code version."""
    inputs: tuple[Input, ...]
    description: str
    source: str
    seeds: tuple[int, ...] = ()
    partition_settings: Callable[[Partition], Mapping[str, Any]] = field(default=lambda partition: {})
    """Settings that depend on the partition, such as seeds."""
    unavailable: Callable[[], Mapping[str, Any]] = field(default=dict)
    """What this machine lacks, such as an endpoint: settings of the recipe of an artefact made without it, which is made again as soon as
    nothing is lacking. An artefact that was made with everything stays a hit."""
    kinds: frozenset[str] = frozenset()
    tags: Mapping[str, str] = field(default_factory=dict)
    experiment_file: str = ""
    """The file that declares it; its record keeps the path, so that `saeens gc` can tell whether that file is still read."""

    @property
    def code_version(self) -> str:
        """Dagster's code version: a hash of builder, version and settings."""
        return digest([self.builder, self.version, dict(self.settings)])

    def input_partitions(self, partition: Partition, *, optional: bool = False) -> Iterator[tuple[str, Reference, Partition]]:
        """Give name, artefact and partition of the recipe's inputs, with `optional` those that nothing waits for.

        Where all seeds are compared, each is an input.
        """
        for each in self.inputs:
            if each.optional != optional or not each.decides or (optional and self.dimensions == "none"):
                continue
            if self.dimensions == "layer" and each.artefact.dimensions == "layer_and_seed":
                seeds = each.artefact.seeds if isinstance(each.artefact, Declaration) else self.seeds
                partitions = {f"seed {seed}": Partition(partition.layer, seed) for seed in seeds}
            else:
                partitions = {"": each.artefact.narrow(partition)}
            for suffix, where in partitions.items():
                label = str(where) if optional else suffix
                yield ", ".join(filter(None, (each.name, label))), each.artefact, where

    def optional_inputs(self, store: Store, partition: Partition) -> Iterator[tuple[str, Declaration | Reference, Partition, Artefact]]:
        """Give the optional inputs that are whole on disk: name, artefact, partition and record. Of an artefact without partitions
        these are all partitions with seeds that are still declared.
        """
        for each in self.inputs:
            if not each.optional:
                continue
            for where in store.partitions(each.artefact.address, *DIMENSION_NAMES[each.artefact.dimensions]):
                if self.dimensions == "layer" and where.layer != partition.layer:
                    continue
                if where.seed is not None and isinstance(each.artefact, Declaration) and where.seed not in each.artefact.seeds:
                    continue
                with contextlib.suppress(DamagedArtefactError):
                    artefact = store.find(each.artefact.address, where)
                    if artefact:
                        yield f"{each.name}, {where}", each.artefact, where, artefact

    def recipe(self, store: Store, partition: Partition) -> Recipe:
        """Return the recipe that this artefact should have now. Raises MissingInputError where an input is not there."""
        inputs = {name: store.require(artefact.address, where).data_version for name, artefact, where in self.input_partitions(partition)}
        inputs |= {name: artefact.data_version for name, _, _, artefact in self.optional_inputs(store, partition)}
        recipe = Recipe(self.builder, self.version, {**self.settings, **self.partition_settings(partition)}, inputs)
        unavailable = self.unavailable()
        if not unavailable or store.hit(self.address, partition, recipe):
            return recipe
        return replace(recipe, settings={**recipe.settings, **unavailable})


class RunContext(NamedTuple):
    """What an op works with: store, device, the run that asked, and where its progress is shown."""

    store: Store
    compute: Compute
    run_id: str
    requested_layers: Callable[[], Collection[int]]
    """Layers that waiting runs are going to ask for; an op may make them in the same pass."""
    observe: Callable[[Declaration, Partition, Mapping[str, Any]], None]
    """Shows metadata in the UI while the op goes on."""

    def provenance(self, declaration: Declaration) -> dict[str, Any]:
        """Return the facts that every record of this run begins with."""
        return {"run_id": self.run_id, "experiment_file": declaration.experiment_file, **self.compute.describe()}


class Task(NamedTuple):
    """One artefact that has to be made, with its recipe."""

    declaration: Declaration
    partition: Partition
    recipe: Recipe

    @property
    def where(self) -> tuple[Address, Partition]:
        """Address and partition."""
        return self.declaration.address, self.partition


@dataclass(frozen=True)
class Op:
    """Makes one or several artefacts together."""

    name: str
    outputs: tuple[Declaration, ...]
    make: Callable[[RunContext, Sequence[Task]], None]
    """Writes the artefact of every task; it is given misses only."""
    on_device: bool = False
    preflight: Callable[[RunContext, Sequence[Task]], None] = field(default=lambda context, tasks: None)
    """Raises SaeensError, before anything is spent, for what would make these tasks, or what follows from them, fail."""
    links: bool = False
    """Whether an artefact of any experiment with an equal recipe is linked instead of being made again."""
    twin: Reference | None = None
    """An artefact made before, whose recipe may be equal: looked at first."""
    checks: CheckSettings = field(default_factory=CheckSettings)
    """Thresholds of health warnings."""


def with_file(ops: Iterable[Op], file: Path | None) -> list[Op]:
    """Return the ops with the experiment file recorded in what they make."""
    return [replace(op, outputs=tuple(replace(each, experiment_file=recorded_file(file)) for each in op.outputs)) for op in ops]
