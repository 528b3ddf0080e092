"""The one builder of SAEs: members, boosting rounds and baselines differ in what they are given, not in how they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, Task, Workplace
from saeens_pipeline.assets.kernels import load_kernels
from saeens_pipeline.assets.live_curves import LiveCurves
from saeens_pipeline.assets.memory import MemoryPlan, Portion, portion_within, train_in_portions
from saeens_pipeline.assets.requirements import require_what_tables_need
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.assets.sources import tokens_of
from saeens_pipeline.assets.specialised import open_documents
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.settings.experiments import MAX_MEMBERS, ExperimentSettings
from saeens_pipeline.storage.activations import ActivationReader, ActivationStatistics, require_free_disk
from saeens_pipeline.storage.checkpoints import checkpoint_file, checkpoint_seconds
from saeens_pipeline.storage.disk import is_full_disk
from saeens_pipeline.storage.names import CURVE_FILE, Address, Kind, Partition
from saeens_pipeline.storage.recipes import Store

if TYPE_CHECKING:
    import torch

    from saeens_models import SAE, SAEConfig
    from saeens_models.training import Checkpoints, CurvePoint

SAE_VERSION = 1
_START = "initial weights"


@dataclass(frozen=True)
class Target:
    """One SAE to train. `width` and `l0` multiply the d_sae and k of `sae`; `init_index` tells initial weights apart.

    `training` comes before the experiment's, field by field.
    """

    kind: Kind
    name: str
    description: str
    init_index: int
    width: int = 1
    l0: int = 1
    sae: Mapping[str, Any] | None = None  # with every default written out; None: that of member 1
    training: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 1  # passes over what it is given, each in an order of its own; schedules are stretched over all
    documents: Mapping[str, Sequence[str]] = field(default_factory=dict)  # labels of those that it is trained on; none: all
    start_from: Reference | None = None  # the SAE whose weights it starts from


def init_seed(ensemble_seed: int, index: int) -> int:
    """Seed of the initial weights of SAE `index` of an ensemble: different for every seed and index."""
    return ensemble_seed * (MAX_MEMBERS + 1) + index


def sae_op(
    name: str,
    experiment: ExperimentSettings,
    targets: Sequence[Target],
    given: Reference,
    *,
    twin: Reference | None = None,
) -> Op:
    """Declare SAEs that are trained together on one stream of `given` (activations or a residual).

    `twin`: an SAE made before these that may have the same recipe. Where it has, or an SAE of another experiment, its files are
    linked instead of training them again. Where several are trained together none has `documents`, `epochs` or `training` of its own.
    """
    outputs = tuple(_declare(experiment, target, given, partial(_seeds, target.init_index), after=twin) for target in targets)

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        to_train = [task for task in tasks if not _adopt(workplace, task, twin)]
        if to_train:
            require_what_tables_need(workplace.store, experiment, to_train[0].partition, texts=targets[0].kind == "bagging")
            _train(workplace, to_train, given, outputs, name)

    return Op(name, outputs, make, on_device=True)


def concurrent_rounds_op(name: str, experiment: ExperimentSettings, rounds: Sequence[Target], given: Reference, *, twin: Reference) -> Op:
    """Declare boosting rounds that are trained in one pass over `given`, each on what those before it leave.

    What decides a round is `given`, the settings and the initial weights of the rounds before it: round 1 is decided as its
    `twin` is, and linked where that is there. No round depends on those after it, and so what is missing is made by training
    all rounds up to the last that is missing.
    """
    first, *later = rounds
    outputs = [_declare(experiment, first, given, partial(_seeds, first.init_index), after=twin)]
    for number, target in enumerate(later, start=1):
        seeds = partial(_seeds_after, tuple(each.init_index for each in rounds[:number]), target.init_index)
        settings: dict[str, Any] = {"boosting": "concurrent"}
        if isinstance(experiment.sae, list):
            settings["saes_before"] = [each.sae for each in rounds[:number]]
        outputs.append(_declare(experiment, target, given, seeds, after=outputs[-1], settings=settings))

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        to_train = [task for task in tasks if not _adopt(workplace, task, twin)]
        if to_train:
            require_what_tables_need(workplace.store, experiment, to_train[0].partition, texts=False)
            _train_rounds(workplace, to_train, given, outputs, name)

    return Op(name, tuple(outputs), make, on_device=True)


def _declare(
    experiment: ExperimentSettings,
    target: Target,
    given: Reference,
    seeds: Callable[[Partition], Mapping[str, Any]],
    *,
    after: Reference | None,
    settings: Mapping[str, Any] | None = None,
) -> Declaration:
    sae = target.sae or experiment.complete_saes[0]
    training = {**experiment.complete_training, **target.training}
    every_sae = {"sae": sae, "training": training, "width": target.width, "l0": target.l0}
    own = ({"documents": target.documents} if target.documents else {}) | ({"epochs": target.epochs} if target.epochs > 1 else {})
    inputs = [Input("activations", given)]
    inputs += [Input("tokens", tokens_of(experiment.source))] if target.documents else []
    inputs += [Input(_START, target.start_from)] if target.start_from else []
    inputs += [Input(after.address.name, after, decides=False)] if after else []
    return Declaration(
        address=Address(experiment.name, target.kind, target.name),
        dimensions="layer_and_seed",
        builder="sae",
        version=SAE_VERSION,
        settings={**every_sae, **own, **(settings or {})},
        partition_settings=seeds,
        inputs=tuple(inputs),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"pytorch"}),
        tags=_tags(experiment, target) | {"architecture": sae["architecture"]},
        description=target.description,
    )


def _seeds(init_index: int, partition: Partition) -> dict[str, int]:
    """The SAEs of one ensemble see the same data in the same order and differ in their initial weights; ensembles differ in both."""
    assert partition.seed is not None, "SAEs are partitioned by layer and seed"
    return {"init_seed": init_seed(partition.seed, init_index), "data_seed": partition.seed}


def _seeds_after(init_indices_before: Sequence[int], init_index: int, partition: Partition) -> dict[str, Any]:
    """Those of a round that is trained concurrently: the initial weights of the rounds before it decide what it is given."""
    assert partition.seed is not None, "SAEs are partitioned by layer and seed"
    return _seeds(init_index, partition) | {"init_seeds_before": [init_seed(partition.seed, index) for index in init_indices_before]}


def validate_targets(experiment: ExperimentSettings, d_in: int) -> None:
    """Raise ConfigurationError if one of the experiment's SAEs cannot be built on activations of this width."""
    pursuit = [experiment.pursuit_sae] if "matching_pursuit" in experiment.baselines else []
    for sae in [*experiment.saes, *pursuit]:
        _config(sae, d_in, width=1, l0=1, seed=0, name=experiment.name)


