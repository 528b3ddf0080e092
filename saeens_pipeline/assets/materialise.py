"""The driver: finds cache hits, links equal artefacts, computes missing artefacts and checks their health. Every run goes through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from saeens_pipeline.assets.declarations import MARKS, Declaration, Op, RunContext, Task
from saeens_pipeline.assets.health import Health, UnsoundArtefactError, examine, is_checked
from saeens_pipeline.assets.sources import recorded_facts
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.disk import is_full_disk
from saeens_pipeline.storage.locks import writing_alone
from saeens_pipeline.storage.names import Address, Partition, place
from saeens_pipeline.storage.recipes import Artefact, Store

_ATTEMPTS = 3  # to compute an artefact, if optional inputs appear meanwhile


class ReplacedInputError(SaeensError):
    """An input was replaced or removed while an artefact was computed from it."""


class AddedInputError(ReplacedInputError):
    """An optional input appeared while an artefact was computed from those that were there."""


class Materialised(NamedTuple):
    """A selected artefact after the op. `is_hit`: it was a cache hit. `health` is None for artefacts without health checks."""

    declaration: Declaration
    partition: Partition
    artefact: Artefact
    is_hit: bool
    health: Health | None


def materialise(op: Op, selection: Collection[Address], partition: Partition, context: RunContext) -> list[Materialised]:
    """Return the selected outputs of an op for one partition; compute those that are no cache hits.

    For each output: compute the recipe, look for a cache hit, take the lock, link an equal artefact if the op allows links, run the op's
    preflight and `make`, and check health. An unsound artefact is returned with the errors in its `health`: see `require_sound`.
    With `context.force`, artefacts that it concerns are no hits until they are computed anew; the old one stays until the new one is whole.
    Before an artefact gets its final name, the data versions of all inputs are compared with those in its recipe. If an optional input has
    appeared meanwhile, the artefact is computed again, with it.

    Raises MissingInputError for a missing input, UnsoundArtefactError for unsound inputs, ReplacedInputError, and the errors of preflight
    and `make`.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(AddedInputError):
            return _materialise(op, selection, partition, context)
    return _materialise(op, selection, partition, context)


def _materialise(op: Op, selection: Collection[Address], partition: Partition, context: RunContext) -> list[Materialised]:
    store = context.store
    tasks = [
        Task(declaration, partition, declaration.recipe(store, partition)) for declaration in op.outputs if declaration.address in selection
    ]
    hits = _hits(context, tasks)
    if len(hits) < len(tasks):
        with writing_alone(store.root, [task.where for task in tasks if task.where not in hits]):
            hits = _hits(context, tasks)  # another process may have computed them while this one waited for the lock
            missing = [task for task in tasks if task.where not in hits]
            if op.links:
                missing = [task for task in missing if not _link(context, task, op)]
            if missing:
                _make(op, missing, partition, context)
            for task in tasks:
                if task.where not in hits:
                    op.settle(context, task)
    made = []
    for task in tasks:
        artefact = hits.get(task.where) or store.require(*task.where)
        health = examine(task.declaration, partition, artefact, op.checks) if is_checked(task.declaration) else None
        made.append(Materialised(task.declaration, partition, artefact, task.where in hits, health))
    return made


def require_sound(made: Iterable[Health | None]) -> None:
    """Raise UnsoundArtefactError with the errors of these health checks, if they have any."""
    errors = [error for health in made if health for error in health.errors]
    if errors:
        raise UnsoundArtefactError("; ".join(errors))


def _make(op: Op, tasks: Sequence[Task], partition: Partition, context: RunContext) -> None:
    require_unchanged = _inputs_of(context.store, tasks)
    require_unchanged()  # the tasks may have waited for the lock
    store = replace(context.store, before_commit=require_unchanged)
    context = context._replace(store=store)
    inputs = {each.address: (each, where) for task in tasks for _, each, where in task.declaration.input_partitions(partition)}
    sources = [(each, where) for each, where in inputs.values() if each.address.kind == "source"]
    # A check of the inputs that failed in an earlier run stops this one too. SAEs need none: weights that are not finite cannot be loaded.
    require_sound(examine(each, where, store.require(each.address, where)) for each, where in sources)
    facts = partial(recorded_facts, store, op.outputs[0].source, partition.layer)
    op.preflight(store, [(task.declaration, partition) for task in tasks], facts)
    # The preflight may have kept texts at their first use, whose hash is part of recipes.
    tasks = [task._replace(recipe=task.declaration.recipe(store, partition)) for task in tasks]
    try:
        with context.compute.in_use(store.root) if op.on_device else contextlib.nullcontext():
            op.make(context, tasks)
    except Exception as error:
        if is_full_disk(error) and not isinstance(error, SaeensError):
            message = f"the disk below {store.root} is full: free some space and run again; finished artefacts are kept"
            raise SaeensError(message) from error
        raise


def _inputs_of(store: Store, tasks: Sequence[Task]) -> Callable[[], None]:
    """Return a function that raises ReplacedInputError if an input of these tasks is not the one in the recipe, if an input of an input is
    not the one that is there now, or if there is a new optional input."""
    known: dict[tuple[Address, Partition], str | None] = {}
    for task in tasks:
        known |= {each: store.data_version(*each) for each in task.declaration.ancestors(task.partition) - known.keys()}
        direct = task.declaration.all_inputs(store, task.partition)
        known |= {(each.address, where): task.recipe.inputs[name] for name, each, where in direct if name in task.recipe.inputs}
    made = ", ".join(task.declaration.address.name for task in tasks)

    def require_unchanged() -> None:
        for each, version in known.items():
            if store.data_version(*each) != version:
                raise ReplacedInputError(
                    f"{place(*each)} was replaced or removed while {tasks[0].declaration.address.owner}: {made} was computed from it: "
                    "the result is discarded; run again"
                )
        for task in tasks:
            for name, _, _, _ in task.declaration.optional_inputs(store, task.partition):
                if name not in task.recipe.inputs:
                    raise AddedInputError(f"{name} was added while {made} was computed: the result is discarded; run again")

    return require_unchanged


def _link(context: RunContext, task: Task, op: Op) -> bool:
    """Link an artefact with an equal recipe: the twin, or else one of any experiment. Return False if there is none."""
    store, partition, twin = context.store, task.partition, op.twin
    other = store.hit(twin.address, partition, task.recipe) if twin else None
    where, other = (twin.address, other) if twin and other else store.made_alike(*task.where, task.recipe)
    if other and ((op.needs_bytes and not other.files) or not context.is_done(task.declaration, other)):
        return False
    if other:
        own = {name: value for name, value in other.provenance.items() if name not in MARKS}
        provenance = own | context.marks(task.declaration) | {"same_as": str(where)}
        try:
            store.link(*task.where, task.recipe, other, provenance)
        except FileNotFoundError:  # it was replaced, or its bytes were dropped, meanwhile
            return False
    return other is not None


def _hits(context: RunContext, tasks: Sequence[Task]) -> dict[tuple[Address, Partition], Artefact]:
    return {task.where: artefact for task in tasks if (artefact := context.hit(task))}
