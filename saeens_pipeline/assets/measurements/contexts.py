"""Rows of the table `contexts`: places in the test text where each feature is most active, and the next tokens that it promotes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from saeens_models.evaluation import feature_contexts
from saeens_models.metrics import FeatureContexts, output_tokens
from saeens_pipeline.assets.declarations import Declaration
from saeens_pipeline.assets.measurements.dictionaries import load_dictionary, load_model, pass_over
from saeens_pipeline.assets.measurements.token_strings import TokenStrings
from saeens_pipeline.assets.readers import open_reader
from saeens_pipeline.assets.registry import Making, columns_frame
from saeens_pipeline.assets.sources import language_model_of
from saeens_pipeline.language_models.descriptions import HOOKS
from saeens_pipeline.storage.activations import ActivationStore

OUTPUT_TOKENS = 10


def context_rows(making: Making, n_contexts: int, radius: int) -> pl.DataFrame:
    """Return the rows of every feature of the ensembles.

    Memory, for any number of test tokens: 1.2 kB for each feature of one ensemble during the pass, then the texts of one member's
    contexts at a time, and the rows, about 3 kB for each feature of both; in addition one window of codes, at the start the language
    model, and afterwards its unembedding.
    """
    tokens = TokenStrings(making)
    unembedding = _unembedding(making, tokens)
    rows = [_rows(making, *each, tokens, unembedding, n_contexts=n_contexts, radius=radius) for each in making.subject.ensembles.items()]
    return pl.concat([part for of_ensemble in rows for part in of_ensemble])


def _unembedding(making: Making, tokens: TokenStrings) -> Tensor | None:
    """Return the unembedding `[vocabulary, d_model]` of the tokenizer's tokens; None if it cannot be applied to decoder directions.

    It can for hooks at the residual stream or at an output added to it. A module path may be anywhere.
    """
    activations = making.require(making.subject.activations)
    model = language_model_of(activations)
    if activations.recipe["settings"]["hook"] not in HOOKS or not model.has_head:
        return None
    unembedding, d_in = load_model(making, model).unembedding(), ActivationStore(activations.path).d_in
    return None if unembedding is None or unembedding.shape[1] != d_in else unembedding[: tokens.vocab_size].clone()


def _rows(
    making: Making, method: str, declaration: Declaration, tokens: TokenStrings, unembedding: Tensor | None, *, n_contexts: int, radius: int
) -> Iterator[pl.DataFrame]:
    """Yield the rows of an ensemble, member by member, from one pass over the test activations."""
    ensemble = load_dictionary(making, declaration)
    reader = open_reader(making.store, making.subject.activations, making.partition)
    with pass_over(making, reader, f"/contexts of {method}") as chunks:
        places = (torch.from_numpy(of_chunk).to(making.device) for of_chunk in tokens.store.places("test", reader.chunk_rows))
        found = feature_contexts(ensemble, zip(chunks, places, strict=True), tokens.store.context_length, n_contexts, radius)
    for number, (artefact, sae, of_member) in enumerate(zip(making.members(declaration), ensemble, found, strict=True), start=1):
        promoted, suppressed = ("[]", "[]") if unembedding is None else _output_tokens(sae.W_dec, unembedding, tokens)
        peaks, widths = of_member.activations[:, 0, radius].double(), of_member.bin_width
        columns: dict[str, Any] = {
            "index": range(len(peaks)),
            "max_activation": pl.Series(peaks.cpu().numpy()).replace(0.0, None),
            "contexts": _texts(of_member, tokens, radius),
            "histogram": [json.dumps(counts) for counts in of_member.histogram.tolist()],
            "bin_width": pl.Series(widths.cpu().numpy()).replace(0.0, None),
            "promoted_tokens": promoted,
            "suppressed_tokens": suppressed,
        }
        yield columns_frame("contexts", making.row(method, len(ensemble), [artefact]) | {"member": number}, columns)


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
    """Yield activations as JSON; null for tokens without an activation row."""
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
