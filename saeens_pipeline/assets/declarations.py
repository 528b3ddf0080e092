"""Declarations of artefacts and of the ops that compute them. Recipes, cache hits, staleness, assets and lineage are derived from them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from saeens_pipeline.assets.compute import Compute
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.settings.experiments import CheckSettings, ExperimentSettings
from saeens_pipeline.settings.files import recorded_file
from saeens_pipeline.settings.sources import SourceSettings
from saeens_pipeline.storage.names import Address, Kind, Partition
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Recipe, Store, digest

Dimensions = Literal["none", "layer", "layer_and_seed"]
FORCED = "forced"  # key in records: the request for which an artefact was computed anew
CHANGED = "set_on_command_line"  # key in records: fields of the experiment file and their values
MARKS = ("experiment_file", CHANGED, FORCED)  # keys in records that a link does not take from the artefact that it links to
DIMENSION_NAMES: dict[Dimensions, tuple[str, ...]] = {"none": (), "layer": ("layer",), "layer_and_seed": ("layer", "seed")}


@dataclass(frozen=True)
class Reference:
    """A reference to an artefact: its address and its partition dimensions."""

    address: Address
    dimensions: Dimensions

    def narrow(self, partition: Partition) -> Partition:
        """Return a partition without the dimensions that this artefact lacks: activations have no seed."""
        own = DIMENSION_NAMES[self.dimensions]
        return Partition(**{name: value for name, value in partition._asdict().items() if name in own})

    def require(self, store: Store, partition: Partition) -> Artefact:
        """Return the artefact of a partition, narrowed. Raises MissingInputError if it does not exist."""
        return store.require(self.address, self.narrow(partition))


@dataclass(frozen=True)
class Input:
    """One input of an artefact."""

    name: str
    artefact: Reference
    decides: bool = True
    """True: part of the recipe. False: it has to exist first, and does not change the recipe."""
    optional: bool = False
    """True: nothing waits for it. Its partitions on disk are part of the recipe; missing ones are left out."""
    in_graph: bool = True
    """True: a dependency in Dagster's graph. False for a control's tables: their layers are of another source and cannot be mapped."""


class ExternalData(NamedTuple):
    """Data that an artefact is computed from and that no op computes, such as the files of a language model."""

    description: str
    settings: tuple[str, ...]
    """Names of the settings in recipes that hold its identity: hashes of files, or a commit."""

    def version(self, settings: Mapping[str, Any]) -> str:
        """Return a hash of the identity in the settings of a recipe."""
        return digest([settings[name] for name in self.settings if name in settings])


@dataclass(frozen=True)
class Declaration(Reference):
    """One artefact: the settings and inputs that decide its content, and its description in the asset graph.

    The first line of `description` has at most 60 characters and begins with the difference from neighbouring assets.
    """

    builder: str
    version: int
    settings: Mapping[str, Any]
    """Equal for all partitions; part of Dagster's code version."""
    inputs: tuple[Input, ...]
    description: str
    source: str
    seeds: tuple[int, ...] = ()
    partition_settings: Callable[[Partition], Mapping[str, Any]] = field(default=lambda partition: {})
    """Settings that depend on the partition, such as seeds."""
    unavailable: Callable[[], Mapping[str, Any]] = field(default=dict)
    """Return the missing parts of this machine, such as an endpoint, as settings of the recipe. An artefact computed without a part is
    stale once no part is missing; an artefact computed with all parts stays a cache hit."""
    external: Mapping[str, ExternalData] = field(default_factory=dict)
    """External data that it is computed from, by name: the source's `language_model` or `corpus`."""
    kinds: frozenset[str] = frozenset()
    tags: Mapping[str, str] = field(default_factory=dict)
    experiment_file: str = ""
    """The file that declares it. The record keeps this path, so that `saeens gc` can find artefacts of files that are no longer read."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of that file with values from the command line; the record keeps them, too."""

    @property
    def code_version(self) -> str:
        """Return Dagster's code version: a hash of builder, version and settings."""
        return digest([self.builder, self.version, dict(self.settings)])

    def input_partitions(self, partition: Partition, *, optional: bool = False) -> Iterator[tuple[str, Reference, Partition]]:
        """Yield name, artefact and partition of the recipe's inputs: the required ones or, with `optional`, the optional ones.

        An artefact that compares seeds has one input for each seed.
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
        """Yield the optional inputs that are intact on disk: name, artefact, partition and record.

        An artefact without partitions has all partitions of its inputs as inputs, if their seeds are still declared.
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

    def all_inputs(self, store: Store, partition: Partition) -> Iterator[tuple[str, Reference, Partition]]:
        """Yield name, artefact and partition of the recipe's inputs, required ones and optional ones on disk."""
        yield from self.input_partitions(partition)
        yield from ((name, artefact, where) for name, artefact, where, _ in self.optional_inputs(store, partition))

    def ancestors(self, partition: Partition) -> set[tuple[Address, Partition]]:
        """Return address and partition of all required inputs, and of theirs: an op may read the members of its input, an ensemble."""
        found: set[tuple[Address, Partition]] = set()
        pending: list[tuple[Declaration, Partition]] = [(self, partition)]
        while pending:
            declaration, where = pending.pop()
            for _, artefact, of in declaration.input_partitions(where):
                if (artefact.address, of) not in found and isinstance(artefact, Declaration):
                    pending.append((artefact, of))
                found.add((artefact.address, of))
        return found

    def recipe(self, store: Store, partition: Partition) -> Recipe:
        """Return the recipe of this artefact with the present settings and inputs. Raises MissingInputError for a missing input."""
        inputs = {name: store.require(artefact.address, where).data_version for name, artefact, where in self.input_partitions(partition)}
        inputs |= {name: artefact.data_version for name, _, _, artefact in self.optional_inputs(store, partition)}
        recipe = Recipe(self.builder, self.version, {**self.settings, **self.partition_settings(partition)}, inputs)
        unavailable = self.unavailable()
        if not unavailable or store.hit(self.address, partition, recipe):
            return recipe
        return replace(recipe, settings={**recipe.settings, **unavailable})


