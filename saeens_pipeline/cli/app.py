"""The typer application and its entry point. Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from saeens_pipeline.cli.output import complain
from saeens_pipeline.errors import SaeensError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Sparse-autoencoder ensembles as a Dagster asset pipeline.",
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option(help="Show tracebacks.")] = False) -> None:
    """Declares --debug, which `main` reads: it decides how errors of any command are shown."""


def main() -> None:
    """Run the command line: known errors become one message, others a traceback with --debug."""
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
