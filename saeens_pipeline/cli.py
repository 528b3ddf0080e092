"""The `saeens` command. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from saeens_pipeline.errors import SaeensError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse-autoencoder ensembles as a Dagster asset pipeline.",
)
reference_model = typer.Typer(no_args_is_help=True, help="The embedded language model.")
app.add_typer(reference_model, name="reference-model")

_PIPE_WIDTH = 160  # columns where the output is no terminal: tables are not squeezed into a file
out = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
err = Console(stderr=True, width=None if sys.stderr.isatty() else _PIPE_WIDTH)

Experiment = Annotated[str, typer.Argument(help="Name of an experiment; `saeens experiments` lists them.")]


class TableFormat(StrEnum):
    table = "table"
    csv = "csv"
    json = "json"


def complain(label: str, message: str) -> None:
    """One message on standard error; what it quotes is shown as it is."""
    err.print(Text.assemble((f"{label}: ", "red"), message), soft_wrap=True)


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
    """Materialise what is missing or stale, and print a summary."""
    from saeens_pipeline.runs import run_experiment

    try:
        run_experiment(experiment, layers=layer or [], seeds=seed or [], select=select or [], console=out)
    except KeyboardInterrupt:
        err.print("stopped: what was finished is kept, and the next run goes on from there")
        raise typer.Exit(130) from None


@app.command()
def experiments() -> None:
    """List the experiments, with their source, SAEs and partitions."""
    from rich.table import Table

    from saeens_pipeline.catalogue import load_catalogue

    catalogue = load_catalogue()
    table = Table("experiment", "source", "language model", "layers", "SAE", "members", "seeds", box=None, pad_edge=False)
    for name, settings in sorted(catalogue.experiments.items()):
        source = catalogue.sources[settings.source]
        sae = ", ".join(str(value) if key == "architecture" else f"{key} {value}" for key, value in settings.sae.items())
        layers, seeds = (", ".join(map(str, values)) for values in (source.layers, settings.ensemble.seeds))
        table.add_row(name, settings.source, source.language_model, layers, sae, str(settings.ensemble.members), seeds)
    out.print(table)
    for message in catalogue.broken.values():
        complain("left out", message)
    if catalogue.broken:
        raise typer.Exit(2)


@app.command()
def status(experiment: Experiment) -> None:
    """Print for each artefact whether it is fresh, stale or damaged (and why), or missing."""
    from rich.table import Table

    from saeens_pipeline.runs import experiment_status

    table = Table("asset", "layer", "seed", "state", "why", box=None, pad_edge=False)
    colours = {"fresh": "green", "stale": "yellow", "damaged": "red", "missing": "red"}
    for each in experiment_status(experiment):
        layer, seed = ("" if value is None else str(value) for value in each.partition)
        table.add_row(str(each.declaration.address), layer, seed, Text(each.state, colours[each.state]), Text(each.reason))
    out.print(table)


@app.command()
def table(
    experiment: Experiment,
    name: Annotated[
        str, typer.Argument(metavar="TABLE", help="reconstruction, members, coactivation, stability, cost or training_curves.")
    ],
    format: Annotated[TableFormat, typer.Option(help="csv and json print the table and nothing else.")] = TableFormat.table,
) -> None:
    """Print an evaluation table: all layers that there are, and the experiment's seeds."""
    import polars as pl

    from saeens_pipeline.catalogue import load_catalogue
    from saeens_pipeline.resources import data_root
    from saeens_pipeline.runs import experiment_status
    from saeens_pipeline.storage.tables import read_table

    settings = load_catalogue().experiment(experiment)
    frame = read_table(data_root(), experiment, name).filter(pl.col("seed").is_in(settings.ensemble.seeds))
    if any(s.state != "fresh" for s in experiment_status(experiment) if s.declaration.address.key == [experiment, "eval", name]):
        complain("note", f"parts of this table are missing, stale or damaged: `saeens status {experiment}` says why")
    match format:
        case TableFormat.csv:
            sys.stdout.write(frame.write_csv())
        case TableFormat.json:
            sys.stdout.write(frame.write_json() + "\n")
        case TableFormat.table:
            from saeens_pipeline.summary import rich_table

            out.print(rich_table(frame.drop("experiment", "sae_data_versions")))


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port on the loopback interface.", min=1, max=65535)] = 3000,
) -> None:
    """Open the Dagster UI on this machine, with the runs that were made from here."""
    import os
    import socket

    from dagster import DagsterInstance

    from saeens_pipeline.catalogue import load_catalogue
    from saeens_pipeline.errors import SaeensError
    from saeens_pipeline.instance import prepare_home, register_layers
    from saeens_pipeline.resources import data_root

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise SaeensError(f"port {port} on 127.0.0.1 cannot be used ({error.strerror}): choose another with --port") from error
    home = prepare_home()
    with DagsterInstance.get() as instance:
        for source in load_catalogue().sources.values():
            register_layers(instance, source.name, source.layers)
    out.print(f"The UI answers in about ten seconds at [link]http://127.0.0.1:{port}[/link]; Ctrl-C ends it.")
    # In DAGSTER_HOME: `dagster dev` would warn of a dagster.yaml in the current folder that is not the one it uses.
    os.environ["SAEENS_DATA"] = str(data_root())
    os.chdir(home)
    arguments = ["dev", "--workspace", "workspace.yaml", "--host", "127.0.0.1", "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", "dagster", *arguments])


@app.command()
def doctor(
    verify: Annotated[bool, typer.Option("--verify", help="Read every artefact and compare its hashes.")] = False,
) -> None:
    """Say what this installation is, and whether anything is wrong with it."""
    from saeens_pipeline.diagnosis import diagnose

    findings = list(diagnose(verify=verify))
    for finding in findings:
        mark = ("ok   ", "green") if finding.ok else ("bad  ", "red")
        out.print(Text.assemble(mark, f"{finding.subject:<22} {finding.detail}"), soft_wrap=True)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(1)


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
    from saeens_pipeline.runs import reporter_for

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
