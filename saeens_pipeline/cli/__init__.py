"""The `saeens` command. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from saeens_pipeline.errors import ConfigurationError, SaeensError

if TYPE_CHECKING:
    import polars as pl

    from saeens_pipeline.assets.forecast import Line

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse-autoencoder ensembles as a Dagster asset pipeline.",
)
reference_model = typer.Typer(no_args_is_help=True, help="The embedded language model.")
app.add_typer(reference_model, name="reference-model")
layers = typer.Typer(no_args_is_help=True, help="The layers of a source.")
app.add_typer(layers, name="layers")

_PIPE_WIDTH = 1000  # columns where the output is no terminal: tables are not squeezed into a file
_SHOWN_ROWS = 1000  # of a table in the terminal
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)

Experiment = Annotated[str, typer.Argument(help="Name of an experiment; `saeens experiments` lists them.")]


class TableFormat(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


def _print_data(frame: pl.DataFrame, format: TableFormat) -> None:
    """For programs: the table and nothing else."""
    sys.stdout.write(frame.write_csv() if format == TableFormat.csv else frame.write_json() + "\n")


class Sizes(StrEnum):
    full = "full"
    all = "all"


def complain(label: str, message: str) -> None:
    """One message on standard error; what it quotes is shown as it is."""
    err.print(Text.assemble((f"{label}: ", "red"), message), soft_wrap=True)


def _note_outdated(experiments: Iterable[str]) -> None:
    """Say of which experiments figures are outdated, and of which that cannot be told."""
    from saeens_pipeline.orchestration.runs import experiment_status

    for name in experiments:
        try:
            tables = [each for each in experiment_status(name) if each.declaration.address.kind == "eval"]
        except SaeensError as error:
            complain("note", f"whether figures of {name} are outdated cannot be told: {error}")
            continue
        if any(each.state in ("stale", "damaged") for each in tables):
            complain("note", f"figures of {name} are outdated: `saeens status {name}` says why")


@app.callback()
def _options(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    """--debug is read in `main`, since it decides how errors of any command are shown."""


@app.command()
def run(
    experiment: Experiment,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be given several times.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Only this ensemble seed; may be given several times.")] = None,
    select: Annotated[list[str] | None, typer.Option(help="Only this asset, such as bagging/member_1, and what it needs.")] = None,
) -> None:
    """Materialise what is missing or stale, and print a summary. Of a sweep, all its experiments, one after another."""
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.runs import run_experiment

    try:
        catalogue = load_catalogue()
        for each in catalogue.named(experiment):
            run_experiment(each.name, layers=layer or [], seeds=seed or [], select=select or [], console=out)
        if experiment in catalogue.sweeps:
            out.print(
                f"\n`saeens pareto {experiment}` compares the values of the sweep; with --picture FILE it draws them", highlight=False
            )
    except KeyboardInterrupt:
        err.print("stopped: what was finished is kept, and the next run goes on from there")
        raise typer.Exit(130) from None


@app.command()
def experiments() -> None:
    """List the experiments, with their source, SAEs and partitions."""
    from rich.table import Table

    from saeens_pipeline.orchestration.catalogue import load_catalogue

    catalogue = load_catalogue()
    table = Table("experiment", "source", "language model", "layers", "SAE", "members", "seeds", box=None, pad_edge=False)
    for name, settings in sorted(catalogue.experiments.items()):
        source = catalogue.sources[settings.source]
        saes = [", ".join(str(value) if key == "architecture" else f"{key} {value}" for key, value in sae.items()) for sae in settings.saes]
        sae = "; ".join(dict.fromkeys(saes))
        layers, seeds = (", ".join(map(str, values)) for values in (source.layers, settings.ensemble.seeds))
        table.add_row(name, settings.source, source.language_model, layers, sae, str(settings.ensemble.members), seeds)
    out.print(table)
    for message in catalogue.broken.values():
        complain("left out", message)
    if catalogue.broken:
        raise typer.Exit(2)


@app.command()
def plan(
    experiment: Experiment,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be given several times.")] = None,
    format: Annotated[TableFormat, typer.Option("--format", help="csv and json print the table and nothing else.")] = TableFormat.table,
) -> None:
    """Say what an experiment will take of disk, memory, computation and time, before anything is spent. Of a sweep, what each of its
    experiments would take by itself; what they have in common is made once.
    """
    import polars as pl

    from saeens_pipeline.assets.forecast import as_frame, forecast
    from saeens_pipeline.cli.summary import forecast_table
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.layers import recorded_layers
    from saeens_pipeline.orchestration.resources import ComputeResource, StoreResource

    catalogue = load_catalogue()
    store, compute = StoreResource().store, ComputeResource.from_environment()
    plans: dict[str, list[Line]] = {}
    for settings in catalogue.named(experiment):
        source = catalogue.sources[settings.source]
        layers = sorted(set(layer)) if layer else recorded_layers(source).layers
        plans[settings.name] = forecast(source, settings, catalogue.ops(settings), layers=layers, store=store, compute=compute)
    if format != TableFormat.table:
        frames = [as_frame(lines).insert_column(0, pl.Series("experiment", [name] * len(lines))) for name, lines in plans.items()]
        _print_data(pl.concat(frames), format)
        return
    for name, lines in plans.items():
        out.print(forecast_table(name, lines))


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="What the source and the experiment will be called.")],
    model: Annotated[str, typer.Option(help="builtin/reference, a folder in transformers' format, or a model's name on the hub.")],
    layers: Annotated[list[str], typer.Option(help="Layers of the model, from 0, such as 2,4,6; may be given several times.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default where experiments are read from. Nothing is overwritten.")
    ] = None,
) -> None:
    """Write an experiment file for a language model, with every field explained."""
    from saeens_pipeline.cli.new_experiment import new_experiment, parse_layers

    written = new_experiment(name, model, parse_layers(layers), output)
    out.print(f"written to {written.path}", highlight=False, soft_wrap=True)
    if written.is_read:
        out.print(f"change in it what you like; then `saeens run {name}`, or reload the code location in the UI", highlight=False)
    else:
        complain("note", f"no experiments are read from there: set SAEENS_EXPERIMENTS={written.path.parent}")


@app.command()
def status(
    experiment: Experiment,
    format: Annotated[TableFormat, typer.Option(help="csv and json print the table and nothing else.")] = TableFormat.table,
) -> None:
    """Print for each artefact whether it is fresh, stale (and why), damaged, missing, running or failed."""
    from collections import Counter

    from saeens_pipeline.cli.summary import status_frame, status_table
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.run_states import with_run_states
    from saeens_pipeline.orchestration.runs import experiment_status

    statuses = experiment_status(experiment)
    catalogue = load_catalogue()
    statuses = with_run_states(statuses, catalogue.ops(catalogue.experiment(experiment)))
    if format != TableFormat.table:
        _print_data(status_frame(statuses), format)
        return
    out.print(status_table(statuses))
    counts = Counter(each.state for each in statuses)
    out.print(f"\n{len(statuses)} artefacts: {', '.join(f'{n} {state}' for state, n in counts.items())}", highlight=False)


@app.command()
def lineage(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="TABLE:COLUMN=VALUE,...|ASSET:layer=L,seed=S|DATA_VERSION",
            help="A row, such as reconstruction:layer=1,seed=42,method=bagging,n_members=3; an asset, such as "
            "quickstart/bagging/member_1:layer=1,seed=42; or a data version, or how it begins.",
        ),
    ],
) -> None:
    """Print what a number or an artefact was made from, down to corpus and language model, and by which runs."""
    from saeens_pipeline.assets.lineage import lineage as trace
    from saeens_pipeline.cli.summary import lineage_tree
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.resources import StoreResource

    declarations = [output for op in load_catalogue().all_ops() for output in op.outputs]
    found = trace(StoreResource().store, declarations, subject)
    out.print(lineage_tree(found), soft_wrap=not out.is_terminal)
    problems = list(found.problems())
    if problems:
        complain("note", "not all of it is on disk any more as it was used:\n" + "\n".join(problems))


@app.command()
def table(
    experiment: Experiment,
    name: Annotated[
        str,
        typer.Argument(
            metavar="TABLE",
            help="reconstruction, members, coactivation, stability, marginal_gain, cost, features, contexts, autointerp "
            "or training_curves.",
        ),
    ],
    format: Annotated[TableFormat, typer.Option(help="csv and json print the table and nothing else.")] = TableFormat.table,
) -> None:
    """Print an evaluation table: all layers that there are, and the experiment's seeds."""
    import polars as pl

    from saeens_pipeline.assets.tables.autointerp_outcome import AUTOINTERP, outcome
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.resources import StoreResource
    from saeens_pipeline.orchestration.runs import experiment_status
    from saeens_pipeline.storage.root import data_root
    from saeens_pipeline.storage.tables import read_table

    settings = load_catalogue().experiment(experiment)
    frame = read_table(data_root(), experiment, name).filter(pl.col("seed").is_in(settings.ensemble.seeds))
    if any(s.state != "fresh" for s in experiment_status(experiment) if s.declaration.address.key == [experiment, "eval", name]):
        complain("note", f"parts of this table are missing, stale or damaged: `saeens status {experiment}` says why")
    if format != TableFormat.table:
        _print_data(frame, format)
    else:
        from saeens_pipeline.cli.summary import rich_table

        out.print(rich_table(frame.drop("experiment", "sae_data_versions").head(_SHOWN_ROWS)))
        if len(frame) > _SHOWN_ROWS:
            complain("note", f"these are the first {_SHOWN_ROWS:,} of {len(frame):,} rows: --format csv or json prints all")
    if name == AUTOINTERP and (said := outcome(StoreResource().store, experiment, settings.ensemble.seeds)):
        complain("note", said)


