"""What an experiment needs: every artefact, whether it is there, and what to make in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.storage.names import Address, Partition, place
from saeens_pipeline.storage.recipes import DamagedArtefactError, Store

State = Literal["fresh", "stale", "damaged", "missing", "running", "failed"]
"""Recipes know the first four. That a run works on what is not fresh, or failed to make it, is Dagster's to say (`run_states`)."""


@dataclass(frozen=True)
class Status:
    """One artefact of one partition: its state, and why.

    `causes`: the artefacts that are not fresh themselves and that this one is stale for, directly or by way of others.
    """

    declaration: Declaration
    partition: Partition
    state: State
    reason: str
    causes: tuple[Status, ...] = ()

    @property
    def where(self) -> tuple[Address, Partition]:
        return self.declaration.address, self.partition


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
    known: dict[tuple[Address, Partition], Status] = {}

    def stage(partition: Partition, declarations: list[Declaration]) -> Stage:
        statuses = []
        for declaration in declarations:
            status = _status(store, declaration, partition, known)
            known[status.where] = status
            statuses.append(status)
        return Stage(partition, tuple(statuses))

    activations = [d for d in outputs if d.dimensions == "layer" and d.address.kind == "source"]
    per_seed = [d for d in outputs if d.dimensions == "layer_and_seed"]
    across_seeds = [d for d in outputs if d.dimensions == "layer" and d.address.kind != "source"]
    stages = [stage(Partition(), [d for d in outputs if d.dimensions == "none"])]
    stages += [stage(Partition(layer), activations) for layer in layers]
    stages += [stage(Partition(layer, seed), per_seed) for layer in layers for seed in seeds]
    stages += [stage(Partition(layer), across_seeds) for layer in layers]
    return [each for each in stages if each.statuses]


def _status(store: Store, declaration: Declaration, partition: Partition, known: dict[tuple[Address, Partition], Status]) -> Status:
    try:
        artefact = store.find(declaration.address, partition)
    except DamagedArtefactError as error:
        return Status(declaration, partition, "damaged", str(error))
    if artefact is None:
        return Status(declaration, partition, "missing", "")
    causes = tuple({cause.where: cause for cause in _causes(declaration, partition, known)}.values())
    if causes:
        return Status(declaration, partition, "stale", _following(causes), causes)
    recipe = declaration.recipe(store, partition)
    if artefact.recipe_hash == recipe.hash:
        return Status(declaration, partition, "fresh", "")
    inputs = [each for optional in (False, True) for each in declaration.input_partitions(partition, optional=optional)]
    names = {name: place(each.address, where) for name, each, where in inputs}
    return Status(declaration, partition, "stale", "; ".join(artefact.differences(recipe, names)))


def _causes(declaration: Declaration, partition: Partition, known: dict[tuple[Address, Partition], Status]) -> Iterator[Status]:
    for optional in (False, True):
        for _, artefact, where in declaration.input_partitions(partition, optional=optional):
            upstream = known.get((artefact.address, where))
            if upstream and upstream.state != "fresh":
                yield from upstream.causes or [upstream]


def _following(causes: Sequence[Status]) -> str:
    """Where a chain of what is not fresh begins: the first artefact in words, others as a number."""
    first = causes[0]
    why = f": {first.reason}" if first.state == "stale" else ""
    others = f"; {len(causes) - 1} more that it follows from {'is' if len(causes) == 2 else 'are'} not fresh" if len(causes) > 1 else ""
    return f"follows from {place(*first.where)}, which is {first.state}{why}{others}"
