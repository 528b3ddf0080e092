"""Training of SAEs: streams of activations, checkpoints, memory, files, records and live curves. Training steps are in `saeens_models`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import polars as pl
import torch

import saeens_models as sm
from saeens_models import SAE, Cluster, SAEConfig
from saeens_models.consensus import find_clusters, initial_consensus, with_width
from saeens_models.interop import with_input_bias
from saeens_models.training import Checkpoints, CurvePoint, checkpoint_bytes, on_device
from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Reference, RunContext, Task
from saeens_pipeline.assets.kernels import load_kernels
from saeens_pipeline.assets.memory import MemoryPlan, Portion, portion_within, train_in_portions
from saeens_pipeline.assets.readers import open_activations, open_reader, tokens_of_activations
from saeens_pipeline.assets.sae_recipes import START, sae_config
from saeens_pipeline.assets.sources import activations_of, sae_metadata
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics
from saeens_pipeline.storage.checkpoints import checkpoint_file, checkpoint_seconds
from saeens_pipeline.storage.disk import is_full_disk, require_free_disk
from saeens_pipeline.storage.names import CLUSTERS_FILE, CURVE_FILE, Address, Partition, place
from saeens_pipeline.storage.recipes import Artefact, Store
from saeens_pipeline.storage.selection import SelectedDocuments

MOST_OBSERVATIONS = 30
"""Largest number of live observations of one SAE: those of an asset share one time axis and fill its page of events."""
MIXING_CHUNKS = {False: 64, True: 256}
"""Chunks whose rows are shuffled together, scattered or contiguous. Contiguous ones have the rows of fewer documents."""
INTERVAL_SECONDS = 30.0
"""Time between two: each costs about 0.04 s, and a training of less than a minute needs none."""


class _Trained(NamedTuple):
    """A trained SAE, its training curve, and the fields of its record."""

    sae: SAE
    curve: list[CurvePoint]
    provenance: dict[str, Any]


def train_saes(context: RunContext, tasks: Sequence[Task], given: Reference, outputs: Sequence[Declaration], op_name: str) -> None:
    """Train the SAEs of these tasks together on one stream of `given`, and write them."""
    training = _Training(context, tasks, given)

    def train(group: Sequence[Task], plan: MemoryPlan) -> None:
        with _checkpoints(context, group, outputs, op_name) as checkpoints:
            initial = [training.start(task).initial for task in group]
            fitted = training.fit(group, partial(sm.train, initial=initial), checkpoints, plan)
            _require_room(context, group, fitted)
            for task, trained in zip(group, fitted, strict=True):
                _write(context, task, trained, given.address.name, training.start(task).clusters)

    train_in_portions(tasks, training.config.batch_tokens, training.first_portion(), train)


class _Start(NamedTuple):
    """Configuration and initial weights of an SAE."""

    config: SAEConfig
    initial: SAE | None
    clusters: Sequence[Cluster] = ()
    """The members' features that each feature of a consensus stands for."""


def _start(store: Store, task: Task, d_in: int) -> _Start:
    """Return the start of a training. Raises SaeensError for a consensus of members without a common feature."""
    fields, inputs = task.recipe.settings, {each.name: each.artefact for each in task.declaration.inputs}
    config = sae_config(fields["sae"], d_in, seed=fields["init_seed"], name=str(task.declaration.address))
    if "consensus" not in fields:
        return _Start(config, _initial(config, inputs[START].require(store, task.partition), task) if START in inputs else None)
    saes = [sm.load_sae(each.require(store, task.partition).path) for name, each in inputs.items() if name.startswith("member_")]
    settings = dict(fields["consensus"])
    from_scratch = settings.pop("from_scratch", False)
    clusters = find_clusters([sae.W_dec for sae in saes], **settings)
    if not clusters:
        raise SaeensError(
            f"{place(*task.where)}: no feature of a member has a cosine of {settings['threshold']:g} to one of another member: there is no "
            "consensus. Train longer, or leave consensus and consensus_matched out of baselines"
        )
    if from_scratch:
        return _Start(with_width(config, len(clusters)), None)
    initial = initial_consensus(saes, clusters, config)
    return _Start(initial.config, initial, clusters)


