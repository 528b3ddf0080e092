"""What exists: artefacts, declared with what they are made from, and ops that make them.

Everything else follows from these declarations: recipes and so cache hits, `saeens status`, Dagster's assets and lineage.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Recipe, Store, digest

if TYPE_CHECKING:
    from saeens_pipeline.orchestration.resources import ComputeResource

Dimensions = Literal["none", "layer", "layer_and_seed"]
DIMENSION_NAMES: dict[Dimensions, tuple[str, ...]] = {"none": (), "layer": ("layer",), "layer_and_seed": ("layer", "seed")}


@dataclass(frozen=True)
class Reference:
    """An artefact as others refer to it: its address, and whether it has one version per layer, or per layer and seed."""

    address: Address
    dimensions: Dimensions

    def narrow(self, partition: Partition) -> Partition:
        """The part of a partition that this artefact knows: activations know no seed."""
        match self.dimensions:
            case "none":
                return Partition()
            case "layer":
                return Partition(layer=partition.layer)
            case _:
                return partition


@dataclass(frozen=True)
class Input:
    """One artefact that another is made from.

    `decides=False`: it only has to be made first, and is not part of the recipe. `optional=True`: every partition of it that is on
    disk is part of the recipe, and none has to be: what waits for it would wait for ever for what nobody asks for.
    """

    name: str
    artefact: Reference
    decides: bool = True
    optional: bool = False


@dataclass(frozen=True)
class Declaration(Reference):
    """One artefact: what decides its content, and what a reader of the asset graph should know of it.

    `settings` are equal for all partitions and decide Dagster's code version; `partition_settings` adds what depends on the
    partition (seeds). `lacking` names what this machine does not have for the making, such as an endpoint: settings of the recipe of what
    is made without, so that it is made again as soon as there is all. What was made with it stays a hit without it.
    The first line of `description` leads with what differs from its neighbours.
    """

    builder: str
    version: int
    settings: Mapping[str, Any]
    inputs: tuple[Input, ...]
    description: str
    source: str
    seeds: tuple[int, ...] = ()
    partition_settings: Callable[[Partition], Mapping[str, Any]] = field(default=lambda partition: {})
    lacking: Callable[[], Mapping[str, Any]] = field(default=lambda: {})
    kinds: frozenset[str] = frozenset()
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def code_version(self) -> str:
        return digest([self.builder, self.version, dict(self.settings)])

    def input_partitions(self, partition: Partition) -> Iterator[tuple[str, Reference, Partition]]:
        """What the recipe's inputs are called and where they lie. Where all seeds are compared, each is an input."""
        for each in self.inputs:
            if each.optional or not each.decides:
                continue
            if self.dimensions == "layer" and each.artefact.dimensions == "layer_and_seed":
                for seed in self.seeds:
                    yield f"{each.name}, seed {seed}", each.artefact, Partition(partition.layer, seed)
            else:
                yield each.name, each.artefact, each.artefact.narrow(partition)

    def optional_inputs(self, store: Store) -> Iterator[tuple[Input, Partition, Artefact]]:
        """Of the inputs that are optional, every partition that is whole on disk, of the seeds that are still declared."""
        for each in self.inputs:
            if not each.optional:
                continue
            for where in store.partitions(each.artefact.address, *DIMENSION_NAMES[each.artefact.dimensions]):
                if where.seed is not None and isinstance(each.artefact, Declaration) and where.seed not in each.artefact.seeds:
                    continue
                with contextlib.suppress(DamagedArtefactError):
                    artefact = store.find(each.artefact.address, where)
                    if artefact:
                        yield each, where, artefact

    def recipe(self, store: Store, partition: Partition) -> Recipe:
        """The recipe that this artefact should have now. Raises MissingInputError where something is needed first."""
        inputs = {name: store.require(artefact.address, where).data_version for name, artefact, where in self.input_partitions(partition)}
        inputs |= {f"{each.name}, {where}": artefact.data_version for each, where, artefact in self.optional_inputs(store)}
        recipe = Recipe(self.builder, self.version, {**self.settings, **self.partition_settings(partition)}, inputs)
        lacking = self.lacking()
        if not lacking or store.hit(self.address, partition, recipe):
            return recipe
        return replace(recipe, settings={**recipe.settings, **lacking})


class Workplace(NamedTuple):
    """What an op works with: where artefacts lie, on what device, which run asked for it, and whom to tell how it goes."""

    store: Store
    compute: ComputeResource
    run_id: str
    requested_layers: Callable[[], Collection[int]]  # an op may make what others, now waiting, are going to ask it for
    observe: Callable[[Declaration, Partition, Mapping[str, Any]], None]  # shown in the UI while the op goes on

    def provenance(self) -> dict[str, Any]:
        """What is known of every artefact of this run."""
        return {"run_id": self.run_id, **self.compute.describe()}


class Task(NamedTuple):
    """One artefact that has to be made, with the recipe that it is made by."""

    declaration: Declaration
    partition: Partition
    recipe: Recipe

    @property
    def where(self) -> tuple[Address, Partition]:
        return self.declaration.address, self.partition


@dataclass(frozen=True)
class Op:
    """What makes one or several artefacts together. `make` writes every task's artefact; it is given misses only."""

    name: str
    outputs: tuple[Declaration, ...]
    make: Callable[[Workplace, Sequence[Task]], None]
    on_device: bool = False
