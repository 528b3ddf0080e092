"""The table `reconstruction`: explained variance, sparsity, description length and recovered loss of every dictionary."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from saeens_pipeline.assets.declarations import Facts, Reference
from saeens_pipeline.assets.registry import Headline, Making, Row, SharedPass, Subject, Table, register
from saeens_pipeline.assets.sources import measures_loss
from saeens_pipeline.settings.experiments import CheckSettings, ExperimentSettings
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column


def _evaluate(making: Making) -> Any:
    from saeens_pipeline.assets.measurements.dictionaries import evaluate

    return evaluate(making)


EVALUATION = SharedPass("tables", _evaluate)
"""One pass over the test activations. Tables that do not need its result may join the op."""


def _rows(making: Making) -> Iterator[Row]:
    from saeens_pipeline.assets.measurements.dictionaries import sizes

    if losses := making.shared.losses:
        floors = {"ablated": losses.ablated, "replaced_by_mean": losses.replaced_by_mean}
        making.provenance["next_token_loss"] = {"clean": losses.clean, **floors, "tokens": losses.tokens}
    statistics = making.require(making.subject.activations).provenance["statistics"]
    rows_of_source = {f"{split}_rows_dropped": statistics[split].get("dropped", 0) for split in ("train", "test")}
    rows_of_source["top_rows_variance"] = statistics["test"].get("top_share")
    targets = {(method, n): _l0_target(saes) for method, n, _, saes in making.methods()}
    for row, size in sizes(making):
        target = targets[row["method"], row["n_members"]]
        sparsity = {name: getattr(size.sparsity, name) for name in ("l0", "relative_sparsity", "dead_features")}
        sparsity["l0_error"] = None if target is None else size.sparsity.l0 / target - 1
        others: Row = {"description_length_bits": size.description_length}
        others |= {name: getattr(size, name) for name in ("ce_loss_recovered", "ce_loss_recovered_from_mean", "ce_loss_added_nats")}
        yield row | {"n_features": size.n_features} | dict(size.reconstruction) | sparsity | others | rows_of_source


def _l0_target(saes: Sequence[Artefact]) -> float | None:
    """Return the sum of the SAEs' `k` or `l0_target`; None if one has neither: a coefficient alone decides its L0."""
    from saeens_models import SAESettings

    targets = [
        sae.provenance["l0_target"] if "published" in sae.provenance else SAESettings.model_validate(sae.recipe["settings"]["sae"]).l0
        for sae in saes
    ]
    known = [target for target in targets if target is not None]
    return sum(known) if len(known) == len(targets) else None


def loss_inputs(subject: Subject) -> Sequence[Reference]:
    """Return the inputs of a table with the next-token loss: tokens if it is measured, activations and dictionaries."""
    sources = [subject.tokens, subject.activations] if subject.experiment.ce_loss_tokens else [subject.activations]
    return [*sources, *subject.dictionaries]


def _preflight(experiment: ExperimentSettings, facts: Facts) -> None:
    if experiment.ce_loss_tokens and "ce_loss_tokens" in experiment.model_fields_set:
        measures_loss(experiment, facts().describe_model(), facts().patching_problem)


def _warnings(table: pl.DataFrame, checks: CheckSettings) -> Iterable[str]:
    least = checks.min_explained_variance
    if least is None:
        return
    whole = table.filter(pl.col("n_members") == pl.col("n_members").max().over("method"), pl.col("explained_variance") < least)
    for method, n, value in whole.select("method", "n_members", "explained_variance").iter_rows():
        yield f"held-out explained variance of {method} with n_members {n} is {value}, below min_explained_variance: {least:g}"


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    loss = artefact.provenance.get("next_token_loss")
    if not loss:
        return {}
    return {
        "next-token loss [nats]": round(loss["clean"], 4),
        "with zeros at the hook [nats]": round(loss["ablated"], 4),
        "with the mean activation at the hook [nats]": round(loss["replaced_by_mean"], 4),
        "measured on [tokens replaced]": loss["tokens"],
    }


