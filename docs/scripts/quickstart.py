"""The quickstart's numbers and plot in README.md: `python docs/scripts/quickstart.py [--collect]`.

Draws `docs/assets/explained_variance.svg` from `docs/assets/quickstart.csv`; with `--collect` writes that file first, from the tables below
`SAEENS_DATA`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import polars as pl
from matplotlib.figure import Figure

from saeens_pipeline.assets.tables.cost import with_totals
from saeens_pipeline.report.methods import in_order, method
from saeens_pipeline.storage.root import data_root
from saeens_pipeline.storage.tables import read_table

ASSETS = Path(__file__).parents[1] / "assets"
NUMBERS, PICTURE = ASSETS / "quickstart.csv", ASSETS / "explained_variance.svg"
KEYS = ["seed", "method", "n_members"]
COLUMNS = {
    "reconstruction": ["n_features", "explained_variance", "mse", "ce_loss_recovered", "description_length_bits", "l0", "tokens"],
    "coactivation": ["connectivity"],
    "stability": ["stability"],
    "cost": ["total_flops"],
}


def collect() -> pl.DataFrame:
    """Return the quickstart's numbers, a row for each seed, method and number of members."""
    numbers: pl.DataFrame | None = None
    for table, columns in COLUMNS.items():
        rows = with_totals(read_table(data_root(), "quickstart", table)).select(*KEYS, *columns)
        numbers = rows if numbers is None else numbers.join(rows, on=KEYS, how="left", maintain_order="left")
    assert numbers is not None
    return numbers.with_columns(pl.col(pl.Float64).round_sig_figs(6))


def draw(numbers: pl.DataFrame) -> Figure:
    """Return the plot of explained variance against the number of members, means over the seeds."""
    most = max(numbers["n_members"].to_list())
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in in_order(numbers["method"].unique()):
        means = numbers.filter(method=name).group_by("n_members").agg(pl.col("explained_variance").mean()).sort("n_members")
        style: dict[str, Any] = {"color": method(name).colour, "marker": method(name).marker}
        if len(means) == 1:  # one SAE: a level line, its marker where the ensembles are whole
            axes.axhline(means["explained_variance"].item(), color=method(name).colour, linestyle=":", linewidth=1)
            axes.plot(most, means["explained_variance"].item(), label=method(name).label, linestyle="", **style)
        else:
            axes.plot(means["n_members"], means["explained_variance"], label=method(name).label, **style)
    axes.set(xlabel="members of the ensemble", ylabel="explained variance, held-out tokens", xticks=range(1, most + 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


if __name__ == "__main__":
    if "--collect" in sys.argv:
        collect().write_csv(NUMBERS)
    mpl.rcParams["svg.hashsalt"] = "saeens"  # the same numbers give the same bytes
    draw(pl.read_csv(NUMBERS)).savefig(PICTURE, metadata={"Date": None}, facecolor="white")
