"""The evaluation tables of an experiment: one pass over the test activations fills those that need one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Input, Op, Reference, Task, Workplace
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.assets.sources import language_model_of, tokens_of
from saeens_pipeline.errors import ConfigurationError, SaeensError
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import CURVE_FILE, Address, Partition
from saeens_pipeline.storage.recipes import Artefact, Store
from saeens_pipeline.storage.tables import TABLES, frame

if TYPE_CHECKING:
    from torch import Tensor

    from saeens_models.ensembles import Ensemble
    from saeens_models.evaluation import EnsembleEvaluation, LossEvaluation
    from saeens_models.metrics import LossBatch
    from saeens_pipeline.language_models.models import LanguageModelDescription

TABLE_VERSION = 1
_LATER_VERSIONS = {"reconstruction": 2, "features": 3, "contexts": 2}  # by table
MATCHED_UP_TO = 2048  # the one-to-one matching takes time that grows with the cube

Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured: the two ensembles and the baselines (method, width in members, SAE) of an experiment."""

    experiment: ExperimentSettings
    activations: Reference
    bagging: Declaration
    boosting: Declaration
    baselines: Sequence[tuple[str, int, Declaration]]

    @property
    def tokens(self) -> Reference:
        return tokens_of(self.experiment.source)

    @property
    def dictionaries(self) -> list[Declaration]:
        return [self.bagging, self.boosting, *(declaration for _, _, declaration in self.baselines)]

    def declare(self, table: str, inputs: Sequence[Reference], dimensions: Any = "layer_and_seed") -> Declaration:
        experiment = self.experiment
        settings: dict[str, Any] = {"members": experiment.ensemble.members}
        if dimensions == "layer":
            settings["seeds"] = experiment.ensemble.seeds
        if table == "reconstruction":
            settings["ce_loss_tokens"] = experiment.ce_loss_tokens
        if table == "cost":
            settings["boosting"] = experiment.ensemble.boosting
        return Declaration(
            address=Address(experiment.name, "eval", table),
            dimensions=dimensions,
            builder=f"table {table}",
            version=_LATER_VERSIONS.get(table, TABLE_VERSION),
            settings=settings,
            inputs=tuple(Input(each.address.name, each) for each in inputs),
            source=experiment.source,
            seeds=tuple(experiment.ensemble.seeds),
            kinds=frozenset({"parquet", "polars"}),
            tags={"experiment": experiment.name, "source": experiment.source, "table": table},
            description=f"{TABLES[table].question}\n\n`saeens table {experiment.name} {table}` prints it.",
        )

    def row(self, store: Store, partition: Partition, method: str, n_members: int, saes: Sequence[str]) -> Row:
        """The columns that all tables begin with; `saes` are data versions."""
        activations = store.require(self.activations.address, self.activations.narrow(partition))
        return {
            "experiment": self.experiment.name,
            "layer": partition.layer,
            "seed": partition.seed,
            "language_model": activations.recipe["settings"]["weights"],
            "method": method,
            "n_members": n_members,
            "sae_data_versions": ",".join(saes),
        }

    def members(self, store: Store, ensemble: Declaration, partition: Partition) -> list[Artefact]:
        """The SAEs of an ensemble, in member order."""
        return [store.require(artefact.address, where) for _, artefact, where in ensemble.input_partitions(partition)]

    def methods(self, store: Store, partition: Partition) -> Iterator[tuple[str, int, list[Artefact]]]:
        """Every method and size that is measured: its name, n_members, and its SAEs."""
        bagging, boosting = self.members(store, self.bagging, partition), self.members(store, self.boosting, partition)
        yield "single", 1, bagging[:1]
        for n in range(1, len(bagging) + 1):
            yield "bagging", n, bagging[:n]
        for n in range(1, len(boosting) + 1):
            yield "boosting", n, boosting[:n]
        for method, n, declaration in self.baselines:
            yield method, n, [store.require(declaration.address, partition)]