def config_of(declaration: Declaration, d_in: int) -> SAEConfig:
    """The SAE that a declaration of this module makes of activations of this width, whatever the seed. Raises as `validate_targets`."""
    fields = declaration.settings
    return _config(fields["sae"], d_in, width=fields["width"], l0=fields["l0"], seed=0, name=str(declaration.address))


def _tags(experiment: ExperimentSettings, target: Target) -> dict[str, str]:
    method = target.kind if target.kind != "baseline" else target.name
    return {"experiment": experiment.name, "source": experiment.source, "method": method}


def _adopt(workplace: Workplace, task: Task, twin: Reference | None) -> bool:
    """Link an SAE that was made by this very recipe, if there is one: the twin, or one of any experiment."""
    store, partition = workplace.store, task.partition
    other = store.hit(twin.address, partition, task.recipe) if twin else None
    where, other = (twin.address, other) if twin and other else store.made_alike(*task.where, task.recipe)
    if other:
        store.adopt(*task.where, task.recipe, other, other.provenance | {"same_as": str(where)})
    return other is not None


class _Trained(NamedTuple):
    """An SAE, how its training went, and what that took."""

    sae: SAE
    curve: list[CurvePoint]
    provenance: dict[str, Any]


def _train(workplace: Workplace, tasks: Sequence[Task], given: Reference, outputs: Sequence[Declaration], op_name: str) -> None:
    import saeens_models as sm

    training = _Training(workplace, tasks, given)

    def train(group: Sequence[Task], plan: MemoryPlan) -> None:
        with _checkpoints(workplace, group, outputs, op_name) as checkpoints:
            initial = [_initial(workplace.store, task) for task in group]
            fitted = training.fit(group, partial(sm.train, initial=initial), checkpoints, plan)
            _require_room(workplace, group, fitted)
            for task, trained in zip(group, fitted, strict=True):
                _write(workplace, task, trained, given.address.name)

    train_in_portions(tasks, training.config.batch_tokens, training.first_portion(), train)


