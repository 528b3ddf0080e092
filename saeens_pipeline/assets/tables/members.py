"""The table `members`: each member or round on its own input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from saeens_pipeline.assets.registry import Making, Markdown, Row, Table, register
from saeens_pipeline.assets.tables.reconstruction import EVALUATION
from saeens_pipeline.settings.experiments import CheckSettings
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column


def _rows(making: Making) -> Iterator[Row]:
    for method, ensemble in making.subject.ensembles.items():
        members = making.shared.evaluations[ensemble.address.name].members
        for number, (sae, member) in enumerate(zip(making.members(ensemble), members, strict=True), start=1):
            yield making.row(method, len(members), [sae]) | {
                "member": number,
                "mse": member.reconstruction.mse,
                "explained_variance": member.reconstruction.explained_variance,
                "l0": member.sparsity.l0,
                "dead_features": member.sparsity.dead_features,
                "mean_max_cosine_to_other_members": member.mean_max_cosine_to_other_members,
                "median_density": member.sparsity.density.median().item(),
            }


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    rows = "\n".join(
        f"| {row['method']} {row['member']} | {row['explained_variance']:.4f} | {row['l0']:.1f} | {row['dead_features']:.1%} |"
        for row in table.iter_rows(named=True)
    )
    means = table.group_by("method").agg(pl.col("explained_variance").mean()).sort("method")
    numbers = {f"mean explained variance of own inputs, {method}": round(value, 4) for method, value in means.iter_rows()}
    return numbers | {"members": Markdown(f"| SAE | EV of its own input | L0 | dead |\n|---|---|---|---|\n{rows}")}


def _warnings(table: pl.DataFrame, checks: CheckSettings) -> Iterator[str]:
    for row in table.filter(pl.col("dead_features") > checks.max_dead_features).iter_rows(named=True):
        yield (
            f"{row['dead_features']:.0%} of the features of {row['method']} {row['member']} never fire on the test tokens, more than "
            f"max_dead_features: {checks.max_dead_features:g}"
        )


register(
    Table(
        name="members",
        question="How good is each member or round on its own input?",
        columns=(
            Column("member", "int", "member or round, from 1"),
            Column("mse", "float", "of the member's own input: squared error summed over d_in, mean over tokens"),
            Column("explained_variance", "float", "of the member's own input"),
            Column("l0", "float", "features that fire per token"),
            Column("dead_features", "float", "share of features that never fire on the test tokens"),
            Column("mean_max_cosine_to_other_members", "float", "mean over features of the largest cosine to a feature of another member"),
            Column("median_density", "float", "median over features of the share of tokens on which they fire"),
        ),
        rows=_rows,
        figures={  # of single SAEs that `reconstruction` has no row about: members and rounds after the first
            "explained_variance": "held-out explained variance of its own input",
            "l0": "held-out L0 [features per token]",
            "dead_features": "held-out share of dead features",
        },
        summary=_summary,
        warnings=_warnings,
        inputs=lambda subject: [subject.activations, *subject.dictionaries],
        order=20,
        by_default=True,
        shared_pass=EVALUATION,
    )
)
