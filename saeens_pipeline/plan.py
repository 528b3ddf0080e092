"""What an experiment needs: every artefact, whether it is there, and what to make in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.storage.names import Address, Partition
from saeens_pipeline.storage.recipes import DamagedArtefactError, Store

State = Literal["fresh", "stale", "damaged", "missing"]


@dataclass(frozen=True)
class Status:
    """One artefact of one partition: fresh, stale or damaged (and why), or missing."""

    declaration: Declaration
    partition: Partition
    state: State
    reason: str


@dataclass(frozen=True)
class Stage:
    """What one run makes: artefacts of one partition, in an order that respects what depends on what."""

    partition: Partition
    statuses: tuple[Status, ...]

    @property
    def to_make(self) -> list[Declaration]:
        return [status.declaration for status in self.statuses if status.state != "fresh"]


def plan(store: Store, ops: Sequence[Op], layers: Sequence[int], seeds: Sequence[int]) -> list[Stage]:
    """The stages that bring an experiment up to date: tokens, then per layer activations, per seed all SAEs and tables, stability.

    An artefact is stale when its recipe is not the one that it should have now, or when something that it is made from is
    not fresh; it is damaged when its files are not those that its recipe lists.
    """
    outputs = [output for op in ops for output in op.outputs]
    states: dict[tuple[Address, Partition], State] = {}

    def stage(partition: Partition, declarations: list[Declaration]) -> Stage:
        return Stage(partition, tuple(_status(store, declaration, partition, states) for declaration in declarations))

    activations = [d for d in outputs if d.dimensions == "layer" and d.address.kind == "source"]
    per_seed = [d for d in outputs if d.dimensions == "layer_and_seed"]
    across_seeds = [d for d in outputs if d.dimensions == "layer" and d.address.kind != "source"]
    stages = [stage(Partition(), [d for d in outputs if d.dimensions == "none"])]
    stages += [stage(Partition(layer), activations) for layer in layers]
    stages += [stage(Partition(layer, seed), per_seed) for layer in layers for seed in seeds]
    stages += [stage(Partition(layer), across_seeds) for layer in layers]
    return [each for each in stages if each.statuses]


def _status(store: Store, declaration: Declaration, partition: Partition, states: dict[tuple[Address, Partition], State]) -> Status:
    state, reason = _describe(store, declaration, partition, states)
    states[declaration.address, partition] = state
    return Status(declaration, partition, state, reason)


def _describe(
    store: Store, declaration: Declaration, partition: Partition, states: dict[tuple[Address, Partition], State]
) -> tuple[State, str]:
    try:
        artefact = store.find(declaration.address, partition)
    except DamagedArtefactError as error:
        return "damaged", str(error)
    if artefact is None:
        return "missing", ""
    for name in _not_fresh(declaration, partition, states):
        return "stale", f"{name} will be made again"
    recipe = declaration.recipe(store, partition)
    return ("fresh", "") if artefact.recipe_hash == recipe.hash else ("stale", "; ".join(artefact.differences(recipe)))


def _not_fresh(declaration: Declaration, partition: Partition, states: dict[tuple[Address, Partition], State]) -> Iterator[str]:
    for name, artefact, where in declaration.input_partitions(partition):
        if states.get((artefact.address, where), "fresh") != "fresh":
            yield name