def _initial(store: Store, task: Task) -> SAE | None:
    """The SAE that a task's starts from, if there is one."""
    import saeens_models as sm

    start = next((each.artefact for each in task.declaration.inputs if each.name == _START), None)
    return sm.load_sae(store.require(start.address, task.partition).path) if start else None


def _train_rounds(workplace: Workplace, tasks: Sequence[Task], given: Reference, rounds: Sequence[Declaration], op_name: str) -> None:
    """Write the rounds that are asked for. Those before them are trained once more: what they leave at every step is not on disk."""
    import saeens_models as sm

    partition = tasks[0].partition
    asked = {task.declaration.address for task in tasks}
    last = max(number for number, each in enumerate(rounds) if each.address in asked)
    trained_tasks = [Task(each, partition, each.recipe(workplace.store, partition)) for each in rounds[: last + 1]]
    training = _Training(workplace, trained_tasks, given)

    def train(_: Sequence[None], plan: MemoryPlan) -> None:
        with _checkpoints(workplace, trained_tasks, rounds, op_name) as checkpoints:
            fitted = training.fit(trained_tasks, sm.train_boosting_concurrently, checkpoints, plan)
            _require_room(workplace, trained_tasks, fitted)
            for number, (task, trained) in enumerate(zip(trained_tasks, fitted, strict=True)):
                if task.declaration.address in asked:
                    _write(workplace, task, trained, f"residual_{number}" if number else given.address.name)

    # Rounds need each other at every step: the one thing that can be made smaller is the micro-batch.
    train_in_portions([None], training.config.batch_tokens, training.first_portion()._replace(n_saes=1), train)


@contextlib.contextmanager
def _checkpoints(workplace: Workplace, tasks: Sequence[Task], outputs: Sequence[Declaration], op_name: str) -> Iterator[Checkpoints | None]:
    """The checkpoints of these SAEs, which are removed once nothing of the op needs them any more; None where there are to be none."""
    from saeens_models.training import Checkpoints

    seconds = checkpoint_seconds()
    if seconds is None:
        yield None
        return
    file = checkpoint_file(workplace.store.root, op_name, tasks[0].partition)
    recipes, others = [task.recipe.hash for task in tasks], _missing_beside(workplace.store, tasks, outputs)
    checkpoints = Checkpoints(file, interval_seconds=seconds, recipes=recipes, others=others)
    try:
        yield checkpoints
    except Exception as error:
        if is_full_disk(error):
            kept = (
                ""
                if checkpoints.tokens is None
                else f"; {file}, after {checkpoints.tokens:,} tokens, is kept, and training goes on from it"
            )
            raise SaeensError(f"the disk below {workplace.store.root} is full ({error}){kept}: free some space and run again") from error
        raise
    checkpoints.remove()


def _missing_beside(store: Store, tasks: Sequence[Task], outputs: Sequence[Declaration]) -> list[str]:
    """Recipes of what the op makes besides these tasks and has not made yet: they may go on from the same checkpoint."""
    partition, of_tasks = tasks[0].partition, {task.declaration.address for task in tasks}
    recipes = {each.address: each.recipe(store, partition) for each in outputs if each.address not in of_tasks}
    return [recipe.hash for address, recipe in recipes.items() if store.hit(address, partition, recipe) is None]