def _initial(config: SAEConfig, start_from: Artefact, task: Task) -> SAE:
    """Return the SAE whose weights a training starts from, in the form of `config`: it may subtract b_dec from its input or not.

    Raises ConfigurationError for another shape, which a published SAE may have.
    """
    sae = sm.load_sae(start_from.path)
    own, start = (f"{each.architecture} with {each.d_sae} features" for each in (config, sae.config))
    try:
        if own != start:
            raise ValueError("these have to be equal")
        return with_input_bias(sae, config.apply_b_dec_to_input)
    except ValueError as error:
        raise ConfigurationError(f"{place(*task.where)} is {own}, and cannot start from {start} in {start_from.path}: {error}") from error


def train_rounds(context: RunContext, tasks: Sequence[Task], given: Reference, rounds: Sequence[Declaration], op_name: str) -> None:
    """Train boosting rounds concurrently and write the rounds of these tasks.

    Earlier rounds are trained again, because their residual at every step is not on disk.
    """
    partition = tasks[0].partition
    asked = {task.declaration.address for task in tasks}
    last = max(number for number, each in enumerate(rounds) if each.address in asked)
    trained_tasks = [Task(each, partition, each.recipe(context.store, partition)) for each in rounds[: last + 1]]
    training = _Training(context, trained_tasks, given)

    def train(_: Sequence[None], plan: MemoryPlan) -> None:
        with _checkpoints(context, trained_tasks, rounds, op_name) as checkpoints:
            scale = trained_tasks[-1].recipe.settings.get("boosting_scale", "shared")
            fitted = training.fit(trained_tasks, partial(sm.train_boosting_concurrently, boosting_scale=scale), checkpoints, plan)
            _require_room(context, trained_tasks, fitted)
            for number, (task, trained) in enumerate(zip(trained_tasks, fitted, strict=True)):
                if task.declaration.address in asked:
                    _write(context, task, trained, f"residual_{number}" if number else given.address.name)

    # Rounds need each other at every step, so only the micro-batch can be made smaller.
    train_in_portions([None], training.config.batch_tokens, training.first_portion()._replace(n_saes=1), train)


@contextlib.contextmanager
def _checkpoints(context: RunContext, tasks: Sequence[Task], outputs: Sequence[Declaration], op_name: str) -> Iterator[Checkpoints | None]:
    """Yield the checkpoints of these SAEs, and remove them after success; None if checkpoints are switched off."""
    seconds = checkpoint_seconds()
    if seconds is None:
        yield None
        return
    store, partition, of_tasks = context.store, tasks[0].partition, [task.declaration.address for task in tasks]
    file = checkpoint_file(store.root, op_name, partition)
    beside = {each.address: each.recipe(store, partition) for each in outputs if each.address not in of_tasks}
    others = [recipe.hash for address, recipe in beside.items() if store.hit(address, partition, recipe) is None]  # may resume from it too
    checkpoints = Checkpoints(file, interval_seconds=seconds, recipes=[task.recipe.hash for task in tasks], others=others)
    try:
        yield checkpoints
    except Exception as error:
        if is_full_disk(error):
            done = checkpoints.tokens
            kept = "" if done is None else f"; {file}, after {done:,} tokens, is kept, and training resumes from it"
            raise SaeensError(f"the disk below {store.root} is full ({error}){kept}: free some space and run again") from error
        raise
    checkpoints.remove()


def _open_documents(
    store: Store, activations: Reference, partition: Partition, labels: Mapping[str, Sequence[str]], device: str
) -> SelectedDocuments:
    """Open the training rows of the documents with these labels. Raises SaeensError for activations of other tokens."""
    tokens = tokens_of_activations(store, activations.address.owner, activations.require(store, partition))
    documents = open_tokens(tokens.path).documents_with("train", labels)
    return SelectedDocuments(open_activations(store, activations, partition, device), "train", documents)


@dataclass(frozen=True)
class _Stream:
    """The shuffled training rows of a reader, in batches on the device, with progress."""

    reader: ActivationReader
    batch_tokens: int
    device: str
    advance: progress.Advance
    seed: int
    epochs: int
    contiguous: bool

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[torch.Tensor]:
        if step:
            self.advance(min(step * self.batch_tokens, self.epochs * self.reader.n_rows("train")), before=True)
        batches = self.reader.batches(
            "train",
            self.batch_tokens,
            seed=self.seed,
            epochs=self.epochs,
            mixing_chunks=MIXING_CHUNKS[self.contiguous],
            contiguous=self.contiguous,
            skipped_batches=step,
            as_stored=torch.device(self.device).type != "cpu",
        )
        for batch in on_device(
            batches, self.device, torch.float32
        ):  # this may read one batch ahead: progress counts batches of the training
            self.advance(len(batch))
            yield batch


