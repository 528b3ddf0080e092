"""The comparison of a sweep's experiments: explained variance and recovered loss, against L0 and against description length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import polars as pl

from saeens_pipeline.assets.baselines.registry import methods
from saeens_pipeline.assets.declarations import Declaration, Input
from saeens_pipeline.assets.massive_activations import SHARE, cautions, marked
from saeens_pipeline.assets.over_seeds import measurements, over_seeds
from saeens_pipeline.assets.registry import Table, columns_of, register, summary_titles, table_frame
from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.settings.experiments import ExperimentSettings
from saeens_pipeline.settings.sweeps import swept
from saeens_pipeline.storage.names import Address
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.tables import Column

PARETO = "pareto"
PARETO_VERSION = 4
_QUESTION = "Which method explains and recovers most for its L0 and for its bits?"
TABLE_FILE, PICTURE_FILE = "pareto.parquet", "pareto.png"
_SPENT, _GAINED = ("l0", "description_length_bits"), ("explained_variance", "ce_loss_recovered")
_MEASURED = (*_SPENT, *_GAINED)
_FRONTS = {  # column: what is spent, and what is gained
    "on_l0_front": ("l0", "explained_variance"),
    "on_bits_front": ("description_length_bits", "explained_variance"),
    "on_l0_front_by_ce": ("l0", "ce_loss_recovered"),
    "on_bits_front_by_ce": ("description_length_bits", "ce_loss_recovered"),
}
_READ = {
    "reconstruction": ("language_model", "sae_data_versions", "n_features", SHARE, *_MEASURED),
    "cost": ("train_flops", "residual_flops"),
}


def pareto_declaration(settings: ExperimentSettings, outputs: Iterable[Declaration]) -> Declaration:
    """Declare the comparison of a sweep. It is computed from the tables on disk and waits for none."""
    assert settings.sweep is not None, "not a sweep"
    field, values = swept(settings.sweep)
    tables = [each for each in outputs if each.address.kind == "eval" and each.address.name in _READ]
    return Declaration(
        address=Address(settings.name, "report", PARETO),
        dimensions="none",
        builder=PARETO,
        version=PARETO_VERSION,
        settings={"field": field, "values": dict(zip((each.name for each in settings.experiments), values, strict=True))},
        inputs=tuple(Input(str(table.address), table, optional=True) for table in tables),
        source=settings.source,
        kinds=frozenset({"parquet", "polars"}),
        tags={"experiment": settings.name, "source": settings.source, "table": PARETO},
        description=f"{_QUESTION}\n\n`saeens pareto {settings.name}` prints it, computed from the tables on disk.",
    )


def pareto_rows(store: Store, pareto: Declaration) -> pl.DataFrame:
    """Return a row for each evaluated layer, method and value: means over seeds, with the points.

    Ensembles have rows with all their members, expanded SAEs a row for each width.
    """
    sweep = {"sweep": pareto.address.owner, "field": pareto.settings["field"]}
    values, columns = pareto.settings["values"], {column.name for column in columns_of(PARETO)}
    measured = with_totals(measurements(store, pareto, _READ))
    rows = [
        {name: value for name, value in row.items() if name in columns} | sweep | {"value": float(values[row["experiment"]])}
        for row in over_seeds(measured, _MEASURED, ["total_flops", SHARE])
    ]
    table = table_frame(PARETO, rows)
    table = table.with_columns(**{column: _front(table, spent, gained) for column, (spent, gained) in _FRONTS.items()})
    order = pl.col("method").replace_strict({method: i for i, method in enumerate(methods())}, return_dtype=pl.Int64)
    return table.sort("layer", order, "n_members", "value")


def not_evaluated(table: pl.DataFrame, pareto: Declaration) -> list[str]:
    """Return the experiments of the sweep without a row."""
    return [name for name in pareto.settings["values"] if name not in set(table["experiment"])]


def notes(table: pl.DataFrame, pareto: Declaration) -> Iterator[str]:
    """Yield a sentence for each missing experiment, for missing description lengths, and for explained variance about a few rows."""
    for name in not_evaluated(table, pareto):
        yield f"{name} is not evaluated yet: run `saeens run {name}`"
    without = table.filter(table["description_length_bits"].is_null())["experiment"].unique(maintain_order=True)
    if len(without):
        yield f"{', '.join(without)}: no description length was measured; left out of that picture"
    yield from cautions(table)


def for_reading(table: pl.DataFrame) -> pl.DataFrame:
    """Return the columns for the terminal of rows of one layer."""
    titles = summary_titles([*_MEASURED, "n_features", "total_flops"])
    named = {"n": "n_members", table["field"][0]: "value", **{title: name for name, title in titles.items()}, "seeds": "n_seeds"}
    titles = {
        "on_l0_front": "front by L0",
        "on_bits_front": "front by bits",
        "on_l0_front_by_ce": "CE by L0",
        "on_bits_front_by_ce": "CE by bits",
    }
    fronts = {title: pl.when(pl.col(column) == 1).then(pl.lit("*")) for column, title in titles.items() if table[column].count()}
    return table.select("method", **{marked(title, column, table): pl.col(column) for title, column in named.items()}, **fronts)


def _front(table: pl.DataFrame, spent: str, gained: str) -> pl.Series:
    """Return 1 for rows that no other row of their layer dominates, 0 for others, null if one of the two columns is null."""
    rows = table.select("layer", spent, gained).rows()
    known = [row for row in rows if None not in row]

    def is_dominated(layer: int, cost: float, gain: float) -> bool:
        others = ((c, g) for other, c, g in known if other == layer)
        return any(c <= cost and g >= gain and (c < cost or g > gain) for c, g in others)

    return pl.Series([None if None in row else int(not is_dominated(*row)) for row in rows], dtype=pl.Int64)


register(
    Table(
        name=PARETO,
        question=_QUESTION,
        columns=(
            Column("sweep", "str", "the experiment that has the sweep"),
            Column("field", "str", "the field of sae that is varied"),
            Column("value", "float", "its value"),
            Column("experiment", "str", "the experiment with that value"),
            Column("layer", "int", "layer of the language model, from 0"),
            Column("language_model", "str", "trained, or random: the untrained control"),
            Column("method", "str", ", ".join(methods())),
            Column("n_members", "int", "SAEs in the whole ensemble; for expanded SAEs the n whose width they match; else 1"),
            Column("n_features", "int", "features of the whole dictionary"),
            Column("n_seeds", "int", "ensemble seeds that the means are over"),
            Column("seeds", "str", "these seeds, comma-separated"),
            Column("l0", "float", "features that fire per token, mean over seeds"),
            Column("l0_by_seed", "str", "the points, comma-separated, in the order of seeds"),
            Column("description_length_bits", "float", "bits per token that send the code, mean over seeds; null if not measured"),
            Column("description_length_bits_by_seed", "str", "the points"),
            Column("explained_variance", "float", "on held-out tokens, mean over seeds"),
            Column("explained_variance_by_seed", "str", "the points"),
            Column("ce_loss_recovered", "float", "share of the next-token loss recovered, mean over seeds; null if not measured"),
            Column("ce_loss_recovered_by_seed", "str", "the points"),
            Column(SHARE, "float", "share of the test rows' variance in 0.1 % of them; above 0.1, explained_variance describes these"),
            Column("total_flops", "float", "dense-equivalent operations of training and residuals, mean over seeds; null without cost"),
            Column("on_l0_front", "int", "1: no other row of the layer has at most its l0 and more EV, or less and as much"),
            Column("on_bits_front", "int", "the same for description_length_bits"),
            Column("on_l0_front_by_ce", "int", "as on_l0_front, for ce_loss_recovered in place of explained_variance"),
            Column("on_bits_front_by_ce", "int", "the same for description_length_bits"),
            Column("sae_data_versions", "str", "data versions of the SAEs in member order, comma-separated; seeds are separated by ;"),
        ),
        version=PARETO_VERSION,
        dimensions="none",
        order=210,
        over_experiments=True,
    )
)