class _Stream:
    """The shuffled training rows of a reader, batch by batch, on the device; says how far training has come."""

    def __init__(
        self, reader: ActivationReader, batch_tokens: int, device: str, advance: progress.Advance, *, seed: int, epochs: int
    ) -> None:
        self._reader, self._batch_tokens, self._seed, self._epochs = reader, batch_tokens, seed, epochs
        self._device, self._advance = device, advance

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.starting_at(0)

    def starting_at(self, step: int) -> Iterator[torch.Tensor]:
        from saeens_models.training import on_device

        if step:
            self._advance(min(step * self._batch_tokens, self._epochs * self._reader.n_rows("train")), before=True)
        batches = self._reader.batches("train", self._batch_tokens, seed=self._seed, epochs=self._epochs, skipped_batches=step)
        for batch in on_device(batches, self._device):  # which may read one more: progress is that of the training
            self._advance(len(batch))
            yield batch


class _Training:
    """SAEs of some tasks on one stream of `given`: what they are, and the settings that they share."""

    def __init__(self, workplace: Workplace, tasks: Sequence[Task], given: Reference) -> None:
        import saeens_models as sm

        store, partition = workplace.store, tasks[0].partition
        self._workplace, self._tasks = workplace, tasks
        artefact = store.require(given.address, given.narrow(partition))
        self._device = workplace.compute.resolve()
        fields = tasks[0].recipe.settings
        if "documents" in fields:
            reader = open_documents(store, artefact, tasks[0].declaration.source, fields["documents"])
            statistics = reader.statistics("train")
        else:
            reader = open_reader(store, given, partition, self._device)
            statistics = ActivationStatistics.from_json(artefact.provenance["statistics"]["train"])
        self._reader: ActivationReader = reader
        self._data_seed, self._epochs = fields["data_seed"], fields.get("epochs", 1)
        self._n_tokens = statistics.rows * self._epochs
        normalised = fields["training"]["normalize_activations"] != "none"
        self.config = sm.TrainingConfig(
            **fields["training"],
            total_tokens=self._n_tokens,
            input_mean=tuple(statistics.mean.tolist()),
            input_scale=reader.d_in**0.5 / statistics.mean_norm if normalised else None,
        )

    def first_portion(self) -> Portion:
        """What the memory budget of the device lets be tried."""
        configs = [_task_config(task, self._reader.d_in) for task in self._tasks]
        memory_gb, name = self._workplace.compute.memory_gb, str(self._tasks[0].declaration.address)
        return portion_within(memory_gb, configs, self.config.batch_tokens, name)

    def fit(
        self, tasks: Sequence[Task], train: Callable[..., list[SAE]], checkpoints: Checkpoints | None, plan: MemoryPlan
    ) -> list[_Trained]:
        """Train the SAEs of some of the tasks with `sm.train`, or what is called as it is."""
        from saeens_models.training import checkpoint_bytes

        workplace, n_tokens = self._workplace, self._n_tokens
        configs = [_task_config(task, self._reader.d_in) for task in tasks]
        curves: list[list[CurvePoint]] = [[] for _ in tasks]
        live = LiveCurves(workplace, tasks, n_tokens)
        first, last = tasks[0].declaration.address, tasks[-1].declaration.address.name
        label = f"{first}, {tasks[0].partition}" if len(tasks) == 1 else f"{first} to {last}, {tasks[0].partition}"
        needed = sum(4 * (2 * config.d_in + 2) * config.d_sae for config in configs)
        if checkpoints is not None:  # a new one is written beside the one before
            needed = 2 * checkpoint_bytes(configs) - (checkpoints.file.stat().st_size if checkpoints.file.exists() else 0)
        require_free_disk(workplace.store.root, needed, f"training {label}")

        def observe(points: Sequence[CurvePoint]) -> None:
            for curve, point in zip(curves, points, strict=True):
                curve.append(point)
            live.tell(points)

        if self._device == "cpu":
            load_kernels(workplace.store.root, (config.architecture for config in configs))  # not counted as training
        compute = workplace.compute
        with compute.measure() as measured, compute.training_precision(), progress.task(label, n_tokens) as advance:
            stream = _Stream(self._reader, self.config.batch_tokens, self._device, advance, seed=self._data_seed, epochs=self._epochs)
            micro_batch_tokens = plan.portion.micro_batch_tokens
            saes = train(configs, stream, self.config, observe, checkpoints=checkpoints, micro_batch_tokens=micro_batch_tokens)

        flops = [config.train_flops_per_token * n_tokens for config in configs]
        seconds = measured.seconds + (checkpoints.seconds_before if checkpoints else 0)
        of_all = workplace.provenance() | {"train_tokens": n_tokens, "trained_together": len(tasks), "dtype": "float32"}
        if plan.portion.micro_batch_tokens:
            of_all["micro_batch_tokens"] = plan.portion.micro_batch_tokens
        if plan.too_much:
            of_all["out_of_memory_with"] = [str(portion) for portion in plan.too_much]
        if checkpoints and checkpoints.resumed_at_tokens:
            of_all["resumed_at_tokens"] = checkpoints.resumed_at_tokens
        fitted: list[_Trained] = []
        for sae, curve, own_flops in zip(saes, curves, flops, strict=True):
            share = own_flops / sum(flops)
            own = {
                "train_flops": own_flops,
                "train_seconds": seconds * share,
                "peak_memory_bytes": measured.peak_memory_bytes and round(measured.peak_memory_bytes * share),
                "energy_joules": measured.energy_joules and measured.energy_joules * share,
                "inference_flops_per_token": sae.config.inference_flops_per_token,
                "last_step": curve[-1]._asdict(),
            }
            fitted.append(_Trained(sae.cpu(), curve, of_all | own))
        return fitted


