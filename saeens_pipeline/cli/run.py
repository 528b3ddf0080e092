"""`saeens plan`, `run`, `experiments` and `status`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import (
    ExperimentName,
    Format,
    FormatOption,
    LayerOption,
    SetOption,
    err,
    grid,
    notify,
    out,
    print_data,
    print_line,
    print_rows,
)
from saeens_pipeline.errors import ConfigurationError, SaeensError, counted
from saeens_pipeline.storage.names import numeric_order
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

if TYPE_CHECKING:
    import polars as pl
    from rich.table import Table

    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.assets.forecast import Line
    from saeens_pipeline.assets.staleness import Status
    from saeens_pipeline.orchestration.runs import Outcome

_NOTE_CHARACTERS = 60  # longer notes that several lines share are printed once, below the table
_STATE_COLOURS = {"fresh": "green", "stale": "yellow", "queued": "blue", "running": "blue"}  # others: red


@app.command()
def plan(
    experiment: ExperimentName,
    layer: LayerOption = None,
    settings: SetOption = None,
    *,
    tflops: Annotated[
        float | None, typer.Option(min=1e-6, help="Estimate hours: 10^12 FLOPs that a device sustains in a second, such as 300 of an H100.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="Number of devices, each with a layer and seed at a time. Needs --tflops.")] = 1,
    price: Annotated[float | None, typer.Option(min=0, help="Price of a device for an hour. Needs --tflops.")] = None,
    format: FormatOption = "table",
) -> None:
    """Print the disk, memory and computation that an experiment will need, before it runs, and with --tflops the time.

    For a sweep, each experiment's needs are printed as if it ran alone; artefacts that several share are computed once.
    """
    import polars as pl

    from saeens_pipeline.assets.compute import Compute
    from saeens_pipeline.assets.forecast import Machine, as_frame, forecast, readable
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.layers import recorded_layers

    if tflops is None and (devices > 1 or price is not None):
        raise ConfigurationError("--devices and --price estimate hours and money, and need --tflops: what one device sustains")
    machine = Machine(tflops, devices, price) if tflops else None
    catalogue, store, compute = Catalogue.load_with(experiment, settings or []), Store(data_root()), Compute.from_environment()
    plans: dict[str, list[Line]] = {}
    for each in catalogue.named(experiment):
        source = catalogue.sources[each.source]
        layers = sorted(set(layer)) if layer else recorded_layers(source).layers
        plans[each.name] = forecast(source, each, catalogue.ops(each), layers=layers, store=store, compute=compute, machine=machine)
    frames = [as_frame(lines).insert_column(0, pl.Series("experiment", [name] * len(lines))) for name, lines in plans.items()]
    if print_data(pl.concat(frames), format):
        return
    for name, lines in plans.items():
        table = grid("", "", "", "", show_header=False, title=f"{name}, from scratch")
        said_below = [note for note, n in Counter(line.note for line in lines).items() if n > 1 and len(note) > _NOTE_CHARACTERS]
        for before, line in zip([None, *lines], lines, strict=False):
            section = "" if before and before.section == line.section else line.section
            note = "see below" if line.note in said_below else line.note
            table.add_row(section, Text(line.item), Text(readable(line), justify="right"), Text(note))
        if said_below:
            table.caption, table.caption_justify = Text("\n".join(said_below)), "left"
        out.print(table)


@app.command()
def run(
    experiment: ExperimentName,
    layer: LayerOption = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this ensemble seed; may be given several times.")] = None,
    select: Annotated[list[str] | None, typer.Option(help="Only this asset, such as bagging/member_1, and its inputs.")] = None,
    *,
    settings: SetOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compute fresh artefacts anew: all, or with --select those alone, without their inputs.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be computed and why, and compute and write nothing.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print everything that Dagster tells.")] = False,
    format: FormatOption = "table",
) -> None:
    """Materialise missing and stale artefacts, and print a summary. Of a sweep or followed set, run all experiments, one after another.

    With --format json or csv, progress goes to standard error.
    """
    from saeens_pipeline.cli.summary import outcome_for_programs, print_outcome
    from saeens_pipeline.orchestration import runs
    from saeens_pipeline.orchestration.catalogue import Catalogue

    console = out if format == "table" else err
    try:
        if not dry_run:
            _ask_hub(Catalogue.load(), experiment)
        catalogue = Catalogue.load_with(experiment, settings or [])
        names = [each.name for each in catalogue.named(experiment)]
        selection = runs.Selection(layer or [], seed or [], select or [], force)
        if dry_run:
            _print_dry_run([status for name in names for status in runs.dry_run(catalogue, name, selection, console=console)], format)
            return
        outcomes: list[Outcome] = []
        for name in names:
            outcomes.append(runs.run_experiment(catalogue, name, selection, verbose=verbose, console=console))
            if format == "table":
                print_outcome(outcomes[-1], out)
        if format == "json":
            print_line(json.dumps([outcome_for_programs(each) for each in outcomes], indent=1))
        elif format == "csv":
            print_data(_status_frame([status for each in outcomes for status in each.statuses]), format)
        else:
            for sweep in catalogue.sweeps_of(experiment):
                print_line(f"\n`saeens pareto {sweep}` compares the values of the sweep; with --picture FILE it draws them")
    except KeyboardInterrupt as stopped:
        notify("stopped", str(stopped) or "finished artefacts are kept, and the next run resumes from there")
        raise typer.Exit(130) from None


def _ask_hub(found: Experiments, experiment: str) -> None:
    """Ask the hub for the revisions that an experiment follows, if it follows some. Without an answer those that are known stay."""
    from saeens_pipeline.language_models.followed_models import ask_hub, hub_model

    following = found.following.get(experiment)
    if following and (asked := hub_model(found.followed[following.settings.source].settings)):
        try:
            ask_hub(asked)
        except SaeensError as error:
            notify("note", f"{error}: revisions that are known are used")


def _print_dry_run(statuses: Sequence[Status], format: Format) -> None:
    """Print the artefacts that a run would compute, in the order of its stages."""
    distinct = list({each.where: each for each in statuses}.values())  # experiments of a sweep share their source
    if print_data(_status_frame(distinct), format):
        return
    if not distinct:
        print_line("nothing to do: all selected artefacts are fresh")
        return
    out.print(_status_table(distinct))
    n_stages, counts = len({each.partition for each in distinct}), Counter(each.state for each in distinct)
    print_line(
        f"\n{counted(len(distinct), 'artefact')} would be computed ({', '.join(f'{n} {state}' for state, n in counts.items())}), in "
        f"{counted(n_stages, 'run')}; one whose inputs turn out as before is a cache hit. Nothing was computed or written"
    )


def _status_frame(statuses: Iterable[Status]) -> pl.DataFrame:
    import polars as pl

    schema = {"asset": pl.String, "layer": pl.Int64, "seed": pl.Int64, "state": pl.String, "why": pl.String}
    return pl.DataFrame(
        [(str(each.declaration.address), *each.partition, each.state, each.reason) for each in statuses], schema=schema, orient="row"
    )


def _status_table(statuses: Iterable[Status]) -> Table:
    table = grid("asset", "layer", "seed", "state", "why")
    for each in statuses:
        partition = ("" if value is None else str(value) for value in each.partition)
        table.add_row(str(each.declaration.address), *partition, Text(each.state, _STATE_COLOURS.get(each.state, "red")), Text(each.reason))
    return table


@app.command()
def experiments(format: FormatOption = "table") -> None:
    """List the experiments, with their source, SAEs and partitions."""
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.assets.saes import shape_of

    found = Experiments.load()
    rows: list[dict[str, Any]] = []
    for name, settings in sorted(found.experiments.items(), key=lambda each: numeric_order(each[0])):
        source = found.sources[settings.source]
        shapes = [shape_of(each).removeprefix("architecture ") for each in settings.saes] or ["published"]
        rows.append(
            {
                "experiment": name,
                "source": settings.source,
                "language model": str(source.language_model)
                if source.revision == "main"
                else f"{source.language_model}, {source.revision}",
                "layers": source.layers,
                "SAE": "; ".join(dict.fromkeys(shapes)),
                "members": settings.ensemble.members,
                "seeds": settings.ensemble.seeds,
            }
        )
    print_rows(rows, ("experiment", "source", "language model", "layers", "SAE", "members", "seeds"), format)
    for name, followed in sorted(found.followed.items()):
        for sentence in followed.waiting if format == "table" else ():
            print_line(f"source {name}: {sentence}")
    for message in found.broken.values():
        notify("left out", message)
    if found.broken:
        raise typer.Exit(2)


@app.command()
def status(experiment: ExperimentName, format: FormatOption = "table") -> None:
    """Print whether each artefact is fresh, stale, damaged, missing, queued, running or failed, and why; of a sweep or set, of all."""
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.run_states import with_run_states
    from saeens_pipeline.orchestration.runs import experiment_status

    catalogue = Catalogue.load()
    of_each = [with_run_states(experiment_status(catalogue, each.name), catalogue.ops(each)) for each in catalogue.named(experiment)]
    statuses = list({each.where: each for statuses in of_each for each in statuses}.values())  # experiments of a sweep share their source
    if print_data(_status_frame(statuses), format):
        return
    out.print(_status_table(statuses))
    counts = Counter(each.state for each in statuses)
    print_line(f"\n{counted(len(statuses), 'artefact')}: {', '.join(f'{n} {state}' for state, n in counts.items())}")
