"""`saeens plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import ExperimentName, FormatOption, LayerOption, TableFormat, out, print_data

if TYPE_CHECKING:
    from rich.table import Table

    from saeens_pipeline.assets.forecast import Line

_NOTE_CHARACTERS = 60  # longer notes that several lines share are printed once, below the table


@app.command()
def plan(experiment: ExperimentName, layer: LayerOption = None, format: FormatOption = TableFormat.table) -> None:
    """Print the disk, memory and computation that an experiment will need, before it runs. For a sweep, each experiment's needs are
    printed as if it ran alone; artefacts that several share are made once.
    """
    import polars as pl

    from saeens_pipeline.assets.compute import Compute
    from saeens_pipeline.assets.forecast import as_frame, forecast
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.layers import recorded_layers
    from saeens_pipeline.storage.recipes import Store
    from saeens_pipeline.storage.root import data_root

    catalogue, store, compute = load_catalogue(), Store(data_root()), Compute.from_environment()
    plans: dict[str, list[Line]] = {}
    for settings in catalogue.named(experiment):
        source = catalogue.sources[settings.source]
        layers = sorted(set(layer)) if layer else recorded_layers(source).layers
        plans[settings.name] = forecast(source, settings, catalogue.ops(settings), layers=layers, store=store, compute=compute)
    if format != TableFormat.table:
        frames = [as_frame(lines).insert_column(0, pl.Series("experiment", [name] * len(lines))) for name, lines in plans.items()]
        print_data(pl.concat(frames), format)
        return
    for name, lines in plans.items():
        out.print(_forecast_table(name, lines))


def _forecast_table(name: str, lines: Sequence[Line]) -> Table:
    from rich.table import Table
    from rich.text import Text

    from saeens_pipeline.assets.forecast import readable

    table = Table("", "", "", "", box=None, pad_edge=False, show_header=False, title=f"{name}, from scratch", title_justify="left")
    notes = Counter(line.note for line in lines)
    said_below = [note for note, n in notes.items() if n > 1 and len(note) > _NOTE_CHARACTERS]
    for before, line in zip([None, *lines], lines, strict=False):
        section = "" if before and before.section == line.section else line.section
        note = "see below" if line.note in said_below else line.note
        table.add_row(section, Text(line.item), Text(readable(line), justify="right"), Text(note))
    if said_below:
        table.caption, table.caption_justify = Text("\n".join(said_below)), "left"
    return table