def _require_room(workplace: Workplace, tasks: Sequence[Task], fitted: Sequence[_Trained]) -> None:
    """Raise SaeensError, with what is needed, before the first SAE is written rather than after a part of them."""
    needed = sum(weight.nbytes for trained in fitted for weight in trained.sae.state_dict().values())
    require_free_disk(workplace.store.root, needed, f"writing {len(fitted)} SAEs of {tasks[0].declaration.address.owner}")


def _write(workplace: Workplace, task: Task, trained: _Trained, trained_on: str) -> None:
    import polars as pl

    import saeens_models as sm

    metadata = _saelens_metadata(workplace.store, task.declaration.source, task.partition) | {"trained_on": trained_on}
    if "documents" in task.recipe.settings:
        metadata["documents"] = task.recipe.settings["documents"]
    with workplace.store.write_folder(*task.where, task.recipe, trained.provenance) as folder:
        sm.save_sae(trained.sae, folder, metadata)
        pl.DataFrame([point._asdict() for point in trained.curve]).write_parquet(folder / CURVE_FILE)


def _saelens_metadata(store: Store, source: str, partition: Partition) -> dict[str, Any]:
    """What SAELens and SAEBench look for: which activations of which model the SAE is an SAE of."""
    activations = store.require(Address(source, "source", "activations"), Partition(partition.layer)).recipe["settings"]
    tokens = store.require(Address(source, "source", "tokens"), Partition()).recipe["settings"]
    hook, layer = activations["hook"], partition.layer
    return {
        "model_name": activations["language_model"],
        "hook_name": hook.format(layer=layer) if "{layer}" in hook else f"blocks.{layer}.hook_{hook}",
        "hook_layer": layer,
        "context_size": tokens["context_length"],
        "dataset_path": tokens["corpus"]["corpus"],
        "weights": activations["weights"],
    }


def _task_config(task: Task, d_in: int) -> SAEConfig:
    fields = task.recipe.settings
    return _config(
        fields["sae"], d_in, width=fields["width"], l0=fields["l0"], seed=fields["init_seed"], name=str(task.declaration.address)
    )


def _config(sae: dict[str, Any], d_in: int, *, width: int, l0: int, seed: int, name: str) -> SAEConfig:
    """The experiment's SAE made whole: its width now that d_in is known, times what the target asks for."""
    from pydantic import ValidationError

    import saeens_models as sm

    own = {field: value for field, value in sae.items() if field not in ("expansion", "d_sae")}
    d_sae = sae.get("d_sae") or sae["expansion"] * d_in
    try:
        config = sm.SAEConfig(**own, d_in=d_in, d_sae=d_sae * width, init_seed=seed)
        return config.with_l0_multiplied(l0) if l0 > 1 else config
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise ConfigurationError(f"{name}: attributes.sae cannot be built for activations of width {d_in}: {reasons}") from None