@app.command()
def leaderboard(
    sort: Annotated[str, typer.Option(help="Column to rank by, within each source and layer.")] = "explained_variance",
    n: Annotated[Sizes, typer.Option(help="Ensembles with all their members, or with the first n for all n.")] = Sizes.full,
    format: Annotated[TableFormat, typer.Option(help="csv and json print the table and nothing else.")] = TableFormat.table,
) -> None:
    """Rank every method of every experiment and layer by what was evaluated so far."""
    from saeens_pipeline.assets.tables.leaderboard import for_reading, standings
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.resources import StoreResource

    catalogue = load_catalogue()
    (declaration,) = catalogue.leaderboard().outputs
    table = standings(StoreResource().store, declaration, sort, n.value)
    if table.is_empty():
        complain("note", "nothing was evaluated yet: `saeens run EXPERIMENT` does, `saeens experiments` lists them")
    _note_outdated(table["experiment"].unique(maintain_order=True))
    if format != TableFormat.table:
        _print_data(table, format)
        return
    from saeens_pipeline.cli.summary import rich_table

    for (source, layer), ranked in table.partition_by("source", "layer", as_dict=True, maintain_order=True).items():
        shown = rich_table(for_reading(ranked, sort))
        shown.title, shown.title_justify = Text(f"{source}, layer {layer}"), "left"
        out.print(shown, "")


