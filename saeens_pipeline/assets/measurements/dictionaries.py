"""The pass over the test activations, and over the language model's loss, that several tables share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

import saeens_models as sm
from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import (
    EnsembleEvaluation,
    LossEvaluation,
    evaluate_ensembles,
    evaluate_losses,
    streaming_memory,
)
from saeens_models.metrics import LossBatch, MemoryBudgetError
from saeens_models.metrics.description_length import DEFAULT_PRECISION
from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, RunContext
from saeens_pipeline.assets.registry import Making, Row, Subject
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.assets.sources import language_model_of, measures_loss
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.models import load_language_model
from saeens_pipeline.language_models.patching import loss_batches
from saeens_pipeline.language_models.tokens import open_tokens
from saeens_pipeline.storage.names import Partition
from saeens_pipeline.storage.recipes import Store


class Evaluated(NamedTuple):
    """Results of the pass: evaluations by ensemble and baseline, and the loss of the language model, if it was measured."""

    evaluations: Mapping[str, EnsembleEvaluation]
    losses: LossEvaluation | None


def load_dictionary(context: RunContext, declaration: Declaration, partition: Partition) -> Ensemble:
    """Return an ensemble, or a baseline as an ensemble of one, on the device."""
    path = context.store.require(declaration.address, partition).path
    ensemble = sm.load_ensemble(path) if declaration.builder == "ensemble" else sm.Bagging([sm.load_sae(path)])
    return ensemble.to(context.compute.resolve(float64=True))


def evaluate(subject: Subject, context: RunContext, partition: Partition, wanted: Collection[str]) -> Evaluated:
    """Evaluate all dictionaries on the test activations; for the table `reconstruction` also the loss with them in the model."""
    ensembles = {each.address.name: load_dictionary(context, each, partition) for each in subject.dictionaries}
    model = _model_with_loss(subject, context.store, partition) if "reconstruction" in wanted else None
    evaluations = _evaluate(subject, context, partition, ensembles)
    if model is None:
        return Evaluated(evaluations, None)
    losses = _evaluate_losses(subject, context, partition, ensembles, model)
    return Evaluated(losses.fill_into(evaluations), losses)


def sizes(making: Making) -> Iterator[tuple[Row, Any]]:
    """Give each method and size of the shared pass with its evaluation."""
    subject, evaluations = making.subject, making.shared.evaluations
    baselines = {(method, n): declaration.address.name for method, n, declaration in subject.baselines}
    for method, n, saes in subject.methods(making.store, making.partition):
        row = subject.row(making.store, making.partition, method, n, [sae.data_version for sae in saes])
        if (method, n) in baselines:
            yield row, evaluations[baselines[method, n]].sizes[0]
        else:
            ensemble = subject.boosting if method == "boosting" else subject.bagging
            yield row, evaluations[ensemble.address.name].sizes[n - 1]


def _evaluate(
    subject: Subject, context: RunContext, partition: Partition, ensembles: Mapping[str, Ensemble]
) -> dict[str, EnsembleEvaluation]:
    experiment, device = subject.experiment, context.compute.resolve(float64=True)
    reader = open_reader(context.store, subject.activations, partition)
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


def _model_with_loss(subject: Subject, store: Store, partition: Partition) -> LanguageModelDescription | None:
    """Return the language model whose loss is measured, if there is one. Raises as `measures_loss` and `language_model_of`."""
    if not subject.experiment.ce_loss_tokens:
        return None
    activations = store.require(subject.activations.address, subject.activations.narrow(partition))
    model = language_model_of(activations)
    return model if measures_loss(subject.experiment, model, activations.recipe["settings"]["hook"]) else None


def _evaluate_losses(
    subject: Subject, context: RunContext, partition: Partition, ensembles: Mapping[str, Ensemble], model: LanguageModelDescription
) -> LossEvaluation:
    """Measure the next-token loss with reconstructions at the hook, on `ce_loss_tokens` of the test tokens."""
    experiment, store = subject.experiment, context.store
    activations = store.require(subject.activations.address, subject.activations.narrow(partition)).recipe["settings"]
    tokens = open_tokens(store.require(subject.tokens.address, Partition()).path)
    device, dtype = context.compute.resolve(float64=True), activations.get("language_model_dtype", "float32")
    loaded = load_language_model(model, activations["weights"], device, dtype)
    n_rows = min(experiment.ce_loss_tokens, tokens.n_rows("test"))
    with progress.task(f"{experiment.name}/eval, next-token loss, {partition}", n_rows) as advance:

        def batches() -> Iterator[LossBatch]:
            for batch in loss_batches(loaded, tokens, activations["hook"], activations["layer"], n_rows):
                yield batch
                advance(len(batch.x))

        return evaluate_losses(ensembles, batches())