class _LiveCurves:
    """Observations in Dagster of the SAEs of some tasks, at most `MOST_OBSERVATIONS` over `n_tokens`."""

    def __init__(self, context: RunContext, tasks: Sequence[Task], n_tokens: int) -> None:
        self._context, self._tasks, self._n_tokens = context, tasks, n_tokens
        self._told, self._told_at = 0, time.monotonic()

    def tell(self, points: Sequence[CurvePoint]) -> None:
        """Report one point for each SAE if an observation is due."""
        due = points[0].tokens * MOST_OBSERVATIONS // self._n_tokens
        if due <= self._told or time.monotonic() - self._told_at < INTERVAL_SECONDS:
            return
        for task, point in zip(self._tasks, points, strict=True):
            values = {
                "tokens": point.tokens,
                "loss": point.loss,
                "explained variance": round(point.explained_variance, 4),
                "L0 [features per token]": round(point.l0, 2),
                "dead features": round(point.dead_features, 4),
                "learning rate": point.learning_rate,
            }
            self._context.observe(task.declaration, task.partition, values)
        self._told, self._told_at = due, time.monotonic()


class _Training:
    """The training of some tasks' SAEs on one stream of `given`: reader, device and shared settings."""

    def __init__(self, context: RunContext, tasks: Sequence[Task], given: Reference) -> None:
        store, partition = context.store, tasks[0].partition
        self._context, self._tasks = context, tasks
        artefact = given.require(store, partition)
        self._device = context.compute.resolve()
        fields = tasks[0].recipe.settings
        if "documents" in fields:
            reader = _open_documents(store, given, partition, fields["documents"], self._device)
            statistics = reader.statistics("train")
        else:
            reader = open_reader(store, given, partition, self._device)
            statistics = ActivationStatistics.from_json(artefact.provenance["statistics"]["train"])
        self._reader: ActivationReader = reader
        self._data_seed, self._epochs = fields["data_seed"], fields.get("epochs", 1)
        self._contiguous = fields.get("mixing") == "contiguous"
        self._n_tokens = statistics.rows * self._epochs
        mean_norm = statistics.mean_norm
        if fields.get("boosting_scale") == "shared":
            activations = activations_of(tasks[0].declaration.source).require(store, partition)
            mean_norm = ActivationStatistics.from_json(activations.provenance["statistics"]["train"]).mean_norm
        normalised = fields["training"]["normalize_activations"] != "none"
        self._starts: dict[Address, _Start] = {}
        self.config = sm.TrainingConfig(
            **fields["training"],
            total_tokens=self._n_tokens,
            input_mean=tuple(statistics.mean.tolist()),
            input_scale=reader.d_in**0.5 / mean_norm if normalised else None,
        )

    def start(self, task: Task) -> _Start:
        """Return configuration and initial weights of a task's SAE."""
        address = task.declaration.address
        if address not in self._starts:
            self._starts[address] = _start(self._context.store, task, self._reader.d_in)
        return self._starts[address]

    def first_portion(self) -> Portion:
        """Return the largest portion within the memory budget of the device."""
        configs = [self.start(task).config for task in self._tasks]
        memory_gb, name = self._context.compute.memory_gb, str(self._tasks[0].declaration.address)
        return portion_within(memory_gb, configs, self.config.batch_tokens, name)

    def fit(
        self, tasks: Sequence[Task], train: Callable[..., list[SAE]], checkpoints: Checkpoints | None, plan: MemoryPlan
    ) -> list[_Trained]:
        """Train the SAEs of some tasks with `sm.train` or a function with the same signature."""
        context, n_tokens = self._context, self._n_tokens
        configs = [self.start(task).config for task in tasks]
        curves: list[list[CurvePoint]] = [[] for _ in tasks]
        live = _LiveCurves(context, tasks, n_tokens)
        first, last = tasks[0].declaration.address, tasks[-1].declaration.address.name
        label = f"{first}, {tasks[0].partition}" if len(tasks) == 1 else f"{first} to {last}, {tasks[0].partition}"
        needed = sum(4 * (2 * config.d_in + 2) * config.d_sae for config in configs)
        if checkpoints is not None:  # a new checkpoint is written before the previous one is removed
            needed = 2 * checkpoint_bytes(configs) - (checkpoints.file.stat().st_size if checkpoints.file.exists() else 0)
        require_free_disk(context.store.root, needed, f"training {label}")

        def observe(points: Sequence[CurvePoint]) -> None:
            for curve, point in zip(curves, points, strict=True):
                curve.append(point)
            live.tell(points)

        if self._device == "cpu":
            load_kernels(context.store.root, (config.architecture for config in configs))  # not counted as training
        compute = context.compute
        with compute.measure() as measured, compute.training_precision(), progress.task(label, n_tokens) as advance:
            stream = _Stream(self._reader, self.config.batch_tokens, self._device, advance, self._data_seed, self._epochs, self._contiguous)
            micro_batch_tokens = plan.portion.micro_batch_tokens
            saes = train(configs, stream, self.config, observe, checkpoints=checkpoints, micro_batch_tokens=micro_batch_tokens)

        flops = [config.train_flops_per_token * n_tokens for config in configs]
        seconds = measured.seconds + (checkpoints.seconds_before if checkpoints else 0)
        of_all = context.provenance(tasks[0].declaration) | {"train_tokens": n_tokens, "trained_together": len(tasks), "dtype": "float32"}
        others = {
            "micro_batch_tokens": micro_batch_tokens,
            "out_of_memory_with": [str(portion) for portion in plan.too_much],
            "resumed_at_tokens": checkpoints and checkpoints.resumed_at_tokens,
        }
        of_all |= {name: value for name, value in others.items() if value}
        fitted: list[_Trained] = []
        for task, sae, curve, own_flops in zip(tasks, saes, curves, flops, strict=True):
            share = own_flops / sum(flops)
            own = {
                "train_flops": own_flops,
                "train_seconds": seconds * share,
                "peak_memory_bytes": measured.peak_memory_bytes and round(measured.peak_memory_bytes * share),
                "energy_joules": measured.energy_joules and measured.energy_joules * share,
                "inference_flops_per_token": sae.config.inference_flops_per_token,
                "last_step": curve[-1]._asdict(),
            }
            fitted.append(_Trained(sae.cpu(), curve, of_all | context.marks(task.declaration) | own))
        return fitted


