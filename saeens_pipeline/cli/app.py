"""The typer application and its entry point. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""

from __future__ import annotations

import io
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from saeens_pipeline.assets.memory import is_out_of_memory, out_of_memory_message
from saeens_pipeline.cli.child import continue_in_child
from saeens_pipeline.cli.output import notify, print_line
from saeens_pipeline.errors import SaeensError, without_escapes

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse-autoencoder ensembles as a Dagster asset pipeline.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print_line(f"saeens {version('saeens')}, torch {version('torch')}, dagster {version('dagster')}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Show the versions.", is_eager=True, callback=_print_version)] = False,
) -> None:
    """Declare --debug, which `main` reads for the errors of all commands, and --version."""


def main() -> None:
    """Run the command line. Errors become one message, with --debug a traceback."""
    sys.argv[1:] = map(without_escapes, sys.argv[1:])  # messages of typer and of Dagster repeat them
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for paths that are not UTF-8, and for terminals that are not
    try:
        continue_in_child(sys.argv[1:])
        app()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        is_known = isinstance(error, SaeensError)
        message = str(error) if is_known else f"{type(error).__name__}: {error}\n`saeens --debug ...` shows the traceback"
        if is_out_of_memory(error):
            message = out_of_memory_message(str(error))
        notify("error", message)
        sys.exit(error.exit_code if is_known else 1)