def evaluation_op(subject: Subject) -> Op:
    """Declare the tables of one layer and seed. Those that need the test activations share one pass over them."""
    experiment, dictionaries = subject.experiment, subject.dictionaries
    read = {"reconstruction": [subject.tokens, subject.activations]} if experiment.ce_loss_tokens else {}
    measured = [
        subject.declare(table, [*read.get(table, [subject.activations]), *dictionaries])
        for table in _MEASURED
        if table in experiment.evaluations
    ]
    recorded = [subject.declare(table, dictionaries) for table in _RECORDED if table in experiment.evaluations]

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        store, partition = workplace.store, tasks[0].partition
        wanted = {task.declaration.address.name for task in tasks}
        model = _replaced_in(subject, store, partition) if "reconstruction" in wanted else None
        evaluations: dict[str, EnsembleEvaluation] = {}
        losses: LossEvaluation | None = None
        with workplace.compute.measure() as measurement:
            if wanted & _MEASURED.keys():
                ensembles = {each.address.name: load_dictionary(workplace, each, partition) for each in dictionaries}
                evaluations = _evaluate(workplace, subject, partition, ensembles)
                if model:
                    losses = _evaluate_losses(workplace, subject, partition, ensembles, model)
                    evaluations = losses.fill_into(evaluations)
        for task in tasks:
            table = task.declaration.address.name
            rows = (
                _MEASURED[table](subject, store, partition, evaluations)
                if table in _MEASURED
                else _RECORDED[table](subject, store, partition)
            )
            provenance = workplace.provenance() | vars(measurement)
            if table == "reconstruction" and losses:
                provenance["next_token_loss"] = {"clean": losses.clean, "ablated": losses.ablated, "tokens": losses.tokens}
            store.write_table(*task.where, task.recipe, provenance, frame(table, rows))

    return Op(f"{experiment.name}__eval__tables", (*measured, *recorded), make, on_device=True)


def stability_op(subject: Subject) -> Op:
    """Declare the table that compares all seeds of a layer."""
    experiment = subject.experiment
    stability = subject.declare("stability", subject.dictionaries, dimensions="layer")

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        with workplace.compute.measure() as measurement:
            rows = list(_stability_rows(subject, workplace, task.partition))
        workplace.store.write_table(*task.where, task.recipe, workplace.provenance() | vars(measurement), frame("stability", rows))

    return Op(f"{experiment.name}__eval__stability", (stability,), make, on_device=True)


def validate_ce_loss(experiment: ExperimentSettings, model: LanguageModelDescription, hook: str) -> bool:
    """Whether the language model has a next-token loss that can be measured with something else at this hook.

    Raises ConfigurationError where it has not and the experiment asks for it, rather than by default.
    """
    from saeens_pipeline.language_models.patching import validate_patch

    try:
        if not model.has_head:
            raise ConfigurationError(
                f"ce_loss_tokens: {experiment.ce_loss_tokens}, but {model.name} has no language-modelling head, which predicts tokens: "
                "set it to 0, or take the model's files with a head, those of a class that ends in ForCausalLM"
            )
        validate_patch(model, hook)
    except ConfigurationError:
        if experiment.ce_loss_tokens and "ce_loss_tokens" in experiment.model_fields_set:
            raise
        return False
    return True


def load_dictionary(workplace: Workplace, declaration: Declaration, partition: Partition) -> Ensemble:
    """An ensemble, or a baseline as an ensemble of one, on the device."""
    import saeens_models as sm

    path = workplace.store.require(declaration.address, partition).path
    ensemble = sm.load_ensemble(path) if declaration.builder == "ensemble" else sm.Bagging([sm.load_sae(path)])
    return ensemble.to(workplace.compute.resolve(float64=True))


def _evaluate(
    workplace: Workplace, subject: Subject, partition: Partition, ensembles: Mapping[str, Ensemble]
) -> dict[str, EnsembleEvaluation]:
    """Evaluations by ensemble name and by baseline name."""
    from saeens_models.evaluation import evaluate_ensembles, streaming_memory
    from saeens_models.metrics import MemoryBudgetError
    from saeens_models.metrics.description_length import DEFAULT_PRECISION

    experiment, device = subject.experiment, workplace.compute.resolve(float64=True)
    reader = open_reader(workplace.store, subject.activations, partition)
    step = DEFAULT_PRECISION * reader.statistics("test").mean_norm
    with progress.task(f"{experiment.name}/eval, {partition}", reader.n_rows("test")) as advance:

        def chunks() -> Iterator[Tensor]:
            for chunk in reader.chunks("test"):
                yield chunk.to(device)
                advance(len(chunk))

        try:
            return evaluate_ensembles(ensembles, chunks(), int(experiment.evaluation_memory_gb * 1e9), step)
        except MemoryBudgetError as error:
            raise SaeensError(
                f"evaluation_memory_gb: {experiment.evaluation_memory_gb:g} is too little to evaluate {experiment.name}, {partition}; "
                f"{math.ceil(streaming_memory(ensembles.values()) / 1e7) / 100:g} is enough for any number of test tokens"
            ) from error


def _replaced_in(subject: Subject, store: Store, partition: Partition) -> LanguageModelDescription | None:
    """The language model whose loss is to be measured, if there is one. Raises what `validate_ce_loss` and `language_model_of` do."""
    if not subject.experiment.ce_loss_tokens:
        return None
    activations = store.require(subject.activations.address, subject.activations.narrow(partition))
    model, hook = language_model_of(activations), activations.recipe["settings"]["hook"]
    return model if validate_ce_loss(subject.experiment, model, hook) else None


