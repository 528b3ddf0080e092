"""`saeens plan`, `run`, `experiments` and `status`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from saeens_pipeline.cli.app import app
from saeens_pipeline.cli.output import ExperimentName, FormatOption, LayerOption, err, grid, notify, out, print_data, print_line
from saeens_pipeline.errors import SaeensError
from saeens_pipeline.storage.names import numeric_order
from saeens_pipeline.storage.recipes import Store
from saeens_pipeline.storage.root import data_root

if TYPE_CHECKING:
    from saeens_pipeline.assets.forecast import Line
    from saeens_pipeline.orchestration.catalogue import Catalogue

_NOTE_CHARACTERS = 60  # longer notes that several lines share are printed once, below the table
_STATE_COLOURS = {"fresh": "green", "stale": "yellow", "damaged": "red", "missing": "red", "running": "blue", "failed": "red"}


@app.command()
def plan(experiment: ExperimentName, layer: LayerOption = None, format: FormatOption = "table") -> None:
    """Print the disk, memory and computation that an experiment will need, before it runs.

    For a sweep, each experiment's needs are printed as if it ran alone; artefacts that several share are computed once.
    """
    import polars as pl

    from saeens_pipeline.assets.compute import Compute
    from saeens_pipeline.assets.forecast import as_frame, forecast, readable
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.layers import recorded_layers

    catalogue, store, compute = Catalogue.load(), Store(data_root()), Compute.from_environment()
    plans: dict[str, list[Line]] = {}
    for settings in catalogue.named(experiment):
        source = catalogue.sources[settings.source]
        layers = sorted(set(layer)) if layer else recorded_layers(source).layers
        plans[settings.name] = forecast(source, settings, catalogue.ops(settings), layers=layers, store=store, compute=compute)
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
) -> None:
    """Materialise missing and stale artefacts, and print a summary. Of a sweep or followed set, run all experiments, one after another."""
    from saeens_pipeline.cli.summary import print_outcome
    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.runs import run_experiment

    try:
        catalogue = _with_new_revisions(Catalogue.load(), experiment)
        for each in catalogue.named(experiment):
            outcome = run_experiment(catalogue, each.name, layers=layer or [], seeds=seed or [], select=select or [], console=out)
            print_outcome(outcome, out)
        for sweep in catalogue.sweeps_of(experiment):
            print_line(f"\n`saeens pareto {sweep}` compares the values of the sweep; with --picture FILE it draws them")
    except KeyboardInterrupt:
        err.print("stopped: finished artefacts are kept, and the next run resumes from there")
        raise typer.Exit(130) from None


def _with_new_revisions(catalogue: Catalogue, experiment: str) -> Catalogue:
    """Return the experiments, read again with the revisions that the hub has now if this one follows them; otherwise as they are."""
    from saeens_pipeline.language_models.followed_models import ask_hub, hub_model

    following = catalogue.following.get(experiment)
    if following is None or not (asked := hub_model(catalogue.followed[following.source].settings)):
        return catalogue
    try:
        ask_hub(asked)
    except SaeensError as error:
        notify("note", f"{error}: revisions that are known are used")
    return type(catalogue).load()


@app.command()
def experiments() -> None:
    """List the experiments, with their source, SAEs and partitions."""
    from saeens_pipeline.assets.catalogue import Experiments
    from saeens_pipeline.assets.saes import shape_of

    found = Experiments.load()
    table = grid("experiment", "source", "language model", "layers", "SAE", "members", "seeds")
    for name, settings in sorted(found.experiments.items(), key=lambda each: numeric_order(each[0])):
        source = found.sources[settings.source]
        shapes = [shape_of(each).removeprefix("architecture ") for each in settings.saes] or ["published"]
        sae = "; ".join(dict.fromkeys(shapes))
        layers, seeds = (", ".join(map(str, values)) for values in (source.layers, settings.ensemble.seeds))
        model = f"{source.language_model}, {source.revision}" if source.revision != "main" else str(source.language_model)
        table.add_row(name, settings.source, model, layers, sae, str(settings.ensemble.members), seeds)
    out.print(table)
    for name, followed in sorted(found.followed.items()):
        for sentence in followed.waiting:
            print_line(f"source {name}: {sentence}")
    for message in found.broken.values():
        notify("left out", message)
    if found.broken:
        raise typer.Exit(2)


@app.command()
def status(experiment: ExperimentName, format: FormatOption = "table") -> None:
    """Print the state of each artefact, fresh, stale, damaged, missing, running or failed, and why; of a sweep or followed set, of all."""
    import polars as pl

    from saeens_pipeline.orchestration.catalogue import Catalogue
    from saeens_pipeline.orchestration.run_states import with_run_states
    from saeens_pipeline.orchestration.runs import experiment_status

    catalogue = Catalogue.load()
    of_each = [with_run_states(experiment_status(catalogue, each.name), catalogue.ops(each)) for each in catalogue.named(experiment)]
    by_place = {(each.declaration.address, each.partition): each for statuses in of_each for each in statuses}
    statuses = list(by_place.values())  # experiments of a sweep share their source
    rows = [(str(each.declaration.address), *each.partition, each.state, each.reason) for each in statuses]
    schema = {"asset": pl.String, "layer": pl.Int64, "seed": pl.Int64, "state": pl.String, "why": pl.String}
    if print_data(pl.DataFrame(rows, schema=schema, orient="row"), format):
        return
    table = grid(*schema)
    for asset, layer, seed, state, why in rows:
        partition = ("" if value is None else str(value) for value in (layer, seed))
        table.add_row(asset, *partition, Text(state, _STATE_COLOURS[state]), Text(why))
    out.print(table)
    counts = Counter(each.state for each in statuses)
    print_line(f"\n{len(statuses)} artefacts: {', '.join(f'{n} {state}' for state, n in counts.items())}")
