"""The table `autointerp`: explanations of features by a language model, and scores of the explanations.

The endpoint is configured by environment variables, because answers cost money. Without an endpoint the table has the answers on disk,
usually none, and `not configured` is a setting of its recipe (`Declaration.unavailable`): with an endpoint it is made again. A table made
with an endpoint stays a cache hit without one. All answers are kept on disk (`Answers`), independent of recipes.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from saeens_pipeline.assets.declarations import Reference
from saeens_pipeline.assets.registry import Making, Markdown, Subject, Table, register, table_frame
from saeens_pipeline.assets.tables.contexts import CONTEXTS, RADIUS
from saeens_pipeline.language_models.autointerp.answers import Answers
from saeens_pipeline.language_models.autointerp.endpoint import KEY_VARIABLE, URL_VARIABLE, Endpoint
from saeens_pipeline.language_models.autointerp.interview import CHARACTERS_PER_TOKEN, MALFORMED, REFUSED, SCORED, Estimate, Interviewer
from saeens_pipeline.language_models.autointerp.protocol import SEED
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import ENSEMBLES, Address, Partition, place
from saeens_pipeline.storage.recipes import Artefact, DamagedArtefactError, Store, read_artefact
from saeens_pipeline.storage.tables import Column, read_table

logger = logging.getLogger(__name__)

PROTOCOL_VERSION = 2  # increased whenever the questions or the meaning of answers change
AUTOINTERP = "autointerp"
MADE, NOT_CONFIGURED = "made", "not configured"  # status in the provenance of a table
WHY = {  # reasons why a feature is not scored, by status
    MALFORMED: "no answer that could be read",
    REFUSED: "the endpoint refused a request",
    "too few contexts": "not asked about, it fires on too few texts",
    "too few silent windows": "not asked about, it is silent on too few texts",
}


def outcome(store: Store, experiment: str, seeds: Collection[int], layer: int | None = None) -> str:
    """Return counts of features that were asked about and scored, with reasons for the others and, without an endpoint, how to set one.

    Counts these seeds, and one layer or all. Code is in backticks. Empty without a table. Raises SaeensError for a table that cannot be
    read.
    """
    address = Address(experiment, "eval", AUTOINTERP)
    there = [each for each in store.partitions(address, "layer", "seed") if each.seed in seeds and layer in (None, each.layer)]
    if not there:
        return ""
    rows = read_table(store.root, experiment, AUTOINTERP, layer).filter(pl.col("seed").is_in(list(seeds)))
    sentences = [in_words(rows)] if len(rows) else ["No feature was asked about."]
    lacking = [where for where in there if _had_no_endpoint(store, address, where)]
    if lacking:
        which = "" if len(lacking) == len(there) else f" for {' and '.join(map(str, lacking))}"
        kept = ": these answers are from earlier runs" if len(rows) and not which else ""
        sentences.append(
            f"No endpoint was configured{which}{kept}. Set `{URL_VARIABLE}` to the address of a language model, such as "
            f"`http://localhost:8080/v1`, and `{KEY_VARIABLE}` if it wants a key, then `saeens run {experiment}`."
        )
    return " ".join(sentences)


def in_words(rows: pl.DataFrame) -> str:
    """Return the counts of one or more rows by status, as sentences."""
    counts = dict(rows["status"].value_counts(sort=True, name="n").sort("n", "status", descending=[True, False]).iter_rows())
    n_scored, n_asked = counts.get(SCORED, 0), sum(n for status, n in counts.items() if not status.startswith("too few"))
    models = " and ".join(sorted(set(rows["model"])))
    are = "is" if n_scored == 1 else "are"
    sentences = [f"Of {len(rows):,} features that were drawn, {models} was asked about {n_asked:,}; {n_scored:,} {are} scored."]
    others = [f"{n:,} ({status}{f': {WHY[status]}' if status in WHY else ''})" for status, n in counts.items() if status != SCORED]
    if others:
        sentences.append(f"Not scored: {', '.join(others)}.")
    without_control = rows.filter(pl.col("status") == SCORED, pl.col("control_score").is_null()).height
    if 0 < without_control < n_scored:
        sentences.append(f"Without a control score: {without_control:,} of those that are.")
    return " ".join(sentences)


def _had_no_endpoint(store: Store, address: Address, where: Partition) -> bool:
    try:
        made = read_artefact(store.path(address, where)).provenance
    except DamagedArtefactError:  # damage is reported by the health check
        return False
    return made.get(AUTOINTERP, {}).get("status") == NOT_CONFIGURED


def expected(experiment: ExperimentSettings, n_partitions: int) -> Estimate:
    """Return the largest number of requests and tokens for so many partitions. Stored answers are not subtracted."""
    assert experiment.autointerp is not None, "checked where the experiment is read"
    n_features = experiment.autointerp.features * (len(ENSEMBLES) if experiment.saes else 1) * n_partitions
    return Estimate.beforehand(experiment.autointerp, n_features, CONTEXTS, 2 * RADIUS + 1)


def _rows(making: Making) -> pl.DataFrame:
    from saeens_pipeline.assets.measurements.autointerp import explained_rows

    settings = making.experiment.autointerp
    assert settings is not None, "checked where the experiment is read"
    answers, endpoint = Answers(making.store.root), Endpoint.from_environment()
    label = place(making.subject.table(AUTOINTERP).address, making.partition)
    if endpoint is None:
        logger.warning("%s: not configured: set %s to the address of a language model and run again", label, URL_VARIABLE)
    interviewer = Interviewer(settings, answers, endpoint)
    rows = explained_rows(making, interviewer, label, tuple(making.subject.ensembles), RADIUS) if endpoint or not answers.is_empty else []
    making.provenance[AUTOINTERP] = {
        "status": MADE if endpoint else NOT_CONFIGURED,
        "requests": interviewer.asked,
        "answers_from_disk": interviewer.from_disk,
        "malformed_answers": interviewer.malformed,
        "tokens_in": interviewer.tokens_in,
        "tokens_out": interviewer.tokens_out,
    }
    table = table_frame(AUTOINTERP, rows)
    if rows:
        logger.info("%s: %s", label, in_words(table))
    return table


def _inputs(subject: Subject) -> Sequence[Reference]:
    return [subject.tokens, subject.activations, *subject.ensembles.values(), subject.table("contexts")]


def _settings(experiment: ExperimentSettings) -> Mapping[str, Any]:
    assert experiment.autointerp is not None, "checked where the experiment is read"
    return {**experiment.autointerp.decisive, "protocol": PROTOCOL_VERSION, "seed": SEED}


def _complaint(experiment: ExperimentSettings) -> str:
    return "" if experiment.autointerp else "autointerp asks a language model: name one, as in autointerp: {model: gpt-4o-mini}"


def _announcement(experiment: ExperimentSettings, n_partitions: int) -> str:
    endpoint, settings = Endpoint.from_environment(), experiment.autointerp
    if endpoint is None or settings is None:
        return ""
    return f"at most {expected(experiment, n_partitions).in_words(settings)}, to {settings.model} at {endpoint.host}"


def _forecast(experiment: ExperimentSettings, n_partitions: int) -> Iterator[tuple[str, float | None, str, str]]:
    """Yield requests, tokens and price of explaining features."""
    settings, estimate = experiment.autointerp, expected(experiment, n_partitions)
    assert settings is not None, "checked where the experiment is read"
    price = estimate.price(settings)
    yield "requests", estimate.requests, "", f"to {settings.model}, at most; stored answers are not requested again"
    yield "tokens in", estimate.tokens_in, "tokens", f"at {CHARACTERS_PER_TOKEN} characters a token"
    yield "tokens out", estimate.tokens_out, "tokens", "without reasoning tokens"
    yield "price", price, "money", "" if price is not None else "autointerp.prices: prices of a million tokens"


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    """Return the status of the endpoint, means over features, and numbers of requests and answers."""
    made = artefact.provenance[AUTOINTERP]
    scored = table.drop_nulls("detection_score").group_by("method", maintain_order=True)
    means = scored.agg(pl.len(), pl.col("detection_score", "control_score").mean())
    rows = [
        f"| {method} | {n} | {score:.3f} | {'' if control is None else format(control, '.3f')} |"
        for method, n, score, control in means.iter_rows()
    ]
    others = table.filter(pl.col("status") != SCORED).group_by("status", maintain_order=True).len()
    head = ["| method | features scored | mean detection score | with another feature's explanation |", "|---|---|---|---|"]
    return {
        "status": made["status"],
        "summary": Markdown("\n".join([*head, *rows])) if rows else None,
        "not scored": ", ".join(f"{n}: {why}" for why, n in others.iter_rows()) or None,
        "requests asked": made["requests"],
        "answers from disk": made["answers_from_disk"],
        "malformed answers": made["malformed_answers"],
        "tokens in": made["tokens_in"],
        "tokens out": made["tokens_out"],
    }


register(
    Table(
        name=AUTOINTERP,
        of_sources="text",
        question="Can a language model tell when a feature fires?",
        columns=(
            Column("member", "int", "member or round, from 1"),
            Column("index", "int", "row of that member's W_dec, from 0"),
            Column("explanation", "str", "from every other context in contexts; null where there is none", from_columns=("contexts",)),
            Column("detection_score", "float", "balanced accuracy of telling, by the explanation, where it fires; 0.5 is chance"),
            Column("true_positive_rate", "float", "share of the other contexts that are said to fit the explanation"),
            Column("false_positive_rate", "float", "share of random windows, on which it does not fire, that are said to fit"),
            Column("control_score", "float", "detection_score on the same texts with another feature's explanation"),
            Column("n_examples", "int", "number of texts behind the scores, half of them contexts; null if there are too few"),
            Column("status", "str", "scored, malformed answer, refused, too few contexts, too few silent windows"),
            Column("model", "str", "the language model that was asked"),
        ),
        rows=_rows,
        inputs=_inputs,
        order=90,
        settings=_settings,
        unavailable=lambda: {} if Endpoint.is_configured() else {"endpoint": NOT_CONFIGURED},
        on_device=False,
        requires=("contexts",),
        complaint=_complaint,
        announcement=_announcement,
        forecast=_forecast,
        may_be_empty=True,
        summary=_summary,
        note=outcome,
    )
)
