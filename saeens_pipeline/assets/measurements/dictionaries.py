"""The pass over the test activations, and over the language model's loss, that several tables share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import EnsembleEvaluation, LossEvaluation, evaluate_ensembles, evaluate_losses, streaming_memory
from saeens_models.metrics import LossBatch, MemoryBudgetError, blocks_of
from saeens_models.metrics.description_length import DEFAULT_PRECISION
from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.measurements.token_strings import open_test_tokens
from saeens_pipeline.assets.readers import open_reader
from saeens_pipeline.assets.registry import Making, Row
from saeens_pipeline.assets.sources import language_model_of, measures_loss, recorded_patching_problem
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.language_models.descriptions import LanguageModelDescription
from saeens_pipeline.language_models.language_model import LanguageModel
from saeens_pipeline.language_models.loading import load_language_model
from saeens_pipeline.language_models.patching import loss_batches, patching_problem
from saeens_pipeline.storage.activations import ActivationReader, ActivationStore

CURVE_PARTS = (16, 8, 4, 2, 1)
"""Fractions of the test tokens in `token_curves`: one part of that many."""


class Evaluated(NamedTuple):
    """Results of the pass: evaluations by ensemble and baseline, and the loss of the language model, if it was measured."""

    evaluations: Mapping[str, EnsembleEvaluation]
    losses: LossEvaluation | None


def load_dictionary(making: Making, dictionary: Declaration) -> Ensemble:
    """Return an ensemble, or a baseline as an ensemble of one, on the device."""
    path = making.require(dictionary).path
    ensemble = sm.load_ensemble(path) if dictionary.builder == "ensemble" else sm.Bagging([sm.load_sae(path)])
    return ensemble.to(making.device)


@contextlib.contextmanager
def pass_over(making: Making, reader: ActivationReader, label: str = "") -> Iterator[Iterator[Tensor]]:
    """Yield the chunks of the test activations on the device, `[n, d_in]`, with progress."""
    device = making.device
    with progress.task(f"{making.experiment.name}/eval{label}, {making.partition}", reader.n_rows("test")) as advance:

        def chunks() -> Iterator[Tensor]:
            for chunk in reader.chunks("test", device):
                yield chunk
                advance(len(chunk))

        yield chunks()


def load_model(making: Making, model: LanguageModelDescription | None = None) -> LanguageModel:
    """Load the language model of the activations, on the device. Raises as `language_model_of`."""
    activations = making.require(making.subject.activations)
    settings = activations.recipe["settings"]
    dtype = settings.get("language_model_dtype", "float32")
    return load_language_model(model or language_model_of(activations), settings["weights"], making.device, dtype)


def evaluate(making: Making) -> Evaluated:
    """Evaluate all dictionaries on the test activations.

    For the tables `reconstruction` and `differences`, also evaluate the language model's loss with the reconstructions in place of the
    activations.
    """
    ensembles = {each.address.name: load_dictionary(making, each) for each in making.subject.dictionaries}
    model = _model_with_loss(making) if {"reconstruction", "differences"}.intersection(making.wanted) else None
    evaluations = _evaluate(making, ensembles)
    if model is None:
        return Evaluated(evaluations, None)
    losses = _evaluate_losses(making, ensembles, model)
    return Evaluated(losses.fill_into(evaluations) if losses else evaluations, losses)


def sizes(making: Making) -> Iterator[tuple[Row, Any]]:
    """Yield the row columns and the evaluation of each method and ensemble size, from the shared pass."""
    for method, n, dictionary, saes in making.methods():
        yield making.row(method, n, saes), making.shared.evaluations[dictionary.address.name].sizes[len(saes) - 1]


def _evaluate(making: Making, ensembles: Mapping[str, Ensemble]) -> dict[str, EnsembleEvaluation]:
    memory_gb, reader = making.experiment.evaluation_memory_gb, open_reader(making.store, making.subject.activations, making.partition)
    step = DEFAULT_PRECISION * reader.statistics("test").mean_norm
    document = _documents(making) if "differences" in making.wanted else None
    curve_at = {-(-reader.n_rows("test") // parts) for parts in CURVE_PARTS}
    try:
        with pass_over(making, reader) as chunks:
            return evaluate_ensembles(ensembles, chunks, int(memory_gb * 1e9), step, document=document, curve_at=curve_at)
    except MemoryBudgetError as error:
        raise SaeensError(
            f"evaluation_memory_gb: {memory_gb:g} is too little to evaluate {making.experiment.name}, {making.partition}; "
            f"{math.ceil(streaming_memory(ensembles.values()) / 1e7) / 100:g} is enough for any number of test tokens"
        ) from error


def _documents(making: Making) -> Tensor:
    """Return the document of each test row, or the block that it is joined into, `[n]`."""
    store = ActivationStore(making.require(making.subject.activations).path)
    document = torch.from_numpy(store.document("test"))
    return blocks_of(document, int(document.max()) + 1).short()  # of 1,000 blocks


def _model_with_loss(making: Making) -> LanguageModelDescription | None:
    """Return the language model whose loss is measured, if there is one. Raises as `measures_loss` and `language_model_of`."""
    if not making.experiment.ce_loss_tokens:
        return None
    activations = making.require(making.subject.activations)
    model = language_model_of(activations)
    return model if measures_loss(making.experiment, model, recorded_patching_problem(activations)) else None


def _evaluate_losses(making: Making, ensembles: Mapping[str, Ensemble], model: LanguageModelDescription) -> LossEvaluation | None:
    """Measure the next-token loss with reconstructions at the hook, on `ce_loss_tokens` of the test tokens; None if it cannot be."""
    activations = making.require(making.subject.activations).recipe["settings"]
    tokens, loaded = open_test_tokens(making), load_model(making, model)
    if not measures_loss(making.experiment, model, patching_problem(loaded, activations["hook"], [activations["layer"]])):
        return None  # older records do not say it
    n_rows, by_document = min(making.experiment.ce_loss_tokens, tokens.n_rows("test")), "differences" in making.wanted
    reader = open_reader(making.store, making.subject.activations, making.partition)
    mean = torch.from_numpy(reader.statistics("train").mean)
    with progress.task(f"{making.experiment.name}/eval, next-token loss, {making.partition}", n_rows) as advance:

        def batches() -> Iterator[LossBatch]:
            for batch in loss_batches(loaded, tokens, activations["hook"], activations["layer"], n_rows, by_document=by_document):
                yield batch
                advance(len(batch.x))

        return evaluate_losses(ensembles, batches(), mean)