@app.command()
def report(
    experiment: Annotated[
        str | None, typer.Argument(help="Name of an experiment, as `saeens experiments` lists it; left out: the leaderboard's page alone.")
    ] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Only this layer; may be given several times.")] = None,
) -> None:
    """Write the report of an experiment, pages that open from disk, and the page over all experiments."""
    from saeens_pipeline.orchestration.reports import write_reports

    if layer and experiment is None:
        raise ConfigurationError("--layer: name the experiment whose report is to be written")
    for page in write_reports(experiment, layer or []):
        out.print(str(page), highlight=False, markup=False, soft_wrap=True)


@app.command()
def pareto(
    sweep: Annotated[str, typer.Argument(help="Name of an experiment with a sweep.")],
    picture: Annotated[Path | None, typer.Option(help="File to write the plot to, a PNG.")] = None,
    format: Annotated[TableFormat, typer.Option(help="csv and json print the table and nothing else.")] = TableFormat.table,
) -> None:
    """Compare the experiments of a sweep: explained variance against L0 and description length, for each method."""
    from saeens_pipeline.assets.tables.pareto import Sweep, for_reading, notes, pareto_rows
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.resources import StoreResource
    from saeens_pipeline.report.pareto_picture import draw

    catalogue = load_catalogue()
    (declaration,) = catalogue.pareto(sweep).outputs
    about = Sweep.of(catalogue.sweep(sweep))
    table = pareto_rows(StoreResource().store, declaration, about)
    for note in notes(table, about):
        complain("note", note)
    _note_outdated(table["experiment"].unique(maintain_order=True))
    if picture:
        picture.write_bytes(draw(table, about))
    if format != TableFormat.table:
        _print_data(table, format)
        return
    from saeens_pipeline.cli.summary import rich_table

    for (layer,), of_layer in table.partition_by("layer", as_dict=True, maintain_order=True).items():
        shown = rich_table(for_reading(of_layer))
        shown.title, shown.title_justify = Text(f"{sweep}, layer {layer}"), "left"
        out.print(shown, "")
    if picture:
        out.print(f"written to {picture}", highlight=False, soft_wrap=True)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on the loopback interface.", min=1, max=65535)] = 3000,
) -> None:
    """Open the Dagster UI on this machine, with the runs that were made from here."""
    import os
    import socket

    from dagster import DagsterInstance

    from saeens_pipeline.errors import SaeensError
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.instance import declare_layers, end_dead_runs, prepare_home
    from saeens_pipeline.settings.files import FOLDERS_VARIABLE, own_folders
    from saeens_pipeline.storage.root import data_root

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SaeensError(f"port {port} on 127.0.0.1 cannot be used ({error.strerror}): choose another with --port") from error
    home = prepare_home()
    with DagsterInstance.get() as instance:
        end_dead_runs(instance)
        for source in load_catalogue().sources.values():
            declare_layers(instance, source.name, source.layers)
    out.print(f"The UI answers in about ten seconds at [link]http://127.0.0.1:{port}[/link]; Ctrl-C ends it.")
    # In DAGSTER_HOME: `dagster dev` would warn of a dagster.yaml in the current folder that is not the one it uses.
    os.environ["SAEENS_DATA"] = str(data_root())
    if folders := own_folders():
        os.environ[FOLDERS_VARIABLE] = os.pathsep.join(map(str, folders))
    os.chdir(home)
    arguments = ["dev", "--workspace", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)]
    quiet = ["-W", "ignore:Function `dev_command` is superseded"]  # by a tool that an installed package cannot count on
    os.execv(sys.executable, [sys.executable, *quiet, "-m", "dagster", *arguments])


