"""The table `cost`: training and inference cost of every method, and its totals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from saeens_pipeline.assets.registry import Headline, Making, Row, Table, register
from saeens_pipeline.assets.tables.reconstruction import EVALUATION
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.storage.names import Address
from saeens_pipeline.storage.tables import Column

TOTALS = {"total_flops": ("train_flops", "residual_flops"), "total_seconds": ("train_seconds", "residual_seconds")}
"""Totals of training: the columns whose sum they are."""


def with_totals(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the rows with the `TOTALS` whose parts are among the columns. A missing residual counts as 0."""
    there = {total: parts for total, parts in TOTALS.items() if set(parts) <= set(rows.columns)}
    return rows.with_columns(**{total: pl.col(made) + pl.col(residual).fill_null(0) for total, (made, residual) in there.items()})


def residual_passes(making: Making) -> list[Mapping[str, Any]]:
    """Return the provenance of boosting's passes over the activations, in order; none where rounds are trained together."""
    experiment = making.experiment
    has_residuals = making.subject.boosting is not None and experiment.ensemble.boosting == "sequential"
    n_residuals = experiment.ensemble.members - 1 if has_residuals else 0
    addresses = [Address(experiment.name, "boosting", f"residual_{j}") for j in range(1, n_residuals + 1)]
    return [making.store.require(address, making.partition).provenance for address in addresses]


def _rows(making: Making) -> Iterator[Row]:
    experiment, mode, residuals = making.experiment, making.experiment.ensemble.boosting, residual_passes(making)
    for method, n, _, saes in making.methods():
        each = [sae.provenance for sae in saes]
        if method == "consensus":  # there is none without its members
            each += [sae.provenance for sae in making.members(making.subject.bagging)]
        passes = residuals[: n - 1] if method == "boosting" else []
        joint = [made for j, made in enumerate(each, start=1) if _is_trained_beside_others(experiment, method, j)]
        alone = [made for j, made in enumerate(each, start=1) if not _is_trained_beside_others(experiment, method, j)]
        yield making.row(method, n, saes) | {
            "train_tokens": _total(each, "train_tokens"),
            "train_flops": _total(each, "train_flops", 0.0),
            "train_seconds": _total(each, "train_seconds"),
            "residual_flops": float(sum(made["flops"] for made in passes)),
            "residual_seconds": sum((made["seconds"] for made in passes), 0.0),
            "peak_memory_bytes": _peak_memory(joint, [*alone, *passes]),
            "inference_flops_per_token": float(sum(sae.provenance["inference_flops_per_token"] for sae in saes)),
            "device": each[0]["device"],
            "dtype": each[0]["dtype"],
            "boosting_mode": mode if method == "boosting" else None,
        }


def _total(made: Sequence[Mapping[str, Any]], name: str, zero: float = 0) -> float | None:
    """Return the sum over the SAEs; None if one is published, and its training is not known."""
    values = [each[name] for each in made]
    return None if None in values else sum(values, zero)


def _is_trained_beside_others(experiment: ExperimentSettings, method: str, number: int) -> bool:
    if method == "bagging":
        return experiment.ensemble.specialisation(number) is None and experiment.ensemble.published_sae(number) is None
    return method == "boosting" and experiment.ensemble.boosting == "concurrent"


def _peak_memory(joint: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the largest peak: SAEs trained together share one peak, the others are trained one after another."""
    of_joint, of_others = ([made["peak_memory_bytes"] or 0 for made in group] for group in (joint, alone))
    return max([sum(of_joint), *of_others]) or None


_HEADLINES = (
    Headline("FLOPs", "total_flops", ".2g", leaderboard=8),
    Headline(
        "train FLOPs", "total_flops", ".3g", in_summary=False, place=13, name="training FLOPs", log=True,
        about="operations of training, dense equivalents: each feature counts for each token, so that they do not depend on the "
        "implementation. Boosting's passes over the activations that compute the residuals are counted in",
    ),
    Headline("seconds", "total_seconds", ".1f", leaderboard=9),
    Headline(
        "seconds", "total_seconds", ",.1f", in_summary=False, place=14, name="training seconds",
        about="seconds of training on this machine, with boosting's passes",
    ),
    Headline(
        "use FLOPs", "inference_flops_per_token", ".3g", in_summary=False, place=15, name="FLOPs per token",
        about="operations to encode and decode one token with the trained dictionary, dense equivalents",
    ),
)  # fmt: skip


register(
    Table(
        name="cost",
        question="What does each method cost to train and to use?",
        columns=(
            Column(
                "train_tokens",
                "int",
                "tokens seen in training, summed over members; all columns of training: of a consensus with its members, and null where an "
                "SAE is published, whose training is not known",
                less_is_better=True,
            ),
            Column("train_flops", "float", "dense-equivalent floating-point operations of training", less_is_better=True),
            Column(
                "train_seconds",
                "float",
                "seconds of training; those of a joint op are divided among its SAEs by FLOPs",
                less_is_better=True,
            ),
            Column("residual_flops", "float", "boosting's passes that compute residuals, not in train_flops", less_is_better=True),
            Column("residual_seconds", "float", "seconds of those passes, not in train_seconds", less_is_better=True),
            Column(
                "peak_memory_bytes",
                "int",
                "of the device, or on a CPU of the whole process with interpreter and libraries; a joint op's peak is divided among its "
                "SAEs by FLOPs: SAEs trained alone do not compare with SAEs trained together",
            ),
            Column("inference_flops_per_token", "float", "dense-equivalent operations to encode and decode one token"),
            Column("device", "str", "device of the training"),
            Column("dtype", "str", "of the weights"),
            Column("boosting_mode", "str", "sequential or concurrent; null for other methods"),
        ),
        rows=_rows,
        version=2,
        order=60,
        by_default=True,
        settings=lambda experiment: {"boosting": experiment.ensemble.boosting},
        shared_pass=EVALUATION,
        headlines=_HEADLINES,
        sae_part="provenance",
    )
)
