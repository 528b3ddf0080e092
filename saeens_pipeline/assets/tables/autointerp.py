"""The table of explanations: what a language model says that features respond to, and how well that tells where they fire."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from saeens_pipeline import progress
from saeens_pipeline.assets.declarations import Declaration, Op, Task, Workplace
from saeens_pipeline.assets.residuals import open_reader
from saeens_pipeline.assets.tables.autointerp_outcome import AUTOINTERP, MADE, NOT_CONFIGURED, in_words
from saeens_pipeline.assets.tables.contexts import CONTEXTS, RADIUS
from saeens_pipeline.assets.tables.evaluation import Row, Subject
from saeens_pipeline.assets.tables.features import TokenStrings
from saeens_pipeline.language_models.autointerp.answers import Answers
from saeens_pipeline.language_models.autointerp.endpoint import URL_VARIABLE, Endpoint
from saeens_pipeline.language_models.autointerp.interview import Estimate, Interviewer, Verdict
from saeens_pipeline.language_models.autointerp.interview import Subject as Question
from saeens_pipeline.language_models.autointerp.protocol import SEED, Examples, Flaw, choose_examples, text_of
from saeens_pipeline.settings.autointerp import AutoInterpSettings
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import Partition, place
from saeens_pipeline.storage.tables import SUBJECT, frame

if TYPE_CHECKING:
    from torch import Tensor

    from saeens_pipeline.storage.activations import ActivationReader

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 2  # raised whenever what is asked, or what answers mean, changes
WINDOWS = 200  # of the test text, random, among which those are sought on which a feature does not fire
METHODS = ("bagging", "boosting")


def autointerp_op(subject: Subject, contexts: Declaration) -> Op:
    """Declare the table of a layer and seed: some features of both ensembles, explained and scored.

    Which endpoint is asked, and whether there is one, is the environment's to say, and answers are paid for. So three things hold. Without
    an endpoint the table is made of what was answered before, which is mostly nothing: it is empty, and `not configured` is a setting of
    its recipe (`Declaration.lacking`). With one, that recipe is not the one asked for, and the table is made. A table that was made with
    one is a hit whether there still is one or not. Beside that every answer is kept on disk (`Answers`), and no recipe decides on it.

    It works on the CPU and holds no GPU while it waits for answers. Memory: the contexts of the features drawn, an ensemble's weights, a
    chunk of activations.
    """
    experiment = subject.experiment
    settings = experiment.autointerp
    assert settings is not None, "checked where the experiment is read"
    declaration = subject.declare(AUTOINTERP, [subject.tokens, subject.activations, subject.bagging, subject.boosting, contexts])
    decisive = {**declaration.settings, **settings.decisive, "protocol": PROTOCOL_VERSION, "seed": SEED}
    declaration = replace(declaration, settings=decisive, lacking=_lacking)

    def make(workplace: Workplace, tasks: Sequence[Task]) -> None:
        (task,) = tasks
        answers, endpoint = Answers(workplace.store.root), Endpoint.from_environment()
        interviewer = Interviewer(settings, answers, endpoint)
        label = place(*task.where)
        if endpoint is None:
            logger.warning("%s: not configured: set %s to the address of a language model and run again", label, URL_VARIABLE)
        with workplace.compute.measure() as measurement:
            rows: list[Row] = []
            if endpoint or not answers.is_empty:
                rows = _Explained(workplace, subject, task.partition, settings, contexts, label).rows(interviewer)
        made = {
            "status": MADE if endpoint else NOT_CONFIGURED,
            "requests": interviewer.asked,
            "answers_from_disk": interviewer.from_disk,
            "malformed_answers": interviewer.malformed,
            "tokens_in": interviewer.tokens_in,
            "tokens_out": interviewer.tokens_out,
        }
        provenance = workplace.provenance() | vars(measurement) | {AUTOINTERP: made}
        table = frame(AUTOINTERP, rows)
        if rows:
            logger.info("%s: %s", label, in_words(table))
        workplace.store.write_table(*task.where, task.recipe, provenance, table)

    return Op(declaration.address.op_name, (declaration,), make)


def expected(experiment: ExperimentSettings, n_partitions: int) -> Estimate:
    """What is asked at most for so many partitions, before there are contexts; what was answered before is not taken off."""
    assert experiment.autointerp is not None, "checked where the experiment is read"
    n_features = experiment.autointerp.features * len(METHODS) * n_partitions
    return Estimate.beforehand(experiment.autointerp, n_features, CONTEXTS, 2 * RADIUS + 1)


def expected_requests(experiment: ExperimentSettings, n_partitions: int) -> str:
    """The same in words."""
    assert experiment.autointerp is not None, "checked where the experiment is read"
    return f"at most {expected(experiment, n_partitions).in_words(experiment.autointerp)}, to {experiment.autointerp.model}"


def _lacking() -> dict[str, str]:
    return {} if Endpoint.is_configured() else {"endpoint": NOT_CONFIGURED}


class _Drawn(NamedTuple):
    """A feature: how its row begins, and the texts that it is judged by, or what it has too few of."""

    start: Row
    examples: Examples | Flaw


@dataclass(frozen=True)
class _Explained:
    """Makes rows of the table."""

    workplace: Workplace
    subject: Subject
    partition: Partition
    settings: AutoInterpSettings
    contexts: Declaration
    label: str

    def rows(self, interviewer: Interviewer) -> list[Row]:
        drawn: list[_Drawn] = []
        questions: list[Question] = []
        for of_ensemble in self._of_ensembles():
            examples = [each.examples for each in of_ensemble if isinstance(each.examples, Examples)]
            first, n = len(questions), len(examples)
            controlled = self.settings.control and n > 1
            questions += [Question(each, first + (i + 1) % n if controlled else None) for i, each in enumerate(examples)]
            drawn += of_ensemble
        if interviewer.endpoint:
            estimate, host = interviewer.estimate(questions), interviewer.endpoint.host
            words = f"{estimate.in_words(self.settings)}, to {self.settings.model} at {host}"
            logger.info("%s: %d features: %s; %d answers are on disk", self.label, len(drawn), words, estimate.known)
        with progress.task(self.label, sum(2 if each.other is None else 3 for each in questions), "questions") as advance:
            verdicts = iter(interviewer.interview(questions, advance))
        rows = []
        for each in drawn:
            if isinstance(each.examples, Examples):
                verdict = next(verdicts)
                rows += [each.start | self._columns(verdict, len(each.examples.texts))] if verdict else []
            elif interviewer.endpoint:
                rows.append(each.start | {"status": each.examples, "model": self.settings.model})
        return sorted(rows, key=lambda row: (row["method"], row["member"], row["index"]))

    def _columns(self, verdict: Verdict, n_texts: int) -> Row:
        score, control = verdict.score, verdict.control
        return {
            "explanation": verdict.explanation,
            "detection_score": score.balanced_accuracy if score else None,
            "true_positive_rate": score.true_positive_rate if score else None,
            "false_positive_rate": score.false_positive_rate if score else None,
            "control_score": control.balanced_accuracy if control else None,
            "n_examples": n_texts,
            "status": verdict.status,
            "model": self.settings.model,
        }

    def _of_ensembles(self) -> Iterator[list[_Drawn]]:
        """The features of one ensemble after the other, in the order in which they are drawn."""
        import torch

        import saeens_models as sm
        from saeens_models.evaluation import silent_windows

        store, windows = self.workplace.store, self._windows()
        for method in METHODS:
            ensemble = sm.load_ensemble(store.require(getattr(self.subject, method).address, self.partition).path)
            found = self._draw(method)
            of_member = {j: [row for row in found if row["member"] == j] for j in range(1, len(ensemble) + 1)}
            indices = [torch.tensor([row["index"] for row in rows], dtype=torch.int64) for rows in of_member.values()]
            silent = silent_windows(ensemble, windows.activations(), indices)
            silent_texts = {
                (j, row["index"]): [text for text, is_silent in zip(windows.texts, column, strict=True) if is_silent]
                for (j, rows), of_windows in zip(of_member.items(), silent, strict=True)
                for row, column in zip(rows, of_windows.T.tolist(), strict=True)
            }
            starts = [column.name for column in SUBJECT] + ["member", "index"]
            yield [
                _Drawn(
                    {name: row[name] for name in starts},
                    choose_examples(
                        json.loads(row["contexts"]), silent_texts[row["member"], row["index"]], f"{row['member']}, {row['index']}"
                    ),
                )
                for row in found
            ]

    def _draw(self, method: str) -> list[Row]:
        """Rows of the table of contexts, of random features that fire: with a larger `features`, these and more."""
        import polars as pl

        path = self.workplace.store.require(self.contexts.address, self.partition).path
        fire = pl.scan_parquet(path, hive_partitioning=False).filter(pl.col("method") == method, pl.col("max_activation").is_not_null())
        drawn = fire.select("member", "index").collect().rows()
        random.Random(SEED).shuffle(drawn)
        drawn = drawn[: self.settings.features]
        chosen = pl.LazyFrame(drawn, schema={"member": pl.Int64, "index": pl.Int64}, orient="row")
        rows = {(row["member"], row["index"]): row for row in fire.join(chosen, on=["member", "index"], how="semi").collect().to_dicts()}
        return [rows[each] for each in drawn]

    def _windows(self) -> _Windows:
        import numpy as np

        store = self.workplace.store
        reader, tokens = open_reader(store, self.subject.activations, self.partition), TokenStrings(store, self.subject)
        n_rows = reader.n_rows("test")
        rows = np.sort(np.random.default_rng(SEED).choice(n_rows, min(WINDOWS, n_rows), replace=False))
        chunks = tokens.store.places("test", reader.chunk_rows)
        firsts = range(0, n_rows, reader.chunk_rows)
        places = np.concatenate(
            [
                of_chunk[rows[(rows >= first) & (rows < first + len(of_chunk))] - first]
                for first, of_chunk in zip(firsts, chunks, strict=True)
            ]
        )
        around = tokens.store.around("test", places, RADIUS)
        texts = [
            text_of(json.loads(literal) for literal, is_text in zip(tokens.literals(ids), shown, strict=True) if is_text)
            for ids, shown in zip(around.tokens, around.is_text, strict=True)
        ]
        begins = rows - around.kept[:, :RADIUS].sum(1)
        ends = rows + around.kept[:, RADIUS:].sum(1)
        return _Windows(texts, reader, list(zip(begins.tolist(), ends.tolist(), strict=True)))


@dataclass(frozen=True)
class _Windows:
    """Random windows of the test text, as wide as contexts are, in the order of the text."""

    texts: Sequence[str]
    reader: ActivationReader
    spans: Sequence[tuple[int, int]]  # their activation rows

    def activations(self) -> Iterator[Tensor]:
        """`[n_rows, d_in]` float32 of each."""
        import torch

        size = self.reader.chunk_rows
        held: dict[int, Tensor] = {}
        for begin, end in self.spans:
            held = {
                index: held[index] if index in held else self.reader.read_chunk("test", index).to(torch.float32, copy=True)
                for index in range(begin // size, -(-end // size))
            }
            yield torch.cat([chunk[max(0, begin - index * size) : end - index * size] for index, chunk in held.items()])
