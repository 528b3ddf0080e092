"""The one builder of SAEs: members, boosting rounds and baselines differ in what they are given, not in how they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, Task, Workplace
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.components.ensemble_experiment import MAX_MEMBERS, ExperimentSettings
from saeens_pipeline.errors import ConfigurationError
from saeens_pipeline.storage.activations import ActivationStatistics
from saeens_pipeline.storage.names import Address, Kind, Partition
from saeens_pipeline.storage.recipes import Store

if TYPE_CHECKING:
    from saeens_models import SAE, SAEConfig
    from saeens_models.training import CurvePoint

SAE_VERSION = 1
CURVE_FILE = "training_curve.parquet"


@dataclass(frozen=True)
class Target:
    """One SAE to train. `width` and `l0` multiply the experiment's d_sae and k; `init_index` tells initial weights apart."""

    kind: Kind
    name: str
    description: str
    init_index: int
    width: int = 1
    l0: int = 1


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

    `twin`: an SAE made before these that may have the same recipe. Where it has, its files are linked instead of training
    them again.
    """
    outputs = tuple(_declare(experiment, target, given, partial(_seeds, target.init_index), after=twin) for target in targets)

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        to_train = [task for task in tasks if not _adopt(workplace, task, twin)]
        if to_train:
            _train(workplace, to_train, given)

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
        outputs.append(_declare(experiment, target, given, seeds, after=outputs[-1], settings={"boosting": "concurrent"}))

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        to_train = [task for task in tasks if not _adopt(workplace, task, twin)]
        if to_train:
            _train_rounds(workplace, to_train, given, outputs)

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
    every_sae = {"sae": experiment.complete_sae, "training": experiment.complete_training, "width": target.width, "l0": target.l0}
    return Declaration(
        address=Address(experiment.name, target.kind, target.name),
        dimensions="layer_and_seed",
        builder="sae",
        version=SAE_VERSION,
        settings={**every_sae, **(settings or {})},
        partition_settings=seeds,
        inputs=(Input("activations", given), *([Input(after.address.name, after, decides=False)] if after else [])),
        source=experiment.source,
        seeds=tuple(experiment.ensemble.seeds),
        kinds=frozenset({"pytorch"}),
        tags=_tags(experiment, target),
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
    """Raise ConfigurationError if the experiment's SAE cannot be built on activations of this width."""
    _config(experiment.sae, d_in, width=1, l0=1, seed=0, name=experiment.name)


def _tags(experiment: ExperimentSettings, target: Target) -> dict[str, str]:
    method = target.kind if target.kind != "baseline" else target.name
    return {"experiment": experiment.name, "source": experiment.source, "method": method, "architecture": experiment.sae["architecture"]}


def _adopt(workplace: Workplace, task: Task, twin: Reference | None) -> bool:
    other = workplace.store.hit(twin.address, task.partition, task.recipe) if twin else None
    if twin and other:
        workplace.store.adopt(
            task.declaration.address, task.partition, task.recipe, other, other.provenance | {"same_as": str(twin.address)}
        )
    return other is not None


class _Trained(NamedTuple):
    """An SAE, how its training went, and what that took."""

    sae: SAE
    curve: list[CurvePoint]
    provenance: dict[str, Any]


def _train(workplace: Workplace, tasks: Sequence[Task], given: Reference) -> None:
    import saeens_models as sm

    for task, trained in zip(tasks, _fit(workplace, tasks, given, sm.train), strict=True):
        _write(workplace, task, trained, given.address.name)


def _train_rounds(workplace: Workplace, tasks: Sequence[Task], given: Reference, rounds: Sequence[Declaration]) -> None:
    """Write the rounds that are asked for. Those before them are trained once more: what they leave at every step is not on disk."""
    import saeens_models as sm

    partition = tasks[0].partition
    asked = {task.declaration.address for task in tasks}
    last = max(number for number, each in enumerate(rounds) if each.address in asked)
    trained_tasks = [Task(each, partition, each.recipe(workplace.store, partition)) for each in rounds[: last + 1]]
    fitted = _fit(workplace, trained_tasks, given, sm.train_boosting_concurrently)
    for number, (task, trained) in enumerate(zip(trained_tasks, fitted, strict=True)):
        if task.declaration.address in asked:
            _write(workplace, task, trained, f"residual_{number}" if number else given.address.name)


def _fit(workplace: Workplace, tasks: Sequence[Task], given: Reference, train: Callable[..., list[SAE]]) -> list[_Trained]:
    """Train the SAEs of some tasks on one stream of `given` with `sm.train`, or what is called as it is."""
    import saeens_models as sm
    from saeens_models.training import load_kernels

    store, partition = workplace.store, tasks[0].partition
    artefact = store.require(given.address, given.narrow(partition))
    statistics = ActivationStatistics.from_json(artefact.provenance["statistics"]["train"])
    device = workplace.compute.resolve()
    reader = open_reader(store, given, partition, device)
    configs = [_task_config(task, reader.d_in) for task in tasks]
    fields = tasks[0].recipe.settings
    normalised = fields["training"]["normalize_activations"] != "none"
    training = sm.TrainingConfig(
        **fields["training"],
        total_tokens=statistics.rows,
        input_mean=tuple(statistics.mean.tolist()),
        input_scale=reader.d_in**0.5 / statistics.mean_norm if normalised else None,
    )
    curves: list[list[CurvePoint]] = [[] for _ in tasks]
    first, last = tasks[0].declaration.address, tasks[-1].declaration.address.name
    label = f"{first}, {partition}" if len(tasks) == 1 else f"{first} to {last}, {partition}"

    if device == "cpu":
        load_kernels()  # not counted as training
    with workplace.compute.measure() as measured, progress.task(label, statistics.rows) as advance:

        def batches():
            for batch in reader.batches("train", training.batch_tokens, seed=fields["data_seed"]):
                advance(len(batch))
                yield batch.to(device)

        def observe(points: Sequence[CurvePoint]) -> None:
            for curve, point in zip(curves, points, strict=True):
                curve.append(point)

        saes = train(configs, batches(), training, observe)

    flops = [config.train_flops_per_token * statistics.rows for config in configs]
    fitted: list[_Trained] = []
    for sae, curve, own_flops in zip(saes, curves, flops, strict=True):
        share = own_flops / sum(flops)
        provenance = workplace.provenance() | {
            "train_tokens": statistics.rows,
            "train_flops": own_flops,
            "train_seconds": measured.seconds * share,
            "peak_memory_bytes": measured.peak_memory_bytes and round(measured.peak_memory_bytes * share),
            "trained_together": len(tasks),
            "inference_flops_per_token": sae.config.inference_flops_per_token,
            "dtype": "float32",
            "last_step": curve[-1]._asdict(),
        }
        fitted.append(_Trained(sae.cpu(), curve, provenance))
    return fitted


def _write(workplace: Workplace, task: Task, trained: _Trained, trained_on: str) -> None:
    import polars as pl

    import saeens_models as sm

    metadata = _saelens_metadata(workplace.store, task.declaration.source, task.partition) | {"trained_on": trained_on}
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
        "dataset_path": tokens["corpus"],
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