def fields_of(
    experiment: ExperimentSettings, kind: Kind, name: str, dimensions: Dimensions = "layer_and_seed", **tags: str
) -> dict[str, Any]:
    """Return the fields of a declaration that follow from its experiment."""
    return {
        "address": Address(experiment.name, kind, name),
        "dimensions": dimensions,
        "source": experiment.source,
        "seeds": tuple(experiment.ensemble.seeds),
        "tags": {"experiment": experiment.name, "source": experiment.source, **tags},
    }


def changes_in(record: Mapping[str, Any]) -> str:
    """Return the fields that were set on the command line, as a record has them: `sae.k=8`; empty without any."""
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in record.get(CHANGED, {}).items())


class Force(NamedTuple):
    """A request to compute artefacts anew although they are cache hits.

    The record of an artefact that was computed for it has `request`: from then on it is a hit, for the other steps and runs of the request.
    `assets`: their addresses as text; without any, all that a run selects.
    """

    request: str
    assets: frozenset[str] = frozenset()

    def concerns(self, declaration: Declaration) -> bool:
        """Return whether an artefact is to be computed anew: not one that this machine could only compute in part."""
        return (not self.assets or str(declaration.address) in self.assets) and not declaration.unavailable()


class RunContext(NamedTuple):
    """The store, the device and the run that an op works with, two callbacks into Dagster, and what is computed anew."""

    store: Store
    compute: Compute
    run_id: str
    requested_layers: Callable[[], Collection[int]]
    """Return the layers that waiting runs request; an op may compute them in the same pass."""
    observe: Callable[[Declaration, Partition, Mapping[str, Any]], None]
    """Show metadata in the UI while the op runs."""
    force: Force | None = None

    def provenance(self, declaration: Declaration) -> dict[str, Any]:
        """Return the fields that all records of this run share."""
        return {"run_id": self.run_id, **self.compute.describe(), **self.marks(declaration)}

    def marks(self, declaration: Declaration) -> dict[str, Any]:
        """Return the fields `MARKS` of a record."""
        forced = {FORCED: self.force.request} if self.force and self.force.concerns(declaration) else {}
        changed = {CHANGED: dict(declaration.changes)} if declaration.changes else {}
        return {"experiment_file": declaration.experiment_file} | changed | forced

    def is_done(self, declaration: Declaration, artefact: Artefact) -> bool:
        """Return whether an artefact with the right recipe is a hit: not before it is computed anew, if that is requested."""
        return not self.force or not self.force.concerns(declaration) or artefact.provenance.get(FORCED) == self.force.request

    def hit(self, task: Task) -> Artefact | None:
        """Return the artefact of a task if it is a cache hit."""
        artefact = self.store.hit(*task.where, task.recipe)
        return artefact if artefact and self.is_done(task.declaration, artefact) else None


class Task(NamedTuple):
    """One artefact to compute, with its recipe."""

    declaration: Declaration
    partition: Partition
    recipe: Recipe

    @property
    def where(self) -> tuple[Address, Partition]:
        """Return address and partition."""
        return self.declaration.address, self.partition


class SourceFacts(NamedTuple):
    """Facts about a source that preflights need, from its settings or from the records of its activations and tokens."""

    describe_model: Callable[[], LanguageModelDescription]
    hook: str
    drop: Sequence[Any]
    """Dropped positions."""
    d_in: int | None
    """Width of the activations; None if it is known only when the language model runs."""
    tokens: Path | None
    """Folder of the tokens; None before a run that may write them."""
    prepend_bos: bool = False
    patching_problem: str = ""
    """Why activations at the hook cannot be replaced, which was tested when they were computed; empty if they can, and before that."""


Facts = Callable[[], SourceFacts]
Wanted = Sequence[tuple[Declaration, Partition]]


@dataclass(frozen=True)
class Op:
    """A builder of one artefact, or of several together."""

    name: str
    outputs: tuple[Declaration, ...]
    make: Callable[[RunContext, Sequence[Task]], None]
    """Write the artefact of every task; tasks are cache misses only."""
    on_device: bool = False
    preflight: Callable[[Store, Wanted, Facts], None] = field(default=lambda *_: None)
    """Raise SaeensError, before any work, for settings or inputs with which these artefacts, or later ones, would fail.

    `saeens run` calls it before its first stage, and the driver before `make`. The facts are read on demand."""
    links: bool = False
    """True: an existing artefact with an equal recipe, of any experiment, is linked instead of computed again."""
    needs_bytes: bool = False
    """True: an artefact whose bytes were dropped is not linked."""
    settle: Callable[[RunContext, Task], None] = field(default=lambda context, task: None)
    """Drop the bytes that are not kept, once an artefact is computed or linked."""
    twin: Reference | None = None
    """An earlier artefact whose recipe may be equal: the first candidate for a link."""
    checks: CheckSettings = field(default_factory=CheckSettings)
    """Thresholds of health warnings."""


def with_file(ops: Iterable[Op], settings: SourceSettings | ExperimentSettings) -> list[Op]:
    """Return the ops with the path of the experiment file, and changes of its fields, in the declarations of their outputs."""
    file, changes = recorded_file(settings.file), {each.field: each.value for each in settings.changes}
    return [replace(op, outputs=tuple(replace(each, experiment_file=file, changes=changes) for each in op.outputs)) for op in ops]
