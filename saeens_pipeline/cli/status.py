"""`saeens status` and `saeens experiments`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import typer

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import ExperimentName, FormatOption, TableFormat, complain, out, print_data, print_line

if TYPE_CHECKING:
    from rich.table import Table

    from saeens_pipeline.assets.staleness import Status

_STATE_COLOURS = {"fresh": "green", "stale": "yellow", "damaged": "red", "missing": "red", "running": "blue", "failed": "red"}


@app.command()
def experiments() -> None:
    """List the experiments, with their source, SAEs and partitions."""
    from rich.table import Table

    from saeens_pipeline.assets.baselines import shape_of
    from saeens_pipeline.assets.catalogue import Experiments

    found = Experiments.load()
    table = Table("experiment", "source", "language model", "layers", "SAE", "members", "seeds", box=None, pad_edge=False)
    for name, settings in sorted(found.experiments.items()):
        source = found.sources[settings.source]
        sae = "; ".join(dict.fromkeys(shape_of(each).removeprefix("architecture ") for each in settings.saes))
        layers, seeds = (", ".join(map(str, values)) for values in (source.layers, settings.ensemble.seeds))
        table.add_row(name, settings.source, source.language_model, layers, sae, str(settings.ensemble.members), seeds)
    out.print(table)
    for message in found.broken.values():
        complain("left out", message)
    if found.broken:
        raise typer.Exit(2)


@app.command()
def status(experiment: ExperimentName, format: FormatOption = TableFormat.table) -> None:
    """Print the state of each artefact, fresh, stale, damaged, missing, running or failed, and the reason."""
    import polars as pl

    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.run_states import with_run_states
    from saeens_pipeline.orchestration.runs import experiment_status

    catalogue = load_catalogue()
    statuses = with_run_states(experiment_status(catalogue, experiment), catalogue.ops(catalogue.experiment(experiment)))
    if format != TableFormat.table:
        rows = [(str(s.declaration.address), *s.partition, s.state, s.reason) for s in statuses]
        schema = {"asset": pl.String, "layer": pl.Int64, "seed": pl.Int64, "state": pl.String, "why": pl.String}
        print_data(pl.DataFrame(rows, schema=schema, orient="row"), format)
        return
    out.print(_status_table(statuses))
    counts = Counter(each.state for each in statuses)
    print_line(f"\n{len(statuses)} artefacts: {', '.join(f'{n} {state}' for state, n in counts.items())}")


def _status_table(statuses: Sequence[Status]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table("asset", "layer", "seed", "state", "why", box=None, pad_edge=False)
    for each in statuses:
        layer, seed = ("" if value is None else str(value) for value in each.partition)
        table.add_row(str(each.declaration.address), layer, seed, Text(each.state, _STATE_COLOURS[each.state]), Text(each.reason))
    return table