_HEADLINES = (
    Headline(
        "EV", "explained_variance", ".4f", place=1, leaderboard=1, of_control=True, name="explained variance", better="more",
        about="share of the held-out activations' variance that the reconstruction explains. 1 is perfect, 0 no better than the mean",
    ),
    Headline(
        "MSE", "mse", ".4g", in_summary=False, place=2, name="mean squared error", better="less", log=True,
        about="squared error of the reconstruction, summed over dimensions, mean over held-out tokens. Its scale is the activations' own: "
        "compare it within one language model and layer",
    ),
    Headline(
        "CE rec.", "ce_loss_recovered", ".4f", place=3, leaderboard=2, name="loss recovered", better="more",
        about="how well the language model predicts the next token (cross-entropy) with the reconstruction in place of the activations. 1: "
        "as well as with the activations, 0: as badly as with zeros",
    ),
    Headline("bits", "description_length_bits", ".0f", leaderboard=3),
    Headline(
        "bits", "description_length_bits", ",.0f", in_summary=False, place=5, name="description length (bits per token)", log=True,
        about="bits per token that send the code: which features fire, and how strongly",
    ),
    Headline(
        "L0", "l0", ".1f", place=4, leaderboard=4, name="L0 (features per token)", log=True,
        about="features that fire (are not zero) per token",
    ),
    Headline("features", "n_features", ".0f", leaderboard=5),
    Headline("features", "n_features", ",.0f", in_summary=False, place=12),
    Headline("dead", "dead_features", ".1%", in_summary=False, place=11, name="dead features", better="less"),
)  # fmt: skip


register(
    Table(
        name="reconstruction",
        question="How well does each dictionary rebuild activations?",
        columns=(
            Column("n_features", "int", "features of the whole dictionary", less_is_better=True),
            Column(
                "mse", "float", "mean over tokens of the squared error summed over d_in, in the activations' own scale", less_is_better=True
            ),
            Column("explained_variance", "float", "mean over dimensions of 1 - squared error / variance"),
            Column("fvu", "float", "total squared error / total variance", less_is_better=True),
            Column("l0", "float", "features that fire per token", less_is_better=True),
            Column("l0_error", "float", "l0 / the sum of k or l0_target over the SAEs - 1; null for SAEs without one"),
            Column("relative_sparsity", "float", "l0 / n_features", less_is_better=True),
            Column("dead_features", "float", "share of features that never fire on the test tokens", less_is_better=True),
            Column("constant_dimensions", "int", "dimensions without variance, left out of explained_variance"),
            Column(
                "description_length_bits",
                "float",
                "bits per token that send the code, magnitudes to 1/256 of the mean norm",
                less_is_better=True,
            ),
            Column("ce_loss_recovered", "float", "share of the next-token loss that zeros add and the reconstruction recovers"),
            Column("ce_loss_recovered_from_mean", "float", "the same with the mean training activation as the floor instead of zeros"),
            Column(
                "ce_loss_added_nats",
                "float",
                "next-token loss with the reconstruction minus that with the activations, in nats per token",
                less_is_better=True,
            ),
            Column("tokens", "int", "test tokens"),
            Column("train_rows_dropped", "int", "training rows dropped for their norm (max_norm)"),
            Column("test_rows_dropped", "int", "test rows dropped for their norm (max_norm)"),
            Column(
                "top_rows_variance",
                "float",
                "share of the test rows' variance in 0.1 % of them; above 0.1, explained_variance describes these",
            ),
        ),
        rows=_rows,
        inputs=loss_inputs,
        version=5,
        order=10,
        by_default=True,
        settings=lambda experiment: {"ce_loss_tokens": experiment.ce_loss_tokens},
        shared_pass=EVALUATION,
        preflight=_preflight,
        headlines=_HEADLINES,
        figures={
            "explained_variance": "held-out explained variance",
            "ce_loss_recovered": "next-token loss recovered",
            "l0": "held-out L0 [features per token]",
            "dead_features": "held-out share of dead features",
        },
        seed_metrics=(
            *("explained_variance", "mse", "fvu", "ce_loss_recovered", "ce_loss_recovered_from_mean", "ce_loss_added_nats"),
            *("description_length_bits", "l0", "relative_sparsity", "dead_features"),
        ),
        warnings=_warnings,
        summary=_summary,
        source_parts={
            "tokens": dict.fromkeys(("ce_loss_recovered", "ce_loss_recovered_from_mean", "ce_loss_added_nats"), "test/tokens"),
            "activations": {"*": "test/activations"},
        },
    )
)