def _require_room(context: RunContext, tasks: Sequence[Task], fitted: Sequence[_Trained]) -> None:
    """Raise SaeensError, before the first SAE is written, if the disk has no room for all of them."""
    needed = sum(weight.nbytes for trained in fitted for weight in trained.sae.state_dict().values())
    require_free_disk(context.store.root, needed, f"writing {len(fitted)} SAEs of {tasks[0].declaration.address.owner}")


def _write(context: RunContext, task: Task, trained: _Trained, trained_on: str, clusters: Sequence[Cluster] = ()) -> None:
    """Write an SAE with the metadata of its source, its curve and the clusters of a consensus."""
    metadata = sae_metadata(context.store, task.declaration.source, task.partition) | {"trained_on": trained_on}
    if "documents" in task.recipe.settings:
        metadata["documents"] = task.recipe.settings["documents"]
    with context.store.write_folder(*task.where, task.recipe, trained.provenance) as folder:
        sm.save_sae(trained.sae, folder, metadata)
        pl.DataFrame([point._asdict() for point in trained.curve]).write_parquet(folder / CURVE_FILE)
        if clusters:
            _cluster_table(clusters).write_parquet(folder / CLUSTERS_FILE)


def _cluster_table(clusters: Sequence[Cluster]) -> pl.DataFrame:
    """Return a row for each feature of a member that is in a cluster: feature of the consensus, member from 1, index there from 0."""
    rows = [
        (feature, member + 1, index, place == cluster.representative)
        for feature, cluster in enumerate(clusters)
        for place, (member, index) in enumerate(cluster.features)
    ]
    return pl.DataFrame(rows, schema=["feature", "member", "index", "is_representative"], orient="row")
