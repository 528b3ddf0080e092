"""Staleness: the state of every artefact of an experiment, and the stages in which to compute them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from saeens_pipeline.assets.declarations import Declaration, Op
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.names import Address, Partition, place
from saeens_pipeline.storage.recipes import DamagedArtefactError, Snapshot, Store

State = Literal["fresh", "stale", "damaged", "missing", "queued", "running", "failed"]
"""The first four follow from recipes and files; the others come from Dagster's runs (`run_states`)."""


@dataclass(frozen=True)
class Status:
    """The state of one artefact in one partition, and the reason.

    `causes`: the artefacts, direct or indirect inputs, that are not fresh and make this one stale.
    """

    declaration: Declaration
    partition: Partition
    state: State
    reason: str
    causes: tuple[Status, ...] = ()

    @property
    def where(self) -> tuple[Address, Partition]:
        """Return address and partition of the artefact."""
        return self.declaration.address, self.partition


@dataclass(frozen=True)
class Stage:
    """The artefacts of one run: all of one partition, inputs before the artefacts computed from them."""

    partition: Partition
    statuses: tuple[Status, ...]

    @property
    def to_make(self) -> list[Declaration]:
        """Return the declarations of the artefacts that are not fresh."""
        return [status.declaration for status in self.statuses if status.state != "fresh"]


def plan(store: Store, ops: Sequence[Op], layers: Sequence[int], seeds: Sequence[int]) -> list[Stage]:
    """Return the stages of an experiment in order, with the state of each artefact.

    The order is tokens; activations by layer; SAEs and tables by layer and seed; tables across seeds and the report by layer.

    An artefact is stale if its recipe differs from the present one or an input is not fresh. It is damaged if its files are not those
    in its record.
    """
    outputs = [output for op in ops for output in op.outputs]
    store = store if isinstance(store, Snapshot) else Snapshot(store.root)
    known: dict[tuple[Address, Partition], Status] = {}

    def stage(partition: Partition, declarations: list[Declaration]) -> Stage:
        for each in declarations:
            known[each.address, partition] = _status(store, each, partition, known)
        return Stage(partition, tuple(known[each.address, partition] for each in declarations))

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
    try:
        recipe = declaration.recipe(store, partition)
    except SaeensError as error:  # its source was moved or removed: what was computed from it can still be read
        return Status(declaration, partition, "stale", str(error))
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
    """Return the reason of a stale artefact from its causes: the first in words, the others as a number."""
    first = causes[0]
    why = f": {first.reason}" if first.state == "stale" else ""
    others = f"; {len(causes) - 1} more that it follows from {'is' if len(causes) == 2 else 'are'} not fresh" if len(causes) > 1 else ""
    return f"follows from {place(*first.where)}, which is {first.state}{why}{others}"