@app.command()
def doctor(
    verify: Annotated[bool, typer.Option("--verify", help="Read every artefact and compare its hashes.")] = False,
) -> None:
    """Say what this installation is, and whether anything is wrong with it."""
    from saeens_pipeline.cli.diagnosis import diagnose

    findings = list(diagnose(verify=verify))
    for finding in findings:
        mark = ("ok   ", "green") if finding.ok else ("bad  ", "red")
        out.print(Text.assemble(mark, f"{finding.subject:<22} {finding.detail}"), soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


@app.command()
def gc(
    delete: Annotated[bool, typer.Option("--delete", help="Remove what is listed; without it nothing is touched.")] = False,
    forget_folder: Annotated[
        list[Path] | None,
        typer.Option(help="A folder of SAEENS_EXPERIMENTS that is given up; until it is named here, what belongs to it is not removed."),
    ] = None,
) -> None:
    """List what lies below the data root and belongs to no experiment or source any more."""
    from rich.filesize import decimal
    from rich.table import Table

    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.garbage import by_folder, declared, find_garbage, remove_garbage
    from saeens_pipeline.orchestration.remembered_folders import explain_unread, forget_folders, remember_own_folders, unread_folders
    from saeens_pipeline.storage.root import data_root

    catalogue, root = load_catalogue(), data_root().resolve()
    if delete and root.exists():
        remember_own_folders(root)
    forget_folders(root, forget_folder or [])
    inventory = find_garbage(root, declared(catalogue))
    garbage, freed = by_folder(inventory.garbage, root), decimal(inventory.freed_bytes)
    if delete:
        remove_garbage(catalogue, inventory, root)
    table = Table(box=None, pad_edge=False, show_header=False)
    for findings, mark in ((garbage, "removed" if delete else "unused"), (inventory.unknown, "unknown, kept")):
        for path, n_bytes, reason in findings:
            table.add_row(mark, Text(decimal(n_bytes), justify="right"), Text(str(path.relative_to(root)), overflow="fold"), Text(reason))
    if table.rows:
        out.print(table)
    if not garbage:
        out.print(f"nothing below {root} is unused", highlight=False, soft_wrap=True)
    elif delete:
        out.print(f"{freed} freed", highlight=False)
    else:
        out.print(f"{freed} would be freed by `saeens gc --delete`; nothing was touched", highlight=False)
    for message in catalogue.broken.values():
        complain("note", f"{message}\nwhat belongs to this file is listed as if nothing referred to it")
    if unread := unread_folders(root):
        complain("note", f"{explain_unread(unread)}\nwhat belongs to their files is listed as if nothing referred to it")


@layers.callback()
def _layers() -> None:
    """A group, also with one command."""


@layers.command("add")
def add_layers(
    source: Annotated[str, typer.Argument(help="Name of a source, as its experiment file gives it.")],
    layer: Annotated[list[int], typer.Argument(min=0, metavar="L...", help="Layers of the language model, from 0.")],
) -> None:
    """Add layers to a source while it runs: all its experiments get them."""
    from saeens_pipeline.orchestration.catalogue import load_catalogue
    from saeens_pipeline.orchestration.layers import add_layers

    added = add_layers(load_catalogue(), source, layer)
    for done, which in (("added", added.new), ("there before:", added.known)):
        if which:
            out.print(f"{source}: {done} {'layers' if len(which) > 1 else 'layer'} {', '.join(map(str, which))}", highlight=False)
    for name in added.automated:
        out.print(f"{name}: makes what is missing by itself while `saeens ui` is running", highlight=False)
    for name in added.on_request:
        out.print(f"{name}: `saeens run {name}` makes what is missing", highlight=False)
    if not added.automated and not added.on_request:
        out.print(f"no experiment uses {source} yet", highlight=False)


@reference_model.command("train")
def train_reference_model(
    output: Annotated[Path, typer.Option(help="Folder to write; the shipped model is not touched unless it is named.")] = Path(
        "reference_model"
    ),
    tokens: Annotated[int | None, typer.Option(min=2048, help="Training tokens; by default those of the shipped model.")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="A third faster; needs a C++ compiler.")] = False,
) -> None:
    """Train the embedded language model again from the installed packages: about an hour and a half on two cores."""
    from dataclasses import replace

    from saeens_pipeline.language_models import reference_model as reference
    from saeens_pipeline.orchestration.runs import reporter_for

    recipe = reference.ReferenceModelRecipe()
    recipe = replace(recipe, train_tokens=tokens) if tokens else recipe
    with reporter_for(out).task("reference model", recipe.train_tokens, "tokens") as advance:
        done = 0

        def report(training: reference.TrainingStatus) -> None:
            nonlocal done
            advance(training.tokens - done)
            done = training.tokens
            if training.bits_per_byte:
                out.print(
                    f"step {training.step}: loss {training.loss:.3f} nats per token, held out {training.bits_per_byte:.3f} bits per byte"
                )

        reference.train_reference_model(output, recipe, compile_model=compile, report=report)
    out.print(f"written to {output.absolute()}")


def main() -> None:
    """The entry point: known errors become one message, others a traceback with --debug."""
    debug = "--debug" in sys.argv
    try:
        app()
    except SaeensError as error:
        if debug:
            raise
        complain("error", str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        complain("error", f"{type(error).__name__}: {error}\n`saeens --debug ...` shows the traceback")
        sys.exit(1)