def _evaluate_losses(
    workplace: Workplace, subject: Subject, partition: Partition, ensembles: Mapping[str, Ensemble], model: LanguageModelDescription
) -> LossEvaluation:
    """What the ensembles and baselines recover of the language model's loss, on `ce_loss_tokens` of the test tokens."""
    from saeens_models.evaluation import evaluate_losses
    from saeens_pipeline.language_models.models import load_language_model
    from saeens_pipeline.language_models.patching import loss_batches
    from saeens_pipeline.language_models.tokens import open_tokens

    experiment, store = subject.experiment, workplace.store
    activations = store.require(subject.activations.address, subject.activations.narrow(partition)).recipe["settings"]
    tokens = open_tokens(store.require(subject.tokens.address, Partition()).path)
    device, dtype = workplace.compute.resolve(float64=True), activations.get("language_model_dtype", "float32")
    loaded = load_language_model(model, activations["weights"], device, dtype)
    n_rows = min(experiment.ce_loss_tokens, tokens.n_rows("test"))
    with progress.task(f"{experiment.name}/eval, next-token loss, {partition}", n_rows) as advance:

        def batches() -> Iterator[LossBatch]:
            for batch in loss_batches(loaded, tokens, activations["hook"], activations["layer"], n_rows):
                yield batch
                advance(len(batch.x))

        return evaluate_losses(ensembles, batches())


def _sizes(
    subject: Subject, store: Store, partition: Partition, evaluations: Mapping[str, EnsembleEvaluation]
) -> Iterator[tuple[Row, Any]]:
    """Each method and size with its evaluation."""
    baselines = {(method, n): declaration.address.name for method, n, declaration in subject.baselines}
    for method, n, saes in subject.methods(store, partition):
        row = subject.row(store, partition, method, n, [sae.data_version for sae in saes])
        if (method, n) in baselines:
            yield row, evaluations[baselines[method, n]].sizes[0]
        else:
            ensemble = subject.boosting if method == "boosting" else subject.bagging
            yield row, evaluations[ensemble.address.name].sizes[n - 1]


def _reconstruction_rows(
    subject: Subject, store: Store, partition: Partition, evaluations: Mapping[str, EnsembleEvaluation]
) -> Iterator[Row]:
    for row, size in _sizes(subject, store, partition, evaluations):
        sparsity = {name: getattr(size.sparsity, name) for name in ("l0", "relative_sparsity", "dead_features")}
        others = {"description_length_bits": size.description_length, "ce_loss_recovered": size.ce_loss_recovered}
        yield row | {"n_features": size.n_features} | dict(size.reconstruction) | sparsity | others


def _coactivation_rows(
    subject: Subject, store: Store, partition: Partition, evaluations: Mapping[str, EnsembleEvaluation]
) -> Iterator[Row]:
    for row, size in _sizes(subject, store, partition, evaluations):
        yield row | {"connectivity": size.connectivity, "diversity": size.diversity, "tokens": size.reconstruction.tokens}


def _member_rows(subject: Subject, store: Store, partition: Partition, evaluations: Mapping[str, EnsembleEvaluation]) -> Iterator[Row]:
    for method, ensemble in (("bagging", subject.bagging), ("boosting", subject.boosting)):
        members = evaluations[ensemble.address.name].members
        for number, (artefact, member) in enumerate(zip(subject.members(store, ensemble, partition), members, strict=True), start=1):
            yield subject.row(store, partition, method, len(members), [artefact.data_version]) | {
                "member": number,
                "mse": member.reconstruction.mse,
                "explained_variance": member.reconstruction.explained_variance,
                "l0": member.sparsity.l0,
                "dead_features": member.sparsity.dead_features,
                "mean_max_cosine_to_other_members": member.mean_max_cosine_to_other_members,
                "median_density": member.sparsity.density.median().item(),
            }


