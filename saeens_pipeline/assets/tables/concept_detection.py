"""The table `concept_detection`, and the declaration that it shares with `spurious_correlation`: probes on labelled texts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from saeens_pipeline.assets.declarations import Facts
from saeens_pipeline.assets.registry import Curve, Making, Markdown, Row, SharedPass, Table, register
from saeens_pipeline.language_models.labelled_texts.reading import identity
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.probing import PROBE_SEED
from saeens_pipeline.storage.recipes import Artefact
from saeens_pipeline.storage.tables import Column


def _probe(making: Making) -> Any:
    from saeens_pipeline.assets.measurements.probing import probe

    return probe(making)


_PROBING = SharedPass("downstream", _probe)


def probe_table(name: str, curve: Curve, **fields: Any) -> Table:
    """Return a table of probes whose texts are the experiment's settings of the same name."""

    def preflight(experiment: ExperimentSettings, facts: Facts) -> None:
        from saeens_pipeline.assets.measurements.probing import read_labelled_texts

        read_labelled_texts(experiment, [name], facts())

    def rows(making: Making) -> Iterable[Row]:
        from saeens_pipeline.assets.measurements.probing import texts_left_out

        if left_out := texts_left_out(making.experiment, name):
            making.provenance["texts_left_out"] = left_out
        return making.shared[name]

    def summary(table: pl.DataFrame, artefact: Artefact) -> Mapping[str, Any]:
        left_out = {
            data_set: ", ".join(f"{n:,} {why}" for why, n in reasons.items())
            for data_set, reasons in artefact.provenance.get("texts_left_out", {}).items()
        }
        return {**_summary(table, curve), **{f"rows left out of {data_set}": words for data_set, words in left_out.items()}}

    return Table(
        name=name,
        of_sources="text",
        rows=rows,
        summary=summary,
        inputs=lambda subject: [subject.tokens, subject.activations, *subject.dictionaries],
        settings=lambda experiment: {**getattr(experiment, name).model_dump(mode="json"), "seed": PROBE_SEED},
        partition_settings=lambda experiment: {"texts": [identity(data_set) for data_set in getattr(experiment, name).datasets]},
        shared_pass=_PROBING,
        preflight=preflight,
        has_slow_preflight=True,
        source_parts={"activations": {"*": "language_model"}},
        curve=curve,
        **fields,
    )


def _summary(table: pl.DataFrame, curve: Curve) -> Mapping[str, Any]:
    """Return the curve as a Markdown table: a row for each method with all its members, a column for each number of features."""
    number, value, over = curve.x, curve.y, curve.group
    table = table.filter(code_scale="unscaled") if "code_scale" in table.columns else table
    largest = table.filter(pl.col("n_members") == pl.col("n_members").max().over("method"))
    by = ["method", "n_members", number]
    means = (
        largest.group_by(*by, over, maintain_order=True)
        .agg(pl.col(value).mean())
        .group_by(by, maintain_order=True)
        .agg(pl.col(value).mean())
    )
    numbers = means.filter(method="single")[number].to_list()
    lines = [f"| {value.replace('_', ' ')} with n = | {' | '.join(map(str, numbers))} |", "|---" * (len(numbers) + 1) + "|"]
    for of_method in means.partition_by("method", maintain_order=True):
        found = dict(of_method.select(number, value).iter_rows())
        cells = ["" if found.get(n) is None else f"{found[n]:.3f}" for n in numbers]
        lines.append(f"| {of_method['method'][0]} | {' | '.join(cells)} |")
    return {"summary": Markdown("\n".join(lines))}


register(
    probe_table(
        "concept_detection",
        question="How much of a concept is in a few features?",
        columns=(
            Column("dataset", "str", "data set of the texts"),
            Column("label", "str", "the label that the probe tells from the others"),
            Column("n_probe_features", "int", "features of the probe; of n members also n times as many"),
            Column("code_scale", "str", "unscaled: the members' own codes; 1/J: divided by n_members, as in bagging's reconstruction"),
            Column("accuracy", "float", "of a logistic regression on test texts, half of which have the label"),
            Column("n_distinct_features", "int", "of these features, those left when near-duplicates (cosine 0.7) are counted once"),
            Column("accuracy_distinct", "float", "of a probe on as many features, none a near-duplicate of a better one"),
        ),
        order=100,
        curve=Curve(
            "Concept detection",
            "Accuracy of a probe on the n features that tell a label best: mean over labels, then over data sets.",
            *("features of the probe", "accuracy"),
            *("n_probe_features", "accuracy", "dataset"),
        ),
    )
)
