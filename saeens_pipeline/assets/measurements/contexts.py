"""Rows of the table `contexts`: places in the test text where each feature is most active, and the next tokens that it promotes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from saeens_models.ensembles import Ensemble
from saeens_models.evaluation import feature_contexts
from saeens_models.metrics import FeatureContexts, output_tokens
from saeens_pipeline import progress
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary
from saeens_pipeline.assets.measurements.token_strings import TokenStrings
from saeens_pipeline.assets.registry import Making, table_frame
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.assets.sources import language_model_of
from saeens_pipeline.language_models.descriptions import HOOKS
from saeens_pipeline.language_models.models import load_language_model

OUTPUT_TOKENS = 10


def context_rows(making: Making, n_contexts: int, radius: int) -> pl.DataFrame:
    """Return the rows of every feature of both ensembles.

    Memory, for any number of test tokens: 1.2 kB for each feature of one ensemble during the pass, then the texts of one member's
    contexts at a time, and the rows, about 3 kB for each feature of both; in addition one window of codes, at the start the language
    model, and afterwards its unembedding.
    """
    tokens = TokenStrings(making.store, making.subject.tokens)
    found = _Contexts(making, tokens, _unembedding(making, tokens), n_contexts, radius)
    return pl.concat([part for method in ("bagging", "boosting") for part in found.rows(method)])


def _unembedding(making: Making, tokens: TokenStrings) -> Tensor | None:
    """Return the unembedding `[vocabulary, d_model]` of the tokenizer's tokens; None if it cannot be applied to decoder directions.

    It can for hooks at the residual stream or at an output added to it. A module path may be anywhere.
    """
    reference = making.subject.activations
    activations = making.store.require(reference.address, reference.narrow(making.partition))
    settings, description = activations.recipe["settings"], language_model_of(activations)
    if settings["hook"] not in HOOKS or not description.has_head:
        return None
    device, dtype = making.context.compute.resolve(float64=True), settings.get("language_model_dtype", "float32")
    unembedding = load_language_model(description, settings["weights"], device, dtype).unembedding()
    d_in = open_reader(making.store, reference, making.partition).d_in
    return None if unembedding is None or unembedding.shape[1] != d_in else unembedding[: tokens.vocab_size].clone()


@dataclass(frozen=True)
class _Contexts:
    """The computation of the rows of one partition."""

    making: Making
    tokens: TokenStrings
    unembedding: Tensor | None
    n_contexts: int
    radius: int

    def rows(self, method: str) -> Iterator[pl.DataFrame]:
        """Give the rows of an ensemble, member by member."""
        store, declaration = self.making.store, self.making.subject.bagging if method == "bagging" else self.making.subject.boosting
        ensemble = load_dictionary(self.making.context, declaration, self.making.partition)
        saes = self.making.subject.members(store, declaration, self.making.partition)
        found, empty = self._found(method, ensemble), table_frame("contexts", [])
        for number, (artefact, sae, of_member) in enumerate(zip(saes, ensemble, found, strict=True), start=1):
            promoted, suppressed = ("[]", "[]") if self.unembedding is None else _output_tokens(sae.W_dec, self.unembedding, self.tokens)
            peaks, widths = of_member.activations[:, 0, self.radius].double(), of_member.bin_width
            columns: dict[str, Any] = {
                "index": range(len(peaks)),
                "max_activation": pl.Series(peaks.cpu().numpy()).replace(0.0, None),
                "contexts": _texts(of_member, self.tokens, self.radius),
                "histogram": [json.dumps(counts) for counts in of_member.histogram.tolist()],
                "bin_width": pl.Series(widths.cpu().numpy()).replace(0.0, None),
                "promoted_tokens": promoted,
                "suppressed_tokens": suppressed,
            }
            subject, partition = self.making.subject, self.making.partition
            same = subject.row(store, partition, method, len(ensemble), [artefact.data_version]) | {"member": number}
            rows = pl.DataFrame(columns).with_columns(pl.lit(value).alias(column) for column, value in same.items())
            yield rows.select(empty.columns).cast(empty.schema)  # pyright: ignore[reportArgumentType]  # a schema is what cast takes

    def _found(self, method: str, ensemble: Ensemble) -> list[FeatureContexts]:
        """Return the contexts of every member, from one pass over the test activations."""
        reader, device = open_reader(self.making.store, self.making.subject.activations, self.making.partition), ensemble[0].W_dec.device
        label = f"{self.making.subject.experiment.name}/eval/contexts of {method}, {self.making.partition}"
        with progress.task(label, reader.n_rows("test")) as advance:

            def chunks() -> Iterator[tuple[Tensor, Tensor]]:
                for chunk, place in zip(reader.chunks("test"), self.tokens.store.places("test", reader.chunk_rows), strict=True):
                    yield chunk.to(device), torch.from_numpy(place).to(device)
                    advance(len(chunk))

            return feature_contexts(ensemble, chunks(), self.tokens.store.context_length, self.n_contexts, self.radius)


def _texts(found: FeatureContexts, tokens: TokenStrings, radius: int) -> list[str]:
    """Return for each feature a JSON list of its contexts."""
    places, activations = found.place.cpu().numpy(), found.activations.cpu().numpy()
    wanted, which = np.unique(places[places >= 0], return_inverse=True)
    around = tokens.store.around("test", wanted, radius)
    literals = [tokens.literals(ids) for ids in around.tokens]
    of_features: list[list[str]] = [[] for _ in places]
    features, ranks = np.nonzero(places >= 0)
    for feature, rank, window in zip(features.tolist(), ranks.tolist(), which.tolist(), strict=True):
        shown = around.is_text[window]
        values = ",".join(_numbers(activations[feature, rank][shown], around.kept[window][shown]))
        text = ",".join(literal for literal, is_text in zip(literals[window], shown, strict=True) if is_text)
        of_features[feature].append(
            f'{{"document":{around.document[window]},"position":{around.position[window]},"centre":{shown[:radius].sum()},'
            f'"tokens":[{text}],"activations":[{values}]}}'
        )
    return [f"[{','.join(contexts)}]" for contexts in of_features]


def _numbers(activations: np.ndarray, kept: np.ndarray) -> Iterator[str]:
    """Give activations as JSON; null for tokens without an activation row."""
    for value, has_row in zip(activations.tolist(), kept.tolist(), strict=True):
        yield f"{value:.4g}" if value else "0" if has_row else "null"


def _output_tokens(W_dec: Tensor, unembedding: Tensor, tokens: TokenStrings) -> tuple[list[str], list[str]]:
    """Return for each feature JSON lists of the tokens that it promotes and suppresses most, each with its logit."""
    found = output_tokens(W_dec, unembedding, min(OUTPUT_TOKENS, len(unembedding)))

    def lists(of_features: Tensor, logits: Tensor) -> list[str]:
        return [
            f"[{','.join(f'[{token},{logit:.4g}]' for token, logit in zip(tokens.literals(ids), values, strict=True))}]"
            for ids, values in zip(of_features.cpu().numpy(), logits.tolist(), strict=True)
        ]

    return lists(found.promoted, found.promoted_logits), lists(found.suppressed, found.suppressed_logits)