def _cost_rows(subject: Subject, store: Store, partition: Partition) -> Iterator[Row]:
    mode = subject.experiment.ensemble.boosting
    n_residuals = 0 if mode == "concurrent" else subject.experiment.ensemble.members - 1
    residuals = [
        store.require(Address(subject.experiment.name, "boosting", f"residual_{j}"), partition).provenance
        for j in range(1, n_residuals + 1)
    ]
    for method, n, saes in subject.methods(store, partition):
        each = [sae.provenance for sae in saes]
        passes = residuals[: n - 1] if method == "boosting" else []
        beside = [_is_trained_beside_others(subject.experiment, method, j) for j in range(1, len(each) + 1)]
        joint, alone = ([made for made, is_joint in zip(each, beside, strict=True) if is_joint == wanted] for wanted in (True, False))
        yield subject.row(store, partition, method, n, [sae.data_version for sae in saes]) | {
            "train_tokens": sum(sae["train_tokens"] for sae in each),
            "train_flops": float(sum(sae["train_flops"] for sae in each)),
            "train_seconds": sum(sae["train_seconds"] for sae in each),
            "residual_flops": float(sum(made["flops"] for made in passes)),
            "residual_seconds": sum((made["seconds"] for made in passes), 0.0),
            "peak_memory_bytes": _peak_memory(joint, [*alone, *passes]),
            "inference_flops_per_token": float(sum(sae["inference_flops_per_token"] for sae in each)),
            "device": each[0]["device"],
            "dtype": each[0]["dtype"],
            "boosting_mode": mode if method == "boosting" else None,
        }


def _is_trained_beside_others(experiment: ExperimentSettings, method: str, number: int) -> bool:
    if method == "bagging":
        return experiment.ensemble.specialisation(number) is None
    return method == "boosting" and experiment.ensemble.boosting == "concurrent"


def _peak_memory(joint: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> int | None:
    """The most at any time: what was trained side by side has each a part of one peak, all else followed one another."""
    of_joint, of_others = ([made["peak_memory_bytes"] or 0 for made in group] for group in (joint, alone))
    return max([sum(of_joint), *of_others]) or None


def _curve_rows(subject: Subject, store: Store, partition: Partition) -> Iterator[Row]:
    import polars as pl

    size = subject.experiment.ensemble.members
    trained = [("bagging", size, j, sae) for j, sae in enumerate(subject.members(store, subject.bagging, partition), start=1)]
    trained += [("boosting", size, j, sae) for j, sae in enumerate(subject.members(store, subject.boosting, partition), start=1)]
    trained += [(method, n, 1, store.require(declaration.address, partition)) for method, n, declaration in subject.baselines]
    for method, n, member, sae in trained:
        row = subject.row(store, partition, method, n, [sae.data_version]) | {"member": member}
        yield from (row | point for point in pl.read_parquet(sae.path / CURVE_FILE).iter_rows(named=True))


def _stability_rows(subject: Subject, workplace: Workplace, partition: Partition) -> Iterator[Row]:
    store, device = workplace.store, workplace.compute.resolve(float64=True)
    seeds = [Partition(partition.layer, seed) for seed in subject.experiment.ensemble.seeds]
    bagging, boosting = (
        _stability_of_sizes([subject.members(store, ensemble, where) for where in seeds], device)
        for ensemble in (subject.bagging, subject.boosting)
    )
    for of_seeds in zip(*(subject.methods(store, where) for where in seeds), strict=True):
        method, n, _ = of_seeds[0]
        sizes = {"single": bagging, "bagging": bagging, "boosting": boosting}.get(method)
        (values,) = sizes[n - 1 : n] if sizes else _stability_of_sizes([saes for _, _, saes in of_seeds], device)
        for i, (where, (_, _, saes)) in enumerate(zip(seeds, of_seeds, strict=True)):
            row = subject.row(store, where, method, n, [sae.data_version for sae in saes])
            yield row | {"n_runs": len(seeds)} | {name: value[i] for name, value in values.items()}


def _stability_of_sizes(runs: Sequence[Sequence[Artefact]], device: str) -> list[dict[str, Sequence[float | None]]]:
    """For n = 1 .. J, how stable the first n SAEs of each run are: by column, a number for each run."""
    import torch

    import saeens_models as sm

    nothing: list[float | None] = [None] * len(runs)
    if len(runs) == 1:
        return [dict.fromkeys(("stability", "stability_pairwise", "stability_matched"), nothing)] * len(runs[0])
    dictionaries = [[sm.load_sae(sae.path).W_dec.detach().to(device) for sae in saes] for saes in runs]

    def matched(n: int) -> Sequence[float | None]:
        of_runs = [torch.cat(members[:n]) for members in dictionaries]
        return sm.metrics.stability_matched(of_runs) if len(of_runs[0]) <= MATCHED_UP_TO else nothing

    return [
        {"stability": size.stability, "stability_pairwise": size.pairwise, "stability_matched": matched(n)}
        for n, size in enumerate(sm.metrics.stability_of_prefixes(dictionaries), start=1)
    ]


_MEASURED = {"reconstruction": _reconstruction_rows, "members": _member_rows, "coactivation": _coactivation_rows}
_RECORDED = {"cost": _cost_rows, "training_curves": _curve_rows}
