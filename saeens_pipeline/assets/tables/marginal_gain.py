"""The table `marginal_gain`: the gain of each further member or round, from the tables of all ensemble sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import polars as pl

from saeens_pipeline.assets.declarations import Declaration, Reference
from saeens_pipeline.assets.registry import Headline, Making, Row, Subject, Table, fills, register
from saeens_pipeline.assets.tables.cost import residual_passes
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column

_READ = ("reconstruction", "differences")
_GAINS = {"explained_variance": ("explained_variance_gain", 1), "ce_loss_added_nats": ("ce_loss_gain", -1)}
"""Column and sign of the gain in each metric."""
_WORDS = {True: "yes", False: "no", None: "cannot tell"}


def _inputs(subject: Subject) -> Sequence[Reference]:
    return [*(subject.table(name) for name in _READ if fills(subject.experiment, name)), *subject.ensembles.values()]


def _read(of_seed: Making, name: str) -> pl.DataFrame:
    table: Declaration = of_seed.subject.table(name)
    return pl.read_parquet(of_seed.require(table).path, hive_partitioning=False, glob=False)


def _rows(making: Making) -> Iterator[Row]:
    import saeens_models as sm

    subject, reasons = making.subject, {}
    has_intervals = fills(making.experiment, "differences")
    for method, ensemble in subject.ensembles.items():
        rows: dict[tuple[int | None, int], Row] = {}
        gains: dict[tuple[int, str], list[sm.metrics.Gain]] = {}
        for of_seed in making.of_seeds:
            saes, seed = of_seed.members(ensemble), of_seed.partition.seed
            new_features = sm.metrics.new_features([sm.load_sae(sae.path).W_dec.detach().to(making.device) for sae in saes])
            values = _read(of_seed, "reconstruction").filter(method=method).sort("n_members")
            intervals = _intervals(_read(of_seed, "differences"), method) if has_intervals else {}
            passes = [0, *(each["flops"] for each in residual_passes(of_seed))] if method == "boosting" else []
            costs = _costs(saes, passes)
            for n in range(1, len(saes) + 1):
                row = rows[seed, n] = of_seed.row(method, n, saes[:n]) | {"new_features": new_features[n - 1]}
                if n == 1:
                    row["explained_variance_gain"] = values["explained_variance"][0]
                    continue
                for metric, (column, sign) in _GAINS.items():
                    before, after = values[metric][n - 2], values[metric][n - 1]
                    if before is None:
                        continue
                    low, high = intervals.get((metric, n), (None, None))
                    if sign < 0 and low is not None and high is not None:
                        low, high = -high, -low
                    row |= {column: sign * (after - before), f"{column}_low": low, f"{column}_high": high}
                    cost = costs[n - 1] / costs[0] if costs[0] else 1.0
                    remaining = 1 - before if sign > 0 else before
                    gains.setdefault((n, metric), []).append(sm.metrics.Gain(remaining, low, high, cost))
        members = range(2, making.experiment.ensemble.members + 1)
        decisions = [sm.metrics.is_worthwhile([of for (m, _), of in gains.items() if m == n]) for n in members]
        suggested = sm.metrics.suggested_size(decisions)
        if suggested is None:
            reasons[method] = _reason([n for n, each in zip(members, decisions, strict=True) if each is None], has_intervals)
        for (_, n), row in rows.items():
            yield row | {"worthwhile": _WORDS[decisions[n - 2]] if n > 1 else None, "suggested": suggested}
    if reasons:
        making.provenance["cannot_tell"] = reasons


def _costs(saes: Sequence[Artefact], passes: Sequence[float]) -> list[float]:
    """Return the FLOPs of training each SAE, with the pass for its residual.

    Where an SAE is published, and those of its training are not known, return the FLOPs of using each SAE on one token.
    """
    trained = [sae.provenance["train_flops"] for sae in saes]
    if None in trained:
        return [sae.provenance["inference_flops_per_token"] for sae in saes]
    return [flops + sum(passes[j : j + 1]) for j, flops in enumerate(trained)]


def _intervals(differences: pl.DataFrame, method: str) -> dict[tuple[str, int], tuple[float | None, float | None]]:
    """Return, by metric and n, the interval of the first n members minus the first n - 1."""
    consecutive = differences.filter(pl.col("other_n_members") == pl.col("n_members") - 1, method=method, other_method=method)
    return {(metric, n): (low, high) for metric, n, low, high in consecutive.select("metric", "n_members", "low", "high").iter_rows()}


def _reason(undecided: Sequence[int], has_intervals: bool) -> str:
    if not has_intervals:
        return "the table differences, which has the intervals, is not among the evaluations"
    return f"the intervals over documents do not decide about member {', '.join(map(str, undecided))}"


def _summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
    suggested = table.drop_nulls("suggested").group_by("method").agg(pl.col("suggested").first()).sort("method")
    return {f"suggested number of members of {method}": size for method, size in suggested.iter_rows()} | {
        f"no suggestion for {method}": reason for method, reason in artefact.provenance.get("cannot_tell", {}).items()
    }


def _conclusion(table: pl.DataFrame) -> str:
    members = table["n_members"].max()
    suggested = table.group_by("method").agg(pl.col("suggested").first()).sort("method")
    sizes = ", ".join(
        f"{method} {'cannot tell' if size is None else f'{size} or more' if size == members else size}"
        for method, size in suggested.iter_rows()
    )
    return f"suggested ensemble size: {sizes} (eval/marginal_gain has the gain of each member)" if sizes else ""


_DECIDE = ("explained_variance", "low")


def _interval_of(column: str) -> tuple[Column, Column]:
    return (
        Column(f"{column}_low", "float", "lower end of its 95% interval over documents; null for the first member", from_columns=("low",)),
        Column(f"{column}_high", "float", "upper end of the same", from_columns=("high",)),
    )


register(
    Table(
        name="marginal_gain",
        question="How many members or rounds are enough?",
        columns=(
            Column(
                "explained_variance_gain",
                "float",
                "explained variance minus that of one member less; for the first member, its own",
                from_columns=("explained_variance",),
            ),
            *_interval_of("explained_variance_gain"),
            Column(
                "ce_loss_gain",
                "float",
                "next-token loss, in nats per token, that the member takes away; null for the first, and if it was not measured",
                from_columns=("ce_loss_added_nats",),
            ),
            *_interval_of("ce_loss_gain"),
            Column("new_features", "int", "features of member n whose largest cosine to the features of earlier members is below 0.7"),
            Column(
                "worthwhile",
                "str",
                "yes, no or cannot tell: whether the whole interval of a gain, in every seed, is above 5% of the gap that remains to "
                "explained variance 1, or to the loss of the activations, times the member's training FLOPs, with the pass for its "
                "residual, over the first member's (where one is published: its FLOPs per token of use); null for the first",
                from_columns=_DECIDE,
            ),
            Column(
                "suggested",
                "int",
                "smallest number of members after which no further one is worthwhile; null if that cannot be told; the same in all rows "
                "of a method",
                from_columns=_DECIDE,
            ),
        ),
        rows=_rows,
        inputs=_inputs,
        version=3,
        dimensions="layer",
        order=50,
        by_default=True,
        requires=("reconstruction",),
        conclusion=_conclusion,
        summary=_summary,
        headlines=tuple(
            Headline(name, column, ".4g", in_summary=False, about=about)
            for column, name, about in (
                ("explained_variance_gain", "explained variance that a member adds", "over that of one member less"),
                ("new_features", "new features of a member", ""),
                ("ce_loss_gain", "next-token loss that a member takes away", "in nats per token, over one member less"),
            )
        ),
    )
)
