"""Rows of the table `autointerp`: features explained by a language model, and scores of the explanations."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from torch import Tensor

import saeens_models as sm
from saeens_models.evaluation import silent_windows
from saeens_pipeline import progress
from saeens_pipeline.assets.measurements.token_strings import TokenStrings
from saeens_pipeline.assets.readers import open_reader
from saeens_pipeline.assets.registry import SUBJECT, Making, Row
from saeens_pipeline.language_models.autointerp.interview import FeatureTexts, Interviewer, Verdict
from saeens_pipeline.language_models.autointerp.protocol import SEED, Examples, Flaw, choose_examples, text_of
from saeens_pipeline.settings.autointerp import AutoInterpSettings
from saeens_pipeline.storage.activations import ActivationReader

logger = logging.getLogger(__name__)

WINDOWS = 200  # random windows of the test text, from which those are taken on which a feature does not fire


class _Drawn(NamedTuple):
    """A drawn feature: the first columns of its row, and its example texts or the reason why it has too few."""

    start: Row
    examples: Examples | Flaw


def explained_rows(making: Making, interviewer: Interviewer, label: str, ensembles: Sequence[str], radius: int) -> list[Row]:
    """Return the rows of the drawn features of these ensembles, explained and scored.

    Runs on the CPU, so that no GPU is held while it waits for answers. Memory: the contexts of the drawn features, an ensemble's weights,
    a chunk of activations.
    """
    settings = interviewer.settings
    drawn: list[_Drawn] = []
    questions: list[FeatureTexts] = []
    for of_ensemble in _of_ensembles(making, settings, ensembles, radius):
        examples = [each.examples for each in of_ensemble if isinstance(each.examples, Examples)]
        first, n = len(questions), len(examples)
        controlled = settings.control and n > 1
        questions += [FeatureTexts(each, first + (i + 1) % n if controlled else None) for i, each in enumerate(examples)]
        drawn += of_ensemble
    if interviewer.endpoint:
        estimate, host = interviewer.estimate(questions), interviewer.endpoint.host
        words = f"{estimate.in_words(settings)}, to {settings.model} at {host}"
        logger.info("%s: %d features: %s; %d answers are on disk", label, len(drawn), words, estimate.known)
    with progress.task(label, sum(2 if each.other is None else 3 for each in questions), "questions") as advance:
        verdicts = iter(interviewer.interview(questions, advance))
    rows, model = [], {"model": settings.model}
    for each in drawn:
        if isinstance(each.examples, Examples):
            verdict = next(verdicts)
            rows += [each.start | model | _columns(verdict, len(each.examples.texts))] if verdict else []
        elif interviewer.endpoint:
            rows.append(each.start | model | {"status": each.examples})
    return sorted(rows, key=lambda row: (row["method"], row["member"], row["index"]))


def _columns(verdict: Verdict, n_texts: int) -> Row:
    score, control = verdict.score, verdict.control
    return {
        "explanation": verdict.explanation,
        "detection_score": score.balanced_accuracy if score else None,
        "true_positive_rate": score.true_positive_rate if score else None,
        "false_positive_rate": score.false_positive_rate if score else None,
        "control_score": control.balanced_accuracy if control else None,
        "n_examples": n_texts,
        "status": verdict.status,
    }


def _of_ensembles(making: Making, settings: AutoInterpSettings, ensembles: Sequence[str], radius: int) -> Iterator[list[_Drawn]]:
    """Yield the drawn features of each ensemble, in the order in which they are drawn."""
    windows = _windows(making, radius)
    for method in ensembles:
        ensemble = sm.load_ensemble(making.require(getattr(making.subject, method)).path)
        found = _draw(making, method, settings.features)
        of_member = {j: [row for row in found if row["member"] == j] for j in range(1, len(ensemble) + 1)}
        indices = [torch.tensor([row["index"] for row in rows], dtype=torch.int64) for rows in of_member.values()]
        silent = silent_windows(ensemble, windows.activations(), indices)
        silent_texts = {
            (j, row["index"]): [text for text, is_silent in zip(windows.texts, column, strict=True) if is_silent]
            for (j, rows), of_windows in zip(of_member.items(), silent, strict=True)
            for row, column in zip(rows, of_windows.T.tolist(), strict=True)
        }
        drawn: list[_Drawn] = []
        for row in found:
            member, index = row["member"], row["index"]
            examples = choose_examples(json.loads(row["contexts"]), silent_texts[member, index], f"{member}, {index}")
            drawn.append(_Drawn({name: row[name] for name in (*(column.name for column in SUBJECT), "member", "index")}, examples))
        yield drawn


def _draw(making: Making, method: str, n_features: int) -> list[Row]:
    """Return the rows of the table `contexts` of random features that fire. A larger `features` draws the same ones and more."""
    path = making.require(making.subject.table("contexts")).path
    fire = pl.scan_parquet(path, hive_partitioning=False, glob=False).filter(
        pl.col("method") == method, pl.col("max_activation").is_not_null()
    )
    drawn = fire.select("member", "index").collect().rows()
    random.Random(SEED).shuffle(drawn)
    drawn = drawn[:n_features]
    chosen = pl.LazyFrame(drawn, schema={"member": pl.Int64, "index": pl.Int64}, orient="row")
    rows = {(row["member"], row["index"]): row for row in fire.join(chosen, on=["member", "index"], how="semi").collect().to_dicts()}
    return [rows[each] for each in drawn]


def _windows(making: Making, radius: int) -> _Windows:
    store, subject = making.store, making.subject
    reader, tokens = open_reader(store, subject.activations, making.partition), TokenStrings(making)
    n_rows = reader.n_rows("test")
    rows = np.sort(np.random.default_rng(SEED).choice(n_rows, min(WINDOWS, n_rows), replace=False))
    chunks = zip(range(0, n_rows, reader.chunk_rows), tokens.store.places("test", reader.chunk_rows), strict=True)
    places = np.concatenate([of_chunk[rows[(rows >= first) & (rows < first + len(of_chunk))] - first] for first, of_chunk in chunks])
    around = tokens.store.around("test", places, radius)
    texts = [
        text_of(json.loads(literal) for literal, is_text in zip(tokens.literals(ids), shown, strict=True) if is_text)
        for ids, shown in zip(around.tokens, around.is_text, strict=True)
    ]
    begins = rows - around.kept[:, :radius].sum(1)
    ends = rows + around.kept[:, radius:].sum(1)
    return _Windows(texts, reader, list(zip(begins.tolist(), ends.tolist(), strict=True)))


@dataclass(frozen=True)
class _Windows:
    """Random windows of the test text, each as wide as a context, in text order."""

    texts: Sequence[str]
    reader: ActivationReader
    spans: Sequence[tuple[int, int]]  # their activation rows

    def activations(self) -> Iterator[Tensor]:
        """Yield the activations of each window, `[n_rows, d_in]` float32."""
        size = self.reader.chunk_rows
        held: dict[int, Tensor] = {}
        for begin, end in self.spans:
            held = {
                index: held[index] if index in held else self.reader.read_chunk("test", index).to(torch.float32, copy=True)
                for index in range(begin // size, -(-end // size))
            }
            yield torch.cat([chunk[max(0, begin - index * size) : end - index * size] for index, chunk in held.items()])
